"""What every `"auto"` of a config stands for, given rows and model, and why. No torch here.

`p2d.config` says what may be asked for. Learning rate and precision are decided inside the run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from p2d.config import (
    DEFAULT_RATIO,
    FAST_ANSWER_TOKENS,
    MAX_EPOCHS,
    MIN_ROWS,
    MIN_STEPS,
    POOL_FACTOR,
    PROXY_ROWS,
    RECIPES,
    UNIFORM,
    WITHOUT_PROXY,
    DataConfig,
    HeadsConfig,
    JobConfig,
    Recipe,
    TrainingConfig,
    data_ratio,
    head_choice,
    heads_ratio,
    pool_count,
    top_count,
)
from p2d.config_checks import check_fields, fast_faults

MEASURED = "(docs/results/quality.md)"
"""Where the default recipe was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """A config without an `"auto"` that could be decided, and why each was decided so (`pointer -> reason`)."""

    config: JobConfig
    reasons: dict[str, str]
    warnings: tuple[str, ...] = ()


def resolve(
    config: JobConfig, *, rows: int, context_length: int, head_dim: int, map_scorer: str | None = None
) -> Resolution:
    """Replace every `"auto"` that rows and model decide.

    `training.learning_rate` and `training.precision` stay `"auto"`: the device decides them inside the run.

    Args:    rows: training rows of the dataset. context_length, head_dim: of the base model, in tokens and numbers.
             map_scorer: what made the head map that is given instead of finding heads; it is then the scorer of the job.
    Raises:  ConfigError if a field is wrong (see `check_fields`).
    """
    check_fields(config)
    recipe, reasons, warnings = RECIPES[config.recipe], dict[str, str](), list[str]()
    heads = _heads(config, recipe, rows, map_scorer, reasons)
    if heads.scorer == UNIFORM and heads_ratio(heads) < 1:
        warnings.append(f"The head scorer {UNIFORM!r} ranks nothing: heads.ratio keeps the first heads of the model.")
    data = _data(config, recipe, rows, map_scorer, reasons)
    kept = top_count(data_ratio(data), rows)
    if config.data.ratio != "auto" and config.kind != "identify_heads" and kept < min(MIN_ROWS, rows):
        warnings.append(
            f"data.ratio keeps {kept} of {rows} rows; below about {MIN_ROWS} rows the number of "
            "rows counts more than their purity, so expect a worse model than on all rows."
        )
    training = _training(
        config, recipe, every_head=heads_ratio(heads) == 1, kept=kept, head_dim=head_dim, reasons=reasons
    )
    if training.max_length == "auto":
        training = replace(training, max_length=context_length)
        reasons["/training/max_length"] = "the context length of the base model"
    elif training.max_length > context_length:
        training = replace(training, max_length=context_length)
        reasons["/training/max_length"] = "the base model's context is no longer than that"
    return Resolution(
        config=replace(config, heads=heads, data=data, training=training), reasons=reasons, warnings=tuple(warnings)
    )


def _because(config: JobConfig) -> str:
    return f"recipe {config.recipe!r}: {RECIPES[config.recipe].reason}"


def _heads(
    config: JobConfig, recipe: Recipe, rows: int, map_scorer: str | None, reasons: dict[str, str]
) -> HeadsConfig:
    heads = config.heads
    scorer, ratio = head_choice(config, map_scorer)
    if map_scorer is not None:
        reasons["/heads/scorer"] = "it made the head map that is given"
    elif heads.scorer == "auto" and scorer == UNIFORM:
        reasons["/heads/scorer"] = "every head is trained: there is none to choose, so nothing is paid for choosing"
    elif heads.scorer == "auto":
        reasons["/heads/scorer"] = _because(config)
    if heads.ratio == "auto":
        reasons["/heads/ratio"] = _ratio_reason(recipe, scorer, ratio, named=UNIFORM in (heads.scorer, map_scorer))
    heads = replace(heads, scorer=scorer, ratio=ratio)
    if heads.proxy_rows == "auto":
        heads = replace(heads, proxy_rows=min(PROXY_ROWS, rows))
        reasons["/heads/proxy_rows"] = (
            f"unused: the head scorer {scorer!r} trains no proxy"
            if scorer in WITHOUT_PROXY
            else f"{PROXY_ROWS}, as in the paper (ALPS)"
            if rows >= PROXY_ROWS
            else f"all {rows} training rows: {PROXY_ROWS} are the default where there are so many"
        )
    return heads


def _ratio_reason(recipe: Recipe, scorer: str, ratio: float, *, named: bool) -> str:
    if named:
        return f"all heads: the head scorer {scorer!r} ranks none before another"
    if ratio == 1:
        return f"all heads: choosing 10% of them ended at a higher held-out loss {MEASURED}"
    if recipe.heads_ratio == ratio:
        return f"{ratio:.0%}, as in the paper"
    return f"{ratio:.0%}, as in the paper: all heads are the default only where nothing asks for a choice of them {MEASURED}"


def _data(config: JobConfig, recipe: Recipe, rows: int, map_scorer: str | None, reasons: dict[str, str]) -> DataConfig:
    data = config.data
    if data.scorer == "auto":
        data, reasons["/data/scorer"] = replace(data, scorer=recipe.data_scorer), _because(config)
    if data.ratio == "auto":
        kept = min(rows, max(top_count(recipe.data_ratio, rows), MIN_ROWS))
        data = replace(data, ratio=kept / rows)
        reasons["/data/ratio"] = (
            f"all {rows} rows: {MIN_ROWS} are the fewest that are kept where there are so many"
            if kept == rows
            else f"{recipe.data_ratio:.0%} of {rows} rows, but at least {MIN_ROWS}: held-out loss falls "
            f"with every further row that is not bad, up to all of them {MEASURED}"
            if recipe.data_ratio > DEFAULT_RATIO
            else f"{recipe.data_ratio:.0%} of {rows} rows, as in the paper, but at least {MIN_ROWS} where there are so many"
        )
    if data.mode == "fast":
        reasons["/data/mode"] = (
            f"as asked: rows are drawn into a pool of {POOL_FACTOR} times those that are kept, and only these are scored "
            "(docs/decisions/0012); it was worse than faithful mode on a half-bad pool, level with it on a clean one "
            "(docs/results/fast_mode.md)"
        )
    elif data.mode == "auto":
        mode, reasons["/data/mode"] = recipe.mode, _because(config)
        if recipe.mode == "fast":
            every = pool_count(replace(data, mode="fast"), rows) == rows
            proven = data.scorer == recipe.data_scorer and not list(fast_faults(config, map_scorer))
            mode = "fast" if every and proven else "faithful"
            reasons["/data/mode"] = (
                f"all rows are scored even so, and of their answers {FAST_ANSWER_TOKENS} tokens are read {MEASURED}"
                if mode == "fast"
                else f"fast mode was not measured with what is asked for {MEASURED}"
                if every
                else f"fast mode would score a part of the rows alone: {POOL_FACTOR} times those that are kept"
            )
        data = replace(data, mode=mode)
    return data


def _training(
    config: JobConfig, recipe: Recipe, *, every_head: bool, kept: int, head_dim: int, reasons: dict[str, str]
) -> TrainingConfig:
    training = config.training
    if training.slices == "auto":
        training, reasons["/training/slices"] = replace(training, slices=recipe.slices), _because(config)
    if training.rank == "auto":
        rank, reasons["/training/rank"] = None, "whole slices, as published"
        if every_head and recipe.rank is not None:
            rank = min(recipe.rank, head_dim)
            reasons["/training/rank"] = (
                f"{rank} in every head: jobs end at a lower held-out loss than with whole slices of the best 10% {MEASURED}"
                if rank == recipe.rank
                else f"{rank}, the width of a head; {recipe.rank} where heads are wider {MEASURED}"
            )
        training = replace(training, rank=rank)
    if training.epochs == "auto":
        steps = -(-kept // training.batch_size)
        epochs = min(MAX_EPOCHS, max(recipe.epochs, -(-MIN_STEPS // steps)))
        reasons["/training/epochs"] = (
            _because(config)
            if recipe.epochs == MAX_EPOCHS
            else f"{epochs}: more rows once are worth more than fewer rows twice at the same cost, in all four pools {MEASURED}"
            if epochs == recipe.epochs
            else f"{epochs}: {kept} rows once are {steps} optimizer steps, and {MIN_STEPS} are wanted, in at most {MAX_EPOCHS} "
            "epochs (a guess)"
        )
        training = replace(training, epochs=epochs)
    return training
