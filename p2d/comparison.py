"""Several jobs side by side: what they were asked, which heads and rows they chose, how good they became, what they cost.

Arithmetic over what the jobs left behind, in plain Python: the API's process has no numpy. Reading the files is the caller's
business, and so is the page (`p2d.comparison_page`). What a job does not have is None, and never guessed.

Ratios of sets are Jaccard's: what both have over what either has. Losses are nats per answer token.
"""

from __future__ import annotations

import itertools
import operator
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from p2d.head_maps import Head, HeadMap, spearman

DRAWS = 2000
"""Of the bootstrap; the ends of its interval are then good to about a fiftieth of its width."""

GROUPS = 200
"""Above so many rows the bootstrap draws random groups of rows, at the same spread: its cost is bounded that way."""

AXIS = 60
"""Places of the common axis of the loss curves."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLosses:
    """row_losses.json: answer loss of every held-out row, in the order of the rows."""

    rows_hash: str
    """Content hash of the rows: equal for the same rows in the same order."""
    tokens: Sequence[int]
    before: Sequence[float]
    """Nats, summed over the row's answer tokens, as is `after`."""
    after: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What one job left behind."""

    id: str
    name: str
    config: Mapping[str, Any]
    """As JSON: resolved where that is known."""
    heads: Sequence[Head] | None = None
    """The chosen ones."""
    head_map: HeadMap | None = None
    kept: frozenset[bytes] | None = None
    """Keys of the kept rows, equal for equal text."""
    log: Sequence[Mapping[str, Any]] | None = None
    """Optimizer steps of training.json."""
    losses: RowLosses | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    """Of the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A field of the configuration in which the jobs differ."""

    pointer: str
    values: list[Any]
    """Of each job, in order; None also where a job does not have the field."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """What two sets have in common."""

    one: int
    other: int
    shared: int
    jaccard: float
    """1 where both are empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerAgreement:
    """Two head maps in one layer."""

    layer: int
    chosen: Overlap
    rank_correlation: float
    """Spearman's over the layer's heads; 0 where one side gives all the same score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadAgreement:
    """Two head maps of one model."""

    chosen: Overlap
    rank_correlation: float
    layers: list[LayerAgreement]


@dataclass(frozen=True, kw_only=True, slots=True)
class LossDifference:
    """Mean loss of the other job minus that of the one, on the same held-out rows; below 0 = the other is better."""

    rows: int
    difference: float
    low: float
    high: float
    """Ends of the 95 % interval of a paired bootstrap."""
    verdict: str
    """`one`, `other` or `no clear difference`: which is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two of the jobs, by their place in the list."""

    one: int
    other: int
    heads: HeadAgreement | None
    rows: Overlap | None
    loss: LossDifference | None
    reasons: dict[str, str]
    """Why `heads`, `rows` or `loss` is absent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """What one job reached and what it cost; None = not known."""

    rows: int | None
    loss_before: float | None
    loss_after: float | None
    metric: str | None
    metric_before: float | None
    metric_after: float | None
    trained_parameters: int | None
    learning_rate: float | None
    aer: float | None
    aer_lora: float | None
    aer_flop: float | None
    aer_lora_flop: float | None
    counted_s: float | None
    spent_s: float | None
    full_s: float | None
    lora_s: float | None
    peak_memory_bytes: int | None
    step_s: dict[str, float]
    """Measured seconds inside each step, loading included, all shards together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curves:
    """Training loss of every job over the tokens that it was trained on, on one axis."""

    tokens: list[int]
    losses: list[list[float | None]]
    """Of each job: mean over the steps between this place and the one before it; None before its first and behind its last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Jobs side by side, in the order in which they were given."""

    settings: list[Setting]
    metrics: list[Metrics]
    pairs: list[Pair]
    curves: Curves


def compare(jobs: Sequence[Facts], *, seed: int = 0) -> Comparison:
    """Compare two or more jobs. The same jobs give the same numbers."""
    drawn = _bootstrapped(jobs, seed)
    return Comparison(
        settings=list(differing([job.config for job in jobs])),
        metrics=[_metrics(job) for job in jobs],
        pairs=[_pair(jobs, one, other, drawn) for one, other in itertools.combinations(range(len(jobs)), 2)],
        curves=common_curves([job.log for job in jobs]),
    )


# --- settings --------------------------------------------------------------------------------------------------------


def differing(configs: Sequence[Mapping[str, Any]]) -> Iterator[Setting]:
    """Every field whose value is not the same in all, in the order of the first that has it."""
    flat = [dict(_leaves(config, "")) for config in configs]
    for pointer in dict.fromkeys(itertools.chain.from_iterable(flat)):
        values = [one.get(pointer) for one in flat]
        if any(value != values[0] for value in values):
            yield Setting(pointer=pointer, values=values)


def _leaves(value: Any, pointer: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{pointer}/{name}")
    else:
        yield pointer, value


# --- heads and rows --------------------------------------------------------------------------------------------------


def overlap(one: frozenset[Any], other: frozenset[Any]) -> Overlap:
    """Sizes of two sets and what they share."""
    shared, either = len(one & other), len(one | other)
    return Overlap(one=len(one), other=len(other), shared=shared, jaccard=shared / either if either else 1.0)


def head_agreement(one: Facts, other: Facts) -> HeadAgreement | str:
    """How far two jobs agree on the heads; else why that cannot be said."""
    if one.head_map is None or other.head_map is None or one.heads is None or other.heads is None:
        return "one of them has no head map"
    if one.head_map.model_digest != other.head_map.model_digest:
        return "their base models are not the same"
    if not (one.head_map.ranks and other.head_map.ranks):
        return "the head map of one of them ranks nothing"
    chosen = frozenset(one.heads), frozenset(other.heads)
    layers = []
    for layer, (a, b) in enumerate(zip(one.head_map.scores, other.head_map.scores, strict=True)):
        own = [frozenset(head for head in heads if head[0] == layer) for heads in chosen]
        agreement = LayerAgreement(layer=layer, chosen=overlap(own[0], own[1]), rank_correlation=spearman(a, b))
        layers.append(agreement)
    flat = [list(itertools.chain.from_iterable(job.head_map.scores)) for job in (one, other) if job.head_map]
    return HeadAgreement(chosen=overlap(*chosen), rank_correlation=spearman(flat[0], flat[1]), layers=layers)


# --- losses ----------------------------------------------------------------------------------------------------------


def _bootstrapped(jobs: Sequence[Facts], seed: int) -> dict[int, list[float]]:
    """Mean loss of every job in DRAWS samples of the held-out rows, by its place: the same samples for the same rows.

    Rows are drawn with replacement, all losses of a row together, so differences between jobs are paired.
    """
    found: dict[int, list[float]] = {}
    by_rows: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for place, job in enumerate(jobs):
        if job.losses is not None and job.losses.tokens:
            by_rows.setdefault((job.losses.rows_hash, tuple(job.losses.tokens)), []).append(place)
    for (_, tokens), places in by_rows.items():
        if len(places) < 2:
            continue
        groups = _groups(len(tokens), seed)
        sizes = _sums(tokens, groups)
        sums = {place: _sums(jobs[place].losses.after, groups) for place in places}  # type: ignore[union-attr]
        found |= {place: [] for place in places}
        rng = random.Random(seed)  # noqa: S311 - not a secret
        for _ in range(DRAWS):
            times = [0] * len(groups)
            for group in rng.choices(range(len(groups)), k=len(groups)):
                times[group] += 1
            size = sum(map(operator.mul, times, sizes))
            for place in places:
                found[place].append(sum(map(operator.mul, times, sums[place])) / size)
    return found


def _groups(rows: int, seed: int) -> list[list[int]]:
    """Every row alone, or where there are many, GROUPS random groups of nearly equal size."""
    order = list(range(rows))
    if rows > GROUPS:
        random.Random(f"{seed}:groups").shuffle(order)  # noqa: S311 - not a secret
    count = min(rows, GROUPS)
    return [order[group::count] for group in range(count)]


def _sums(values: Sequence[float], groups: Sequence[Sequence[int]]) -> list[float]:
    return [sum(values[row] for row in group) for group in groups]


def loss_difference(one: Facts, other: Facts, drawn: tuple[list[float], list[float]] | None) -> LossDifference | str:
    """The paired difference between two jobs' losses after training; else why there is none."""
    if one.losses is None or other.losses is None:
        return "one of them has no losses of single rows"
    if one.losses.rows_hash != other.losses.rows_hash:
        return "they were evaluated on different rows"
    if list(one.losses.tokens) != list(other.losses.tokens):
        return "their base models read the rows as other tokens"
    if drawn is None:
        return "there are no held-out rows"
    tokens = sum(one.losses.tokens)
    differences = sorted(b - a for a, b in zip(*drawn, strict=True))
    low, high = _quantile(differences, 0.025), _quantile(differences, 0.975)
    better = "other" if high < 0 else "one" if low > 0 else "no clear difference"
    return LossDifference(
        rows=len(one.losses.tokens),
        difference=(sum(other.losses.after) - sum(one.losses.after)) / tokens,
        low=low,
        high=high,
        verdict=better,
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear between the two nearest, as numpy's default."""
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


# --- one job, two jobs, all jobs -------------------------------------------------------------------------------------


def _pair(jobs: Sequence[Facts], one: int, other: int, drawn: Mapping[int, list[float]]) -> Pair:
    a, b = jobs[one], jobs[other]
    kept: Overlap | str = "one of them has no selection"
    if a.kept is not None and b.kept is not None:
        kept = overlap(a.kept, b.kept)
    both = (drawn[one], drawn[other]) if one in drawn and other in drawn else None
    found: dict[str, Any] = {"heads": head_agreement(a, b), "rows": kept, "loss": loss_difference(a, b, both)}
    reasons = {name: value for name, value in found.items() if isinstance(value, str)}
    return Pair(one=one, other=other, reasons=reasons, **{**found, **dict.fromkeys(reasons)})


def _metrics(job: Facts) -> Metrics:
    evaluation, training, cost = job.evaluation, job.training, job.cost
    steps: dict[str, float] = {}
    for step in cost.get("steps", ()):
        steps[step["step"]] = steps.get(step["step"], 0.0) + step["load_s"] + step["work_s"]
    names = ("rows", "loss_before", "loss_after", "metric", "metric_before", "metric_after")
    costs = ("aer", "aer_lora", "aer_flop", "aer_lora_flop", "counted_s", "spent_s", "full_s", "lora_s")
    return Metrics(
        **{name: evaluation.get(name) for name in names},
        **{name: cost.get(name) for name in costs},
        trained_parameters=training.get("n_parameters"),
        learning_rate=training.get("learning_rate"),
        peak_memory_bytes=max((step["peak_memory_bytes"] for step in cost.get("steps", ())), default=None),
        step_s={name: round(seconds, 3) for name, seconds in steps.items()},
    )


def common_curves(logs: Sequence[Sequence[Mapping[str, Any]] | None]) -> Curves:
    """Loss of each job's optimizer steps over its trained tokens, on AXIS places up to the longest run."""
    ways = [list(itertools.accumulate(step["tokens"] for step in log or ())) for log in logs]
    most = max((way[-1] for way in ways if way), default=0)
    axis = [round(most * place / AXIS) for place in range(1, AXIS + 1)] if most else []
    return Curves(tokens=axis, losses=[_on_axis(way, log or (), axis) for way, log in zip(ways, logs, strict=True)])


def _on_axis(way: Sequence[int], log: Sequence[Mapping[str, Any]], axis: Sequence[int]) -> list[float | None]:
    found: list[float | None] = []
    step = 0
    for place in axis:
        first = step
        while step < len(way) and way[step] <= place:
            step += 1
        if step > first:
            tokens = sum(entry["tokens"] for entry in log[first:step])
            found.append(sum(entry["loss"] * entry["tokens"] for entry in log[first:step]) / tokens)
        else:  # between two steps the loss stays; behind the last there is none
            found.append(found[-1] if found and step < len(way) else None)
    return found
