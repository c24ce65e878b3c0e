"""What a job asks for: frozen dataclasses, one per stage, used alike by HTTP, command line and Python. No torch here.

Users write `"auto"` where they want the service to decide; `p2d.resolution` replaces every `"auto"` that can be decided before
the run and says why. What may be asked for is `p2d.config_checks`. Where rows, models and files come from is not this file's
business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from typing import Any, Literal

Auto = Literal["auto"]
Kind = Literal["identify_heads", "select_data", "adapt"]
Precision = Literal["auto", "fp32", "bf16"]
Projection = Literal["q", "k", "v", "o"]
Control = Literal["random_heads", "random_data", "lora"]
Mode = Literal["faithful", "fast"]
AskedMode = Literal[Auto, Mode]
Reuse = Literal["auto", "never"]
Metric = Literal["log_likelihood", "token_accuracy", "exact_match", "rouge_l"]

HEAD_SCORERS = {
    "attribution": "p2d.scorers.attribution:attribution",
    "pad": "p2d.scorers.pad:pad",
    "kl": "p2d.scorers.kl:kl",
    "cosine": "p2d.scorers.cosine:cosine",
    "shift": "p2d.scorers.shift:shift",
    "relative_shift": "p2d.scorers.relative_shift:relative_shift",
    "uniform": "p2d.scorers.uniform:uniform",
    "random": "p2d.scorers.random:random",  # control arm, never a default
}
"""Head scorers: name -> function; one file each in p2d/scorers/."""

UNIFORM = "uniform"
"""Scorer that ranks nothing, of heads for jobs that train every one, of rows where every one is to be kept."""

WITHOUT_PROXY = frozenset({UNIFORM, "random"})
"""Head scorers that look at no trained weights: no proxy is trained for them."""

COMBINED_SCORERS = frozenset({"pad", "kl", "cosine"})
"""Head scorers that look at `W_q W_k^T W_v` alone: a proxy that trains none of q, k and v moves nothing that they see."""

DATA_SCORERS = {
    "alignment": "p2d.responses.alignment:alignment",
    "alignment_likelihood": "p2d.responses.alignment_likelihood:alignment_likelihood",
    "alignment_information": "p2d.responses.alignment_information:alignment_information",
    "information": "p2d.responses.information:information",
    "icl": "p2d.responses.icl:icl",
    "lexical": "p2d.responses.lexical:lexical",
    "uniform": "p2d.responses.uniform:uniform",
    "random": "p2d.responses.random:random",  # control arm, never a default
}
"""Data scorers: name -> function that fills a response matrix; one file each in p2d/responses/."""


LEXICAL = "lexical"
"""Data scorer of words alone: the default where no validation dataset vouches for a choice."""

RANKING_NOTHING = frozenset({UNIFORM, "random"})
"""Data scorers that look at no row; rows that repeat others are not looked for either."""

WITHOUT_RESPONSES = RANKING_NOTHING | {LEXICAL}
"""Data scorers without a pass over the model."""


DEFAULT_RATIO = 0.10
"""Share of heads kept by default where heads are chosen, and of rows in recipe `paper`: the paper's 10 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The defaults that a recipe name stands for."""

    head_scorer: str
    data_scorer: str
    slices: tuple[Projection, ...]
    heads_ratio: float
    """Of a job that leaves its heads to the service (`head_choice`)."""
    rank: int | None
    """Of the update inside each slice, where all heads are trained; a head's slices are trained whole where heads are chosen."""
    data_ratio: float
    guide_decides: bool
    """Whether a validation dataset decides how many rows are kept, instead of `data_ratio`."""
    mode: Mode
    """Of a job whose rows are all scored even in fast mode."""
    epochs: int
    """Where these make MIN_STEPS optimizer steps."""
    reason: str


RECIPES = {
    "default": Recipe(
        head_scorer="attribution",
        data_scorer="alignment_likelihood",
        slices=("v", "o"),
        heads_ratio=1.0,
        rank=8,
        data_ratio=0.5,
        guide_decides=True,
        mode="fast",
        epochs=1,
        reason="best of our own measurements (docs/LOG.md)",
    ),
    "paper": Recipe(
        head_scorer="pad",
        data_scorer="icl",
        slices=("q", "k", "v"),
        heads_ratio=DEFAULT_RATIO,
        rank=None,
        data_ratio=DEFAULT_RATIO,
        guide_decides=False,
        mode="faithful",
        epochs=3,
        reason="as published (arXiv 2605.21558, 2505.18799, 2505.12212)",
    ),
}

MIN_ROWS = 200
"""Fewest rows that an automatic data ratio leaves, unless the guide decides it. A guess: by the learning curve as measured no
number is enough, for held-out loss falls with every further row that is not bad, up to all of them (docs/results/quality.md)."""

MIN_STEPS = 30
"""Optimizer steps that a training has by default: with fewer, rows are seen more than once. A second pass lowered the held-out loss
after 15 steps of 4 rows, and not after 30 or 58 (docs/decisions/0035)."""

MAX_EPOCHS = 3
"""Most passes over the kept rows by default. A guess."""

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

FEWEST_LOOK, MOST_LOOK = 32, 64
"""Rows of a sample by which a shard is judged to be like the guide, or not (docs/decisions/0034). More would tell little more:
with 32 guide rows the standard error of the statistic, `sqrt((m + n + 1) / (12 m n))`, is 0.073 with 32 rows, 0.063 with 64, 0.051
with 2,000."""
LOOK_SHARE = 1 / 8
"""Of the shard, between these bounds: where the sample errs the whole shard is scored, so a small one needs but a small sample
(docs/decisions/0038)."""

LOOK_APART = 8
"""Rows that are scored beside them, of those that do not read like the guide's, where these are many (docs/decisions/0038)."""
FEWEST_LEFT = 16
"""Fewest rows of a sample that vouch for what reads like them. The statistic's standard error is 0.09 then; of 8 it is 0.12."""

UPPER_THIRD = 2 / 3
"""Depth at which `alignment` begins to read gradients. By measurement: the upper third of the layers tells clean from bad
rows as well as all of them (docs/decisions/0012)."""

PROXY_ROWS = 100
"""Rows of a proxy by default. ALPS uses 100; 25 find 17 of the same 27 heads (docs/LOG.md)."""

MIN_PROXY_ROWS = 16
"""Fewest rows of which a proxy is made by default: two halves of two optimizer steps each. A guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsConfig:
    """Stage 1: which heads count as task-sensitive."""

    scorer: str = "auto"
    """Name in HEAD_SCORERS; `auto` = `uniform` where every head is trained, so that there is none to choose, else the recipe's."""
    ratio: float | Auto = "auto"
    """Share of query heads kept, (0, 1]. A view on the head map: the map itself ranks all heads. `auto` = the recipe's where
    the service chooses the heads, else 10 %; all of a head map that ranks none."""
    proxy_rows: int | Auto = "auto"
    """Rows of the proxy (two half-proxies of half as many). `auto` = PROXY_ROWS, or all training rows where there are fewer."""
    head_map: str | None = None
    """Id of an earlier head map of the same base model: stage 1 is then skipped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Stage 2: which rows the chosen heads respond to."""

    scorer: str = "auto"
    """Name in DATA_SCORERS; `auto` = `lexical` where nothing vouches for a choice, see `ratio`, else the recipe's."""
    ratio: float | Auto = "auto"
    """Share of rows kept, (0, 1]. `auto` = the recipe's, half of them or 10 %, but never fewer than MIN_ROWS rows. In recipe
    `default` a validation dataset decides instead, inside the run: as many as there are like its rows (`p2d.selection`); without
    one, where nothing asks for a choice, all are kept whose answers go with their prompts (`p2d.responses.lexical`)."""
    mode: AskedMode = "auto"
    """`fast` = a fraction of the cost: fewer rows are scored, and of long answers the beginning. `auto` = the recipe's where
    that leaves no row unscored, else `faithful`."""
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
    rank: int | Auto | None = "auto"
    """Rank of the update inside each slice, at most the head width; None = the full slice is trained. `auto` = the recipe's
    where every head is trained, else None."""
    epochs: int | Auto = "auto"
    """Passes over the selected rows. `auto` = the recipe's, or as many as make MIN_STEPS steps, at most MAX_EPOCHS."""
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
    assert data.mode != "auto", "resolve the config first"
    if data.mode == "faithful":
        return rows
    return min(rows, math.ceil(POOL_FACTOR * most_kept(data, rows)))


def most_kept(data: DataConfig, rows: int) -> int:
    """How many of `rows` rows the selection keeps at most, by a resolved config: `auto` may turn out to be all of them."""
    return rows if data.ratio == "auto" else top_count(data.ratio, rows)


def samples_first(config: JobConfig) -> bool:
    """Whether a sample of the rows may be all that is scored, of a resolved config: a job that asks for scores gets them all."""
    return config.data.ratio == "auto" and config.kind == "adapt" and config.data.scorer in RATING_SCORERS


def look_count(rows: int) -> int:
    """How many of a shard's rows are sampled to see whether the others need scores; all where that would spare hardly any."""
    if rows <= FEWEST_LOOK + LOOK_APART:
        return rows
    return min(MOST_LOOK, max(FEWEST_LOOK, int(rows * LOOK_SHARE)))


def alignment_layers(layers: int) -> range:
    """Layers that `alignment` scores: the upper third, so that backward stops there."""
    return range(min(round(UPPER_THIRD * layers), layers - 1), layers)


def rates_guide(data_scorer: str, guide_rows: int) -> bool:
    """Whether the scorer rates the guide's rows like those of the pool."""
    return data_scorer in RATING_SCORERS and guide_rows >= MIN_GUIDE


def alignment_projections(slices: tuple[Projection, ...]) -> tuple[Projection, ...]:
    """Projections that `alignment` reads: v alone where it is trained, which is as telling as all; else the trained ones."""
    return ("v",) if "v" in slices else slices


def icl_demos(data: DataConfig, rows: int) -> int:
    """Most rows that a group of `icl` shows when `rows` rows are scored.

    In fast mode up to FAST_DEMOS, but no more than leave FAST_SLOT_ROWS rows for each slot: a row's mass is divided by the
    mean of its slot, which a few rows do not tell.
    """
    assert data.mode != "auto", "resolve the config first"
    if data.mode == "faithful":
        return data.n_demos
    return max(data.n_demos, min(FAST_DEMOS, rows // FAST_SLOT_ROWS))


def head_choice(config: JobConfig, map_scorer: str | None = None) -> tuple[str, float]:
    """Scorer and ratio of the heads: neither rows nor model decide them.

    All heads are trained by default only where nothing asks for a choice: no scorer, no head map, no control of random heads.

    Args:    map_scorer: what made the head map that is given, once it is read.
    """
    # A recipe that is unknown is refused, but with whatever else is wrong.
    recipe, heads = RECIPES.get(config.recipe, RECIPES["default"]), config.heads
    scorer = map_scorer or heads.scorer
    free = scorer == "auto" and heads.head_map is None and config.kind != "identify_heads"
    if heads.ratio != "auto":
        ratio = heads.ratio
    elif scorer == UNIFORM:
        ratio = 1.0
    else:
        ratio = recipe.heads_ratio if free and "random_heads" not in config.controls else DEFAULT_RATIO
    if scorer == "auto":
        scorer = UNIFORM if free and ratio == 1 else recipe.head_scorer
    return scorer, ratio


def heads_ratio(heads: HeadsConfig) -> float:
    """Share of heads kept, of a resolved config."""
    assert heads.ratio != "auto", "resolve the config first"
    return heads.ratio


def rank_of(training: TrainingConfig) -> int | None:
    """Rank of the update inside each slice, of a resolved config; None = whole slices."""
    assert training.rank != "auto", "resolve the config first"
    return training.rank


def epochs_of(training: TrainingConfig) -> int:
    """Passes over the selected rows, of a resolved config."""
    assert training.epochs != "auto", "resolve the config first"
    return training.epochs


def least_proxy_rows(config: JobConfig) -> int:
    """Fewest training rows with which stage 1 can be done as asked; 0 where it trains no proxy or a head map is given."""
    if config.heads.head_map is not None or head_choice(config)[0] in WITHOUT_PROXY:
        return 0
    return MIN_PROXY_ROWS if config.heads.proxy_rows == "auto" else config.heads.proxy_rows


def proxy_count(heads: HeadsConfig) -> int:
    """Rows of the proxy, of a resolved config; 0 for scorers that need none."""
    if heads.scorer in WITHOUT_PROXY:
        return 0
    assert heads.proxy_rows != "auto", "resolve the config first"
    return heads.proxy_rows


def proxy_guide_rows(proxy_rows: int, guide_rows: int) -> int:
    """How many held-out rows a proxy is judged on: a third of its own rows, but at least 16 where there are so many.

    `attribution` passes them up to five times, so all 32 would cost more than a small proxy itself.
    """
    return min(guide_rows, max(16, math.ceil(proxy_rows / 3)))


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
