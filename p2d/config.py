"""What a job asks for: frozen dataclasses, one per stage, used alike by HTTP, command line and Python. No torch here.

Users write `"auto"` where they want the service to decide; `p2d.resolution` replaces every `"auto"` that can be decided before
the run and says why. `check` names every field that is wrong at once. Where rows, models and files come from is not
this file's business.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from typing import Any, Literal, get_args

from p2d.config_types import wrong_types
from p2d.errors import ConfigError, ErrorDetail, UnknownName
from p2d.registry import check_name
from p2d.wording import counted

Auto = Literal["auto"]
Kind = Literal["identify_heads", "select_data", "adapt"]
Precision = Literal["auto", "fp32", "bf16"]
Projection = Literal["q", "k", "v", "o"]
Control = Literal["random_heads", "random_data", "lora"]
Mode = Literal["faithful", "fast"]
Reuse = Literal["auto", "never"]
Metric = Literal["log_likelihood", "token_accuracy", "exact_match", "rouge_l"]

HEAD_SCORERS = {
    "attribution": "p2d.scorers.attribution:attribution",
    "pad": "p2d.scorers.pad:pad",
    "kl": "p2d.scorers.kl:kl",
    "cosine": "p2d.scorers.cosine:cosine",
    "shift": "p2d.scorers.shift:shift",
    "relative_shift": "p2d.scorers.relative_shift:relative_shift",
    "random": "p2d.scorers.random:random",  # control arm, never a default
}
"""Head scorers: name -> function; one file each in p2d/scorers/."""

COMBINED_SCORERS = frozenset({"pad", "kl", "cosine"})
"""Head scorers that look at `W_q W_k^T W_v` alone: a proxy that trains none of q, k and v moves nothing that they see."""

DATA_SCORERS = {
    "alignment": "p2d.responses.alignment:alignment",
    "alignment_likelihood": "p2d.responses.alignment_likelihood:alignment_likelihood",
    "alignment_information": "p2d.responses.alignment_information:alignment_information",
    "information": "p2d.responses.information:information",
    "icl": "p2d.responses.icl:icl",
    "random": "p2d.responses.random:random",  # control arm, never a default
}
"""Data scorers: name -> function that fills a response matrix; one file each in p2d/responses/."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The defaults that a recipe name stands for."""

    head_scorer: str
    data_scorer: str
    slices: tuple[Projection, ...]
    reason: str


RECIPES = {
    "default": Recipe(
        head_scorer="attribution",
        data_scorer="alignment_likelihood",
        slices=("v", "o"),
        reason="best of our own measurements (docs/LOG.md)",
    ),
    "paper": Recipe(
        head_scorer="pad",
        data_scorer="icl",
        slices=("q", "k", "v"),
        reason="as published (arXiv 2605.21558, 2505.18799, 2505.12212)",
    ),
}

MIN_ROWS = 200
"""Fewest rows that an automatic data ratio leaves. A guess until the learning curve is measured (docs/LOG.md)."""

POOL_FACTOR = 2.5
"""Fast mode scores a random pool of this many times the rows that are kept (docs/decisions/0012)."""

FAST_MEASURED = "default"
"""The one recipe whose fast mode was compared with its faithful mode (docs/results/fast_mode.md)."""

FAST_ANSWER_TOKENS = 32
"""Tokens of an answer that `alignment` reads in fast mode: joined with the likelihood they tell clean from bad rows about as well
as whole answers of some 100 tokens (AUROC 0.90 and 0.92), at half of the operations (docs/LOG.md)."""

FAST_DEMOS = 20
"""Most demonstrations of an `icl` group in fast mode, where there are rows enough: a query's cost is shared by as many."""

FAST_SLOT_ROWS = 16
"""Fewest rows shown in a slot before fast mode takes further slots. A guess: a mean over 16 is good to a quarter of the spread."""

RATING_SCORERS = frozenset({"alignment_likelihood"})
"""Data scorers that rate the guide's rows, too, where there are MIN_GUIDE, and measure rows by them (docs/decisions/0031)."""

MIN_GUIDE = 8
"""Fewest guide rows that tell what rows of the task are like, and so what is good enough. A guess: a spread of fewer is noise."""

UPPER_THIRD = 2 / 3
"""Depth at which `alignment` begins to read gradients. By measurement: the upper third of the layers tells clean from bad
rows as well as all of them (docs/decisions/0012)."""

PROXY_ROWS = 100
"""Rows of a proxy by default. ALPS uses 100; 25 find 17 of the same 27 heads (docs/LOG.md)."""

MIN_PROXY_ROWS = 16
"""Fewest rows of which a proxy is made by default: two halves of two optimizer steps each. A guess."""

DEFAULT_RATIO = 0.10
"""Share of heads and of rows kept by default: the paper's 10 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsConfig:
    """Stage 1: which heads count as task-sensitive."""

    scorer: str = "auto"
    """Name in HEAD_SCORERS; `auto` = the recipe's."""
    ratio: float = DEFAULT_RATIO
    """Share of query heads kept, (0, 1]. A view on the head map: the map itself ranks all heads."""
    proxy_rows: int | Auto = "auto"
    """Rows of the proxy (two half-proxies of half as many). `auto` = PROXY_ROWS, or all training rows where there are fewer."""
    head_map: str | None = None
    """Id of an earlier head map of the same base model: stage 1 is then skipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Stage 2: which rows the chosen heads respond to."""

    scorer: str = "auto"
    """Name in DATA_SCORERS; `auto` = the recipe's."""
    ratio: float | Auto = "auto"
    """Share of rows kept, (0, 1]. `auto` = 10 %, but never fewer than MIN_ROWS rows."""
    mode: Mode = "faithful"
    """`fast` = a fraction of the cost: fewer rows are scored, and of long answers the beginning."""
    metric: Metric = "log_likelihood"
    """`icl`: how the answers of a group are judged; the last two generate, which costs far more."""
    n_demos: int = 5
    """`icl`: rows shown as examples in one group (Data Whisperer)."""
    n_queries: int = 3
    """`icl`: held-out rows answered after the demos of one group (Data Whisperer)."""
    selection: str | None = None
    """Id of an earlier selection over the same dataset: stage 2 is then skipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Stage 3: how the chosen head slices are trained."""

    slices: tuple[Projection, ...] | Auto = "auto"
    """Which projections are sliced, of q, k, v (rows) and o (columns); `auto` = the recipe's."""
    rank: int | None = None
    """Rank of the update inside each slice, at most the head width; None = the full slice is trained."""
    epochs: int = 3
    """Passes over the selected rows."""
    learning_rate: float | Auto = "auto"
    """Peak of the cosine. `auto` = a short search on held-out rows inside the training step, counted in the cost."""
    batch_size: int = 4
    """Rows per optimizer step."""
    max_length: int | Auto = "auto"
    """Most tokens of one rendered row; a longer row is refused. `auto` = the model's context."""
    precision: Precision = "auto"
    """Compute type of the frozen weights; slices and AdamW state are always fp32. `auto` = bf16 where it is fast."""
    seed: int = 0
    """Fixes row order, proxies, folds and random controls."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a job may use at most."""

    max_seconds: int | None = None
    """Seconds on the clock from the first claim of a step on, however many steps run side by side, without those in which the
    job was paused; a job that needs more fails with `job.limit_reached`."""
    max_gpu_seconds: int | None = None
    """Seconds of workers, or of their GPUs, added up over all steps and all attempts at them. The service alone keeps it."""
    deadline: str | None = None
    """RFC 3339 time at which a job that has not ended fails likewise, also one that still waits. The service alone keeps it."""

    @property
    def ends_at(self) -> datetime | None:
        """The deadline as a time."""
        return None if self.deadline is None else datetime.fromisoformat(self.deadline)


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """A whole job as the user asked for it; datasets and the base model are named next to it."""

    kind: Kind = "adapt"
    recipe: str = "default"
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    controls: tuple[Control, ...] = ()
    """Arms trained beside the job's own, at the same size, to test its claim."""
    limits: Limits = field(default_factory=Limits)
    reuse: Reuse = "auto"
    """`never` = the service computes every step anew, even if an earlier job has computed the very same: for benchmarks."""


def top_count(ratio: float, total: int) -> int:
    """How many of `total` heads or rows a ratio keeps: `ceil(ratio * total)`, safe from float dust (200 / 300 * 300)."""
    return min(total, max(1, math.ceil(ratio * total - 1e-9)))


def pool_count(data: DataConfig, rows: int) -> int:
    """How many of `rows` rows are scored: all, or in fast mode a pool of POOL_FACTOR times the rows that are kept."""
    if data.mode == "faithful":
        return rows
    assert data.ratio != "auto", "resolve the config first"
    return min(rows, math.ceil(POOL_FACTOR * top_count(data.ratio, rows)))


def alignment_layers(layers: int) -> range:
    """Layers that `alignment` scores: the upper third, so that backward stops there."""
    return range(min(round(UPPER_THIRD * layers), layers - 1), layers)


def rates_guide(data_scorer: str, guide_rows: int) -> bool:
    """Whether the scorer passes over the guide once more, to rate its rows like those of the pool."""
    return data_scorer in RATING_SCORERS and guide_rows >= MIN_GUIDE


def alignment_projections(slices: tuple[Projection, ...]) -> tuple[Projection, ...]:
    """Projections that `alignment` reads: v alone where it is trained, which is as telling as all; else the trained ones."""
    return ("v",) if "v" in slices else slices


def icl_demos(data: DataConfig, rows: int) -> int:
    """Most rows that a group of `icl` shows when `rows` rows are scored.

    In fast mode up to FAST_DEMOS, but no more than leave FAST_SLOT_ROWS rows for each slot: a row's mass is divided by the
    mean of its slot, which a few rows do not tell.
    """
    if data.mode == "faithful":
        return data.n_demos
    return max(data.n_demos, min(FAST_DEMOS, rows // FAST_SLOT_ROWS))


def least_proxy_rows(heads: HeadsConfig) -> int:
    """Fewest training rows with which stage 1 can be done as asked; 0 where an earlier head map replaces it."""
    if heads.head_map is not None:
        return 0
    return MIN_PROXY_ROWS if heads.proxy_rows == "auto" else heads.proxy_rows


def proxy_count(heads: HeadsConfig) -> int:
    """Rows of the proxy, of a resolved config."""
    assert heads.proxy_rows != "auto", "resolve the config first"
    return heads.proxy_rows


def proxy_guide_rows(proxy_rows: int, guide_rows: int) -> int:
    """How many held-out rows a proxy is judged on: a third of its own rows, but at least 16 where there are so many.

    `attribution` passes them up to five times, so all 32 would cost more than a small proxy itself.
    """
    return min(guide_rows, max(16, math.ceil(proxy_rows / 3)))


def check(config: JobConfig) -> None:
    """Raise ConfigError (`config.invalid`) with one entry in errors[] for every field that is wrong; types come first.

    Of a head map that the config names only `check_given_heads` can judge.
    """
    _refuse(list(wrong_types(config, JobConfig)))
    _refuse([*_faults(config), *_unproven(config, None)])


def check_fields(config: JobConfig) -> None:
    """The same for values alone, and without what is not offered before its worth is shown: a benchmark may measure it."""
    _refuse(list(_faults(config)))


def check_given_heads(config: JobConfig, map_scorer: str) -> None:
    """Raise ConfigError if the job may not use a head map of this scorer, which no field of the config says."""
    _refuse(list(_unproven(config, map_scorer)))


def _refuse(errors: list[ErrorDetail]) -> None:
    if errors:
        raise ConfigError(
            counted(len(errors), "field of the job is wrong.", "fields of the job are wrong."), errors=errors
        )


def _faults(config: JobConfig) -> Iterator[ErrorDetail]:
    heads, data, training = config.heads, config.data, config.training
    names: list[tuple[Collection[str], str, str, str]] = [(RECIPES, config.recipe, "recipe", "/recipe")]
    names += [(HEAD_SCORERS, heads.scorer, "head scorer", "/heads/scorer")] if heads.scorer != "auto" else []
    names += [(DATA_SCORERS, data.scorer, "data scorer", "/data/scorer")] if data.scorer != "auto" else []
    for table, name, what, pointer in names:
        try:
            check_name(table, name, what=what, pointer=pointer)
        except UnknownName as error:
            yield from error.errors
    yield from _unknown_words(config)
    for pointer, ratio in (("/heads/ratio", heads.ratio), ("/data/ratio", data.ratio)):
        if ratio != "auto" and not 0 < ratio <= 1:
            yield _wrong("config.ratio", "a ratio above 0 and at most 1", ratio, pointer)
    at_least = [
        ("/heads/proxy_rows", heads.proxy_rows, 4),  # two half-proxies of two rows each
        ("/data/n_demos", data.n_demos, 1),
        ("/data/n_queries", data.n_queries, 1),
        ("/training/rank", training.rank, 1),
        ("/training/epochs", training.epochs, 1),
        ("/training/batch_size", training.batch_size, 1),
        ("/training/max_length", training.max_length, 8),
        ("/training/seed", training.seed, 0),
        ("/limits/max_seconds", config.limits.max_seconds, 1),
        ("/limits/max_gpu_seconds", config.limits.max_gpu_seconds, 1),
    ]
    for pointer, value, least in at_least:
        if isinstance(value, int) and value < least:
            yield _wrong("config.too_small", f"at least {least}", value, pointer)
    yield from _contradictions(config)
    if not _is_moment(config.limits):
        got = repr(config.limits.deadline)
        yield _wrong("config.deadline", "an RFC 3339 time, with its offset", got, "/limits/deadline")
    rate = training.learning_rate
    if rate != "auto" and not (math.isfinite(rate) and rate > 0):
        yield _wrong("config.learning_rate", "a positive number", rate, "/training/learning_rate")
    if training.slices != "auto" and (not training.slices or len(set(training.slices)) < len(training.slices)):
        yield ErrorDetail(
            code="config.slices", message="Expected one or more of q, k, v, o, each once.", pointer="/training/slices"
        )


def _is_moment(limits: Limits) -> bool:
    """Whether the deadline, if there is one, names one moment everywhere."""
    try:
        return limits.ends_at is None or limits.ends_at.tzinfo is not None
    except ValueError:
        return False


def _wrong(code: str, expected: str, got: object, pointer: str) -> ErrorDetail:
    message = f"Expected {expected}, got {got}."
    return ErrorDetail(code=code, message=message, pointer=pointer, expected=expected, got=str(got))


def _unknown_words(config: JobConfig) -> Iterator[ErrorDetail]:
    """Fields that take one of a few words; types alone do not stop a caller from Python."""
    slices = () if config.training.slices == "auto" else config.training.slices
    fields: list[tuple[str, Any, Any]] = [
        ("/kind", Kind, [config.kind]),
        ("/reuse", Reuse, [config.reuse]),
        ("/controls", Control, config.controls),
        ("/data/mode", Mode, [config.data.mode]),
        ("/data/metric", Metric, [config.data.metric]),
        ("/training/precision", Precision, [config.training.precision]),
        ("/training/slices", Projection, slices),
    ]
    for pointer, words, given in fields:
        known = get_args(words)
        for word in given:
            if word not in known:
                yield _wrong("config.unknown_word", f"one of {', '.join(known)}", repr(word), pointer)


def check_rank(config: JobConfig, *, head_dim: int) -> None:
    """Raise ConfigError if the rank is above the head width: the factors would outnumber the slice that they stand for."""
    rank = config.training.rank
    if rank is not None and rank > head_dim:
        most = f"at most {head_dim}, the width of a head of the base model"
        detail = _wrong("config.rank", most, rank, "/training/rank")
        raise ConfigError("training.rank is above the head width.", errors=[detail])


def _contradictions(config: JobConfig) -> Iterator[ErrorDetail]:
    """Settings that each are right and together mean nothing."""
    data, head_scorer = config.data, config.heads.scorer
    if head_scorer == "auto" and config.recipe in RECIPES:
        head_scorer = RECIPES[config.recipe].head_scorer
    slices = config.training.slices
    if head_scorer in COMBINED_SCORERS and slices != "auto" and not {"q", "k", "v"} & set(slices):
        yield ErrorDetail(
            code="config.scorer",
            message=f"The head scorer {head_scorer!r} sees q, k and v alone; training.slices has none of them.",
            pointer="/heads/scorer",
        )
    if len(set(config.controls)) < len(config.controls):
        yield ErrorDetail(
            code="config.controls", message="A control is named twice; one of each is trained.", pointer="/controls"
        )
    if config.controls and config.kind != "adapt":
        yield ErrorDetail(
            code="config.controls",
            message=f"Controls are trained beside an adapter; a job of kind {config.kind!r} trains none.",
            pointer="/controls",
        )
    scorer = _data_scorer(config)
    metric = DataConfig().metric
    if data.metric != metric and scorer != "icl":
        yield ErrorDetail(
            code="config.metric",
            message=f"The data scorer {scorer!r} judges no answers; only 'icl' has a metric.",
            pointer="/data/metric",
        )
    if data.mode == "fast" and scorer == "random":
        yield ErrorDetail(
            code="config.mode",
            message="The data scorer 'random' costs nothing: it has no fast mode.",
            pointer="/data/mode",
        )


def _data_scorer(config: JobConfig) -> str:
    """The one that is named, or the recipe's."""
    if config.data.scorer != "auto" or config.recipe not in RECIPES:
        return config.data.scorer
    return RECIPES[config.recipe].data_scorer


def _unproven(config: JobConfig, map_scorer: str | None) -> Iterator[ErrorDetail]:
    """What can be computed, and measured by a benchmark, but is not offered before its worth is shown.

    Fast mode was compared with faithful mode for FAST_MEASURED as it stands: its scorers, its slices. A head map that is named
    decides the head scorer, once it is known.
    """
    recipe, data_scorer = RECIPES.get(config.recipe), _data_scorer(config)
    if config.data.mode != "fast" or recipe is None or data_scorer == "random":
        return
    head_scorer = map_scorer or (recipe.head_scorer if config.heads.scorer == "auto" else config.heads.scorer)
    slices = recipe.slices if config.training.slices == "auto" else config.training.slices
    measured = RECIPES[FAST_MEASURED]
    if config.heads.head_map is not None and map_scorer is None:
        head_scorer = measured.head_scorer  # until the map is read
    names = (measured.head_scorer, measured.data_scorer, measured.slices)
    if (head_scorer, data_scorer, set(slices)) == (*names[:2], set(measured.slices)):
        return
    yield ErrorDetail(
        code="config.mode",
        message=f"Fast mode was compared with faithful mode for {_combination(*names)} alone (docs/results/fast_mode.md); nothing "
        f"shows yet that it is as good for {_combination(head_scorer, data_scorer, slices)}. Leave data.mode out, or leave "
        f"recipe, heads.scorer, heads.head_map, data.scorer and training.slices out (recipe {FAST_MEASURED!r}).",
        pointer="/data/mode",
    )


def _combination(head_scorer: str, data_scorer: str, slices: Collection[str]) -> str:
    return f"the head scorer {head_scorer!r}, the data scorer {data_scorer!r} and the slices {', '.join(slices)}"


def config_json(config: JobConfig) -> dict[str, Any]:
    """The JSON form of a config: the ledger, the child's pipe and plan.json hold it."""
    plain: dict[str, Any] = _plain(config)
    return plain


def _plain(value: Any) -> Any:
    # A config's values are immutable: `asdict` would copy each of them, at ten times the cost.
    if isinstance(value, tuple):
        return list(value)
    return {one.name: _plain(getattr(value, one.name)) for one in fields(value)} if is_dataclass(value) else value


def config_from_json(data: Mapping[str, Any]) -> JobConfig:
    """The config that `config_json` wrote. Absent fields take their defaults; an unknown field is our fault (TypeError)."""
    parts: dict[str, Any] = dict(data)
    nested = {"heads": HeadsConfig, "data": DataConfig, "training": TrainingConfig, "limits": Limits}
    for name, kind in nested.items():
        fields = dict(parts.pop(name, None) or {})
        if isinstance(fields.get("slices"), list):
            fields["slices"] = tuple(fields["slices"])
        parts[name] = kind(**fields)
    parts["controls"] = tuple(parts.get("controls", ()))
    return JobConfig(**parts)
