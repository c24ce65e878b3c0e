"""Which jobs may be asked for: `check` names every field that is wrong at once. No torch here.

What the fields mean is `p2d.config`, of which types they are `p2d.config_types`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, get_args

from p2d.config import (
    COMBINED_SCORERS,
    DATA_SCORERS,
    FAST_MEASURED,
    HEAD_SCORERS,
    RECIPES,
    UNIFORM,
    WITHOUT_RESPONSES,
    AskedMode,
    Control,
    DataConfig,
    JobConfig,
    Kind,
    Limits,
    Metric,
    Precision,
    Projection,
    Reuse,
    head_choice,
)
from p2d.config_types import wrong_types
from p2d.errors import ConfigError, ErrorDetail, UnknownName
from p2d.registry import check_name
from p2d.wording import counted

OR_AUTO, AUTO_OR_NULL = ", or 'auto'", ", 'auto' or null"
"""What else than a number a field may be, behind what was expected; null is None in Python."""


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
            yield _wrong("config.ratio", f"a ratio above 0 and at most 1{OR_AUTO}", ratio, pointer)
    at_least = [
        ("/heads/proxy_rows", heads.proxy_rows, 4, OR_AUTO),  # two half-proxies of two rows each
        ("/data/n_demos", data.n_demos, 1, ""),
        ("/data/n_queries", data.n_queries, 1, ""),
        ("/training/rank", training.rank, 1, AUTO_OR_NULL),
        ("/training/epochs", training.epochs, 1, OR_AUTO),
        ("/training/batch_size", training.batch_size, 1, ""),
        ("/training/max_length", training.max_length, 8, OR_AUTO),
        ("/training/seed", training.seed, 0, ""),
        ("/limits/max_seconds", config.limits.max_seconds, 1, ", or null"),
        ("/limits/max_gpu_seconds", config.limits.max_gpu_seconds, 1, ", or null"),
    ]
    for pointer, value, least, instead in at_least:
        if isinstance(value, int) and value < least:
            yield _wrong("config.too_small", f"at least {least}{instead}", value, pointer)
    yield from _contradictions(config)
    if not _is_moment(config.limits):
        got = repr(config.limits.deadline)
        yield _wrong("config.deadline", "an RFC 3339 time, with its offset", got, "/limits/deadline")
    rate = training.learning_rate
    if rate != "auto" and not (math.isfinite(rate) and rate > 0):
        yield _wrong("config.learning_rate", f"a positive number{OR_AUTO}", rate, "/training/learning_rate")
    if training.slices != "auto" and (not training.slices or len(set(training.slices)) < len(training.slices)):
        yield ErrorDetail(
            code="config.slices",
            message=f"Expected one or more of q, k, v, o, each once{OR_AUTO}.",
            pointer="/training/slices",
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
        ("/data/mode", AskedMode, [config.data.mode]),
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
    """Raise ConfigError if a rank is asked for above the head width: the factors would outnumber the slice that they stand for."""
    rank = config.training.rank
    if isinstance(rank, int) and rank > head_dim:
        most = f"at most {head_dim} (the width of a head of the base model){AUTO_OR_NULL}"
        detail = _wrong("config.rank", most, rank, "/training/rank")
        raise ConfigError("training.rank is above the head width.", errors=[detail])


def _contradictions(config: JobConfig) -> Iterator[ErrorDetail]:
    """Settings that each are right and together mean nothing."""
    data, head_scorer = config.data, head_choice(config)[0]
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
    if data.mode == "fast" and scorer in WITHOUT_RESPONSES:
        yield ErrorDetail(
            code="config.mode",
            message=f"The data scorer {scorer!r} costs nothing: it has no fast mode.",
            pointer="/data/mode",
        )


def _data_scorer(config: JobConfig) -> str:
    """The one that is named, or the recipe's."""
    if config.data.scorer != "auto" or config.recipe not in RECIPES:
        return config.data.scorer
    return RECIPES[config.recipe].data_scorer


def _unproven(config: JobConfig, map_scorer: str | None) -> Iterator[ErrorDetail]:
    """What can be computed, and measured by a benchmark, but is not offered before its worth is shown.

    Fast mode was compared with faithful mode for FAST_MEASURED with heads by its scorer, and measured with all heads: with its
    data scorer, its slices. A head map that is named decides the head scorer, once it is known.
    """
    if config.data.mode == "fast":
        yield from fast_faults(config, map_scorer)


def fast_faults(config: JobConfig, map_scorer: str | None) -> Iterator[ErrorDetail]:
    """What speaks against fast mode, if it were asked for."""
    recipe, data_scorer = RECIPES.get(config.recipe), _data_scorer(config)
    if recipe is None or data_scorer in WITHOUT_RESPONSES:
        return
    head_scorer = head_choice(config, map_scorer)[0]
    slices = recipe.slices if config.training.slices == "auto" else config.training.slices
    measured = RECIPES[FAST_MEASURED]
    if config.heads.head_map is not None and map_scorer is None:
        head_scorer = measured.head_scorer  # until the map is read
    known = head_scorer in (measured.head_scorer, UNIFORM)
    if known and (data_scorer, set(slices)) == (measured.data_scorer, set(measured.slices)):
        return
    names = (measured.head_scorer, measured.data_scorer, measured.slices)
    yield ErrorDetail(
        code="config.mode",
        message=f"Fast mode was compared with faithful mode for {_combination(*names)} alone (docs/results/fast_mode.md); nothing "
        f"shows yet that it is as good for {_combination(head_scorer, data_scorer, slices)}. Leave data.mode out, or leave "
        f"recipe, heads.scorer, heads.head_map, data.scorer and training.slices out (recipe {FAST_MEASURED!r}).",
        pointer="/data/mode",
    )


def _combination(head_scorer: str, data_scorer: str, slices: Collection[str]) -> str:
    return f"the head scorer {head_scorer!r}, the data scorer {data_scorer!r} and the slices {', '.join(slices)}"
