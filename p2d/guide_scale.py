"""How good rows are by the measure of the guide's own: in the guide's spreads from its median. numpy, no model.

Scorers ask whether a sample of a pool is like the guide, and `p2d.selection` measures all rows by it (decisions 0031, 0034).

Legend: R row, G guide row, N head counted through the scored layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2d.response_matrix import PASSED, Combine, ResponseShard, median_and_spread

Floats = npt.NDArray[np.float64]

BAR = 0.4
"""Quantile of the guide's own scores from which on a row is good enough: 57 to 74 % of clean rows are. Of half-bad pools 0 to 5 %
of all such rows are bad, not counting wrong numbers, which nothing sees. With 0.25 three quarters and more of the clean rows are
good enough, and twice as many bad ones where the guide is not clean itself (docs/LOG.md)."""

LIKE_GUIDE = 0.58
"""Most that the guide's rows may outscore the pool's (`outscored`; 0.5 = not at all) where the pool is taken to be like them. With
32 guide rows clean pools are in 95 to 100 % of the draws, pools of which 30 % is bad in 0 to 8 %, half-bad ones in none
(docs/LOG.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuideScale:
    """What the guide's rows have of a row's two parts, by which all rows are measured."""

    response_G: Floats
    quality_G: Floats
    response_median: float
    response_spread: float
    quality_median: float
    quality_spread: float

    @property
    def score_G(self) -> Floats:
        """The guide's own scores, [guide rows]."""
        return self.scores(self.response_G, self.quality_G)

    @property
    def bar(self) -> float:
        """Score from which on a row is good enough."""
        return float(np.quantile(self.score_G, BAR))

    def scores(self, response_R: Floats, quality_R: Floats) -> Floats:
        """The lesser of response and quality, each in spreads from the guide's median, [R]."""
        by_response = (response_R - self.response_median) / self.response_spread
        return np.minimum(by_response, (quality_R - self.quality_median) / self.quality_spread)


def bar_of(scale: GuideScale | None, how: Combine) -> float | None:
    """Score from which on a row is good enough; None where nothing says what is."""
    if scale is not None:
        return scale.bar
    return PASSED if how == "pass" else None


def guide_scale(shard: ResponseShard, heads: Sequence[tuple[int, int]]) -> GuideScale | None:
    """What the guide's rows have with these heads; None where the scorer has not rated them."""
    if shard.guide_response_GN is None or shard.guide_quality_G is None:
        return None
    response_G = summed(shard.guide_response_GN, shard, heads)
    quality_G = shard.guide_quality_G.astype(np.float64)
    (response, response_spread), (quality, quality_spread) = map(median_and_spread, (response_G, quality_G))
    return GuideScale(
        response_G=response_G,
        quality_G=quality_G,
        response_median=response,
        response_spread=response_spread or 1.0,  # rows that are all alike
        quality_median=quality,
        quality_spread=quality_spread or 1.0,
    )


def scores_beside_guide(shard: ResponseShard, heads: Sequence[tuple[int, int]]) -> tuple[Floats, Floats] | None:
    """Scores of the guide's rows and of the scored rows of a shard, [G] and [R]; None where the guide was not rated."""
    if (scale := guide_scale(shard, heads)) is None:
        return None
    assert shard.quality_R is not None
    response_R = summed(shard.response_RN, shard, heads)
    return scale.score_G, scale.scores(response_R, shard.quality_R.astype(np.float64))


def outscored(score_G: Floats, score_R: Floats) -> float:
    """How often a row of the guide scores above a row of the pool, ties half: Mann and Whitney's U over all pairs."""
    sorted_R = np.sort(score_R)
    below_G = np.searchsorted(sorted_R, score_G, side="left") + np.searchsorted(sorted_R, score_G, side="right")
    return float(below_G.mean() / (2 * len(score_R)))


def columns(shard: ResponseShard, heads: Sequence[tuple[int, int]]) -> npt.NDArray[np.intp]:
    """Columns of the chosen heads that were scored."""
    first = shard.layers.start
    scored = [(layer - first) * shard.n_heads + head for layer, head in heads if layer in shard.layers]
    return np.array(scored, dtype=np.intp)


def summed(response_RN: npt.NDArray[np.float16], shard: ResponseShard, heads: Sequence[tuple[int, int]]) -> Floats:
    """Responses of the chosen heads added up, [R]. float64: fp16 values of 27 heads added in fp16 would tie."""
    scored = columns(shard, heads)
    response_R: Floats = response_RN[:, scored].sum(axis=1, dtype=np.float64)
    if (missing := len(heads) - len(scored)) and len(shard.layers):
        response_R += missing * response_RN.mean(axis=1, dtype=np.float64)
    return response_R
