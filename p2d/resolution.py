"""What every `"auto"` of a config stands for, given rows and model, and why. No torch here.

`p2d.config` says what may be asked for. Learning rate and precision are decided inside the run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from p2d.config import (
    DEFAULT_RATIO,
    MIN_ROWS,
    POOL_FACTOR,
    PROXY_ROWS,
    RECIPES,
    JobConfig,
    check_fields,
    top_count,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """A config without an `"auto"` that could be decided, and why each was decided so (`pointer -> reason`)."""

    config: JobConfig
    reasons: dict[str, str]
    warnings: tuple[str, ...] = ()


def resolve(config: JobConfig, *, rows: int, context_length: int, map_scorer: str | None = None) -> Resolution:
    """Replace every `"auto"` that rows and model decide.

    `training.learning_rate` and `training.precision` stay `"auto"`: the device decides them inside the run.

    Args:    rows: training rows of the dataset. context_length: of the base model, in tokens.
             map_scorer: what made the head map that is given instead of finding heads; it is then the scorer of the job.
    Raises:  ConfigError if a field is wrong (see `check_fields`).
    """
    check_fields(config)
    recipe, heads, data, training = RECIPES[config.recipe], config.heads, config.data, config.training
    because = f"recipe {config.recipe!r}: {recipe.reason}"
    reasons: dict[str, str] = {}
    warnings: list[str] = []
    if map_scorer is not None:
        heads, reasons["/heads/scorer"] = replace(heads, scorer=map_scorer), "it made the head map that is given"
    elif heads.scorer == "auto":
        heads, reasons["/heads/scorer"] = replace(heads, scorer=recipe.head_scorer), because
    if data.scorer == "auto":
        data, reasons["/data/scorer"] = replace(data, scorer=recipe.data_scorer), because
    if training.slices == "auto":
        training, reasons["/training/slices"] = replace(training, slices=recipe.slices), because
    if heads.proxy_rows == "auto":
        heads = replace(heads, proxy_rows=min(PROXY_ROWS, rows))
        reasons["/heads/proxy_rows"] = (
            f"{PROXY_ROWS}, as in the paper (ALPS)"
            if rows >= PROXY_ROWS
            else f"all {rows} training rows: {PROXY_ROWS} are the default where there are so many"
        )
    if data.mode == "fast":
        reasons["/data/mode"] = (
            f"as asked: rows are drawn into a pool of {POOL_FACTOR} times those that are kept, and only these are scored "
            "(docs/decisions/0012); it was worse than faithful mode on a half-bad pool, level with it on a clean one "
            "(docs/results/fast_mode.md)"
        )
    if training.max_length == "auto":
        training = replace(training, max_length=context_length)
        reasons["/training/max_length"] = "the context length of the base model"
    elif training.max_length > context_length:
        training = replace(training, max_length=context_length)
        reasons["/training/max_length"] = "the base model's context is no longer than that"
    if data.ratio == "auto":
        kept = min(rows, max(top_count(DEFAULT_RATIO, rows), MIN_ROWS))
        data = replace(data, ratio=kept / rows)
        reasons["/data/ratio"] = (
            f"{DEFAULT_RATIO:.0%} of {rows} rows, but at least {MIN_ROWS} rows where there are so many"
        )
    elif config.kind != "identify_heads" and top_count(data.ratio, rows) < min(MIN_ROWS, rows):
        warnings.append(
            f"data.ratio keeps {top_count(data.ratio, rows)} of {rows} rows; below about {MIN_ROWS} rows the number of "
            "rows counts more than their purity, so expect a worse model than on all rows."
        )
    return Resolution(
        config=replace(config, heads=heads, data=data, training=training), reasons=reasons, warnings=tuple(warnings)
    )
