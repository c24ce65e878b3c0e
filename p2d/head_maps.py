"""HeadMap: a score for every head, the recipe that made it and how reproducible it is; views, files and pictures of it.

A ratio is a view on the map and is never stored in it. Scores come from `p2d.identify`. No torch here.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from p2d.config import DEFAULT_RATIO, Projection, top_count
from p2d.errors import ConfigError, ErrorDetail, ModelError
from p2d.files import read_json, write_json
from p2d.model_info import ModelInfo

Head = tuple[int, int]
"""(layer, query head), 0-based."""

FORMAT = 1
"""Of head_map.json; a reader refuses other numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reproducibility:
    """How far two half-proxies of disjoint rows agree.

    Both are scored on the same guide rows, so the luck of these is not in it.
    """

    rank_correlation: float
    """Spearman's, over all heads; nan-free: 0 where one half gives every head the same score."""
    top_k_overlap: int
    """Heads that both halves have among their top k."""
    k: int
    chance: float
    """Overlap expected of two random draws of k heads: k^2 / heads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxyFacts:
    """What the proxy training behind a map did: two half-proxies."""

    rows_per_half: int
    steps_per_half: int
    learning_rate: float
    guide_rows: int
    guide_loss_before: float
    """Mean loss per answer token on the guide rows at the base model, in nats."""
    guide_loss_after: tuple[float, ...]
    """The same after each half-proxy."""
    tokens: int
    """Processed by both halves, held-out rows included."""
    explained_decrease: tuple[float, ...] = ()
    """`attribution` alone: sum of all heads' scores of each half; near the true decrease if the path was resolved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMap:
    """Scores of all heads of one model for one task; higher = more task-sensitive. Compare within one map only."""

    scores: tuple[tuple[float, ...], ...]
    """[layer][head], fp32 values."""
    scorer: str
    projections: tuple[Projection, ...]
    """What the proxy trained."""
    model_name: str
    model_digest: str
    dataset_hash: str
    """Content hash of the rows the proxies were drawn from."""
    seed: int
    precision: str
    reproducibility: Reproducibility
    """Of the heads that DEFAULT_RATIO keeps; `agreement` says it of any other."""
    halves: tuple[tuple[tuple[float, ...], ...], ...] = ()
    """Scores of the two half-proxies alone, each [layer][head]; absent in maps of before."""
    proxy: ProxyFacts | None = None
    """None for scorers that train none."""

    @property
    def n_layers(self) -> int:
        """Layers of the model."""
        return len(self.scores)

    @property
    def n_heads(self) -> int:
        """Query heads per layer."""
        return len(self.scores[0])

    @property
    def ranks(self) -> bool:
        """Whether it puts any head before another; a map by `uniform` does not, and then an order is only that of places."""
        return len({score for row in self.scores for score in row}) > 1

    def ranked(self) -> list[Head]:
        """All heads, best first; ties by layer, then head."""
        return ranked(self.scores)

    def top(self, ratio: float) -> list[Head]:
        """The best `ceil(ratio * heads)` heads, best first."""
        return self.ranked()[: top_count(ratio, self.n_layers * self.n_heads)]

    def agreement(self, ratio: float) -> Reproducibility:
        """How far the half-proxies agree on the heads that a ratio keeps; a map without halves knows its own `k` alone."""
        return reproducibility(*self.halves, ratio=ratio) if self.halves else self.reproducibility

    def save(self, path: Path) -> None:
        """Write head_map.json."""
        write_json(path, {"format": FORMAT, **asdict(self)})

    @staticmethod
    def load(path: Path) -> HeadMap:
        """Read head_map.json. Raises ModelError if it is not one."""
        try:
            value = read_json(path)
            if value.pop("format") != FORMAT:
                raise ValueError("format")
            proxy = value.pop("proxy")
            return HeadMap(
                scores=_scores(value.pop("scores")),
                halves=tuple(_scores(half) for half in value.pop("halves", ())),
                projections=tuple(value.pop("projections")),
                reproducibility=Reproducibility(**value.pop("reproducibility")),
                proxy=None if proxy is None else _proxy_facts(proxy),
                **value,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path.name} is not a head map of format {FORMAT}.") from error

    def to_csv(self) -> str:
        """One line per head, best first: rank, layer, head, score."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("rank", "layer", "head", "score"))
        for rank, (layer, head) in enumerate(self.ranked(), start=1):
            writer.writerow((rank, layer, head, self.scores[layer][head]))
        return text.getvalue()

    def to_npz(self) -> bytes:
        """A NumPy archive without pickles: `scores` [layer, head] and, where the map has them, `halves` [half, layer, head].

        float64, so that every number is the one in head_map.json.
        """
        import numpy as np

        arrays = {"scores": np.array(self.scores)} | ({"halves": np.array(self.halves)} if self.halves else {})
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        return content.getvalue()

    def to_svg(self, ratio: float = DEFAULT_RATIO) -> str:
        """Layers from the bottom up, heads from left to right; the darker the higher ranked, the ratio's heads outlined.

        All grey and none outlined where the map ranks nothing.
        """
        return _svg(self, ratio)


def _scores(value: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(score) for score in row) for row in value)


def check_head_map(path: Path, info: ModelInfo) -> HeadMap:
    """Load the head map of a model. Raises ConfigError (`config.invalid`) if it is none, or not of its heads."""
    try:
        head_map = HeadMap.load(path)
    except ModelError as error:
        raise _unusable(error.text) from error
    if head_map.model_digest != info.digest:
        raise _unusable(f"The head map is of {head_map.model_name!r}; the job's base model is {info.name!r}.")
    shape = [info.n_heads] * info.n_layers
    if any([len(row) for row in scores] != shape for scores in (head_map.scores, *head_map.halves)):
        raise _unusable(f"The head map has not the {info.n_layers} layers of {info.n_heads} heads of {info.name!r}.")
    if not all(
        math.isfinite(score) for scores in (head_map.scores, *head_map.halves) for row in scores for score in row
    ):
        raise _unusable("The head map has a score that is no finite number.")
    return head_map


def _unusable(text: str) -> ConfigError:
    return ConfigError(text, errors=[ErrorDetail(code="config.head_map", message=text, pointer="/heads/head_map")])


def _proxy_facts(value: dict[str, Any]) -> ProxyFacts:
    after, explained = tuple(value.pop("guide_loss_after")), tuple(value.pop("explained_decrease"))
    return ProxyFacts(**value, guide_loss_after=after, explained_decrease=explained)


def ranked(scores: Sequence[Sequence[float]]) -> list[Head]:
    """All heads by score, best first; ties by layer, then head."""
    heads = [(layer, head) for layer, row in enumerate(scores) for head in range(len(row))]
    return sorted(heads, key=lambda at: (-scores[at[0]][at[1]], at))


def overlap(one: Sequence[Head], other: Sequence[Head]) -> int:
    """Heads in both."""
    return len(set(one) & set(other))


def reproducibility(
    one: Sequence[Sequence[float]], other: Sequence[Sequence[float]], *, ratio: float
) -> Reproducibility:
    """Agreement of two maps of one model over all ranks and over the heads that a ratio keeps."""
    flat_one = [score for row in one for score in row]
    flat_other = [score for row in other for score in row]
    k = top_count(ratio, len(flat_one))
    return Reproducibility(
        rank_correlation=spearman(flat_one, flat_other),
        top_k_overlap=overlap(ranked(one)[:k], ranked(other)[:k]),
        k=k,
        chance=k * k / len(flat_one),
    )


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation with tied ranks shared; 0 where one side is constant."""
    a, b = _ranks(one), _ranks(other)
    mean = (len(a) - 1) / 2
    covariance = math.fsum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = math.fsum((x - mean) ** 2 for x in a) * math.fsum((y - mean) ** 2 for y in b)
    return covariance / math.sqrt(spread) if spread > 0 else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + end - 1) / 2
        start = end
    return ranks


def _svg(head_map: HeadMap, ratio: float) -> str:
    cell, left, top = 16, 34, 26
    width, height = left + cell * head_map.n_heads + 8, top + cell * head_map.n_layers + 22
    total, ranks = head_map.n_layers * head_map.n_heads, head_map.ranks
    chosen = set(head_map.top(ratio)) if ranks else set()
    title = f"{head_map.scorer}: {len(chosen)} of {total} heads of {head_map.model_name}"
    if not ranks:
        title = f"{head_map.scorer}: no head of {head_map.model_name} is ranked before another"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="9"><title>{escape(title)}</title>'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
        '<text x="4" y="14">layer \N{UPWARDS ARROW} head \N{RIGHTWARDS ARROW}</text>'
    ]
    if not ranks:
        parts.append(f'<text x="4" y="{top - 3}">nothing is ranked</text>')
    for rank, (layer, head) in enumerate(head_map.ranked()):
        x, y = left + cell * head, top + cell * (head_map.n_layers - 1 - layer)
        # Plain hex, from dark blue to nearly white: some viewers draw CSS colour functions black.
        shade = rank / max(1, total - 1)
        red, green, blue = (round(dark + (250 - dark) * shade) if ranks else 190 for dark in (23, 69, 130))
        place = f"rank {rank + 1}" if ranks else "not ranked"
        border = ' stroke="#000" stroke-width="1.5"' if (layer, head) in chosen else ' stroke="#fff" stroke-width="1"'
        parts.append(
            f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="#{red:02x}{green:02x}{blue:02x}"{border}>'
            f"<title>layer {layer}, head {head}: {place}, score {head_map.scores[layer][head]:.4g}</title></rect>"
        )
    for layer in range(0, head_map.n_layers, max(1, head_map.n_layers // 6)):
        y = top + cell * (head_map.n_layers - 1 - layer) + 11
        parts.append(f'<text x="{left - 6}" y="{y}" text-anchor="end">{layer}</text>')
    for head in range(0, head_map.n_heads, max(1, head_map.n_heads // 8)):
        parts.append(f'<text x="{left + cell * head + 7}" y="{height - 8}" text-anchor="middle">{head}</text>')
    return "".join([*parts, "</svg>\n"])
