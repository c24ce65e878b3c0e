"""How far two head maps agree: by rank, over all heads and layer by layer, and by the heads that a ratio keeps. No torch here.

Scores themselves are never compared: two scorers, or two tasks, have different units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from p2d.config import top_count
from p2d.head_maps import Head, HeadMap, overlap, spearman


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDiff:
    """One layer of two head maps."""

    layer: int
    rank_correlation: float
    """Spearman's, over the layer's heads; 0 where one map gives them all the same score."""
    kept_one: int
    """Heads of the layer among the kept ones of the first map."""
    kept_other: int
    kept_both: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMapDiff:
    """Two head maps of the same shape side by side."""

    rank_correlation: float
    """Spearman's, over all heads."""
    ratio: float
    k: int
    """Heads that the ratio keeps of each map."""
    overlap: int
    """Heads that both keep."""
    chance: float
    """Overlap expected of two random draws of k heads: k^2 / heads."""
    p_value: float
    """Probability that two random draws share as many heads or more (hypergeometric)."""
    jaccard: float
    """Heads that both keep, over heads that one of them keeps."""
    layers: tuple[LayerDiff, ...]
    only_one: tuple[Head, ...]
    """Heads that the first map alone keeps, its best first."""
    only_other: tuple[Head, ...]


def compare(one: HeadMap, other: HeadMap, ratio: float) -> HeadMapDiff:
    """Compare two head maps of the same number of layers and heads, that both rank, at a ratio, (0, 1]."""
    assert (one.n_layers, one.n_heads) == (other.n_layers, other.n_heads), "compare the shapes first"
    assert one.ranks, "of a map that ranks nothing the kept heads would be the first ones"
    assert other.ranks, "likewise"
    total = one.n_layers * one.n_heads
    k = top_count(ratio, total)
    tops = one.top(ratio), other.top(ratio)
    sets = set(tops[0]), set(tops[1])
    shared = overlap(*tops)
    layers = tuple(
        LayerDiff(
            layer=layer,
            rank_correlation=spearman(one.scores[layer], other.scores[layer]),
            kept_one=sum(at == layer for at, _ in sets[0]),
            kept_other=sum(at == layer for at, _ in sets[1]),
            kept_both=sum(at == layer for at, _ in sets[0] & sets[1]),
        )
        for layer in range(one.n_layers)
    )
    return HeadMapDiff(
        rank_correlation=spearman(*([score for row in side.scores for score in row] for side in (one, other))),
        ratio=ratio,
        k=k,
        overlap=shared,
        chance=k * k / total,
        p_value=_as_many_by_chance(shared, k, total),
        jaccard=shared / len(sets[0] | sets[1]),
        layers=layers,
        only_one=tuple(head for head in tops[0] if head not in sets[1]),
        only_other=tuple(head for head in tops[1] if head not in sets[0]),
    )


def _as_many_by_chance(shared: int, k: int, total: int) -> float:
    """P(X >= shared) for the overlap X of two random draws of k of `total` heads, in whole numbers until the end."""
    ways = sum(math.comb(k, both) * math.comb(total - k, k - both) for both in range(shared, k + 1))
    return ways / math.comb(total, k)
