"""What every `"auto"` of a config stands for, given rows and model, and why. No torch here.

`p2d.config` says what may be asked for. Learning rate and precision are decided inside the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from p2d.config import (
    DEFAULT_RATIO,
    FAST_ANSWER_TOKENS,
    LEXICAL,
    MAX_EPOCHS,
    MIN_ROWS,
    MIN_STEPS,
    POOL_FACTOR,
    PROXY_ROWS,
    RATING_SCORERS,
    RECIPES,
    UNIFORM,
    WITHOUT_PROXY,
    DataConfig,
    HeadsConfig,
    JobConfig,
    Recipe,
    TrainingConfig,
    head_choice,
    heads_ratio,
    most_kept,
    pool_count,
    rates_guide,
    top_count,
)
from p2d.config_checks import check_fields, fast_faults

MEASURED = "(docs/results/quality.md)"
"""Where the default recipe was."""

SEARCHED_RATE = "the best of a short search on held-out rows"
"""Why the learning rate is what it is where it was left to the run; known once the run has found it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """A config without an `"auto"` that could be decided, and why each was decided so (`pointer -> reason`)."""

    config: JobConfig
    reasons: dict[str, str]
    warnings: tuple[str, ...] = ()


def resolve(
    config: JobConfig,
    *,
    rows: int,
    context_length: int,
    head_dim: int,
    map_scorer: str | None = None,
    validation_guide: int = 0,
) -> Resolution:
    """Replace every `"auto"` that rows and model decide.

    `training.learning_rate` and `training.precision` stay `"auto"`: the device decides them inside the run. So does `data.ratio`
    where guide or words decide it, and everything else then counts with all rows.

    Args:    rows: training rows of the dataset. context_length, head_dim: of the base model, in tokens and numbers.
             map_scorer: what made the head map that is given instead of finding heads; it is then the scorer of the job.
             validation_guide: guide rows out of a validation dataset; 0 where they are held out of the dataset itself.
    Raises:  ConfigError if a field is wrong (see `check_fields`).
    """
    check_fields(config)
    recipe, reasons, warnings = RECIPES[config.recipe], dict[str, str](), list[str]()
    heads = _heads(config, recipe, rows, map_scorer, reasons)
    if heads.scorer == UNIFORM and heads_ratio(heads) < 1:
        warnings.append(f"The head scorer {UNIFORM!r} ranks nothing: heads.ratio keeps the first heads of the model.")
    data = _data(config, recipe, rows, map_scorer, validation_guide, reasons)
    kept = most_kept(data, rows)
    if config.kind != "identify_heads":
        warnings += _about_rows(config, data, rows, kept, validation_guide)
    warnings += _no_comparison(config, heads, data.ratio != "auto" and kept == rows)
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


def _about_rows(config: JobConfig, data: DataConfig, rows: int, kept: int, validation_guide: int) -> Iterator[str]:
    """What the choice of rows makes doubtful. kept: the most."""
    if data.scorer == UNIFORM and kept < rows:
        yield f"The data scorer {UNIFORM!r} ranks nothing: data.ratio keeps the first rows of the dataset."
    least, enough = top_count(DEFAULT_RATIO, rows), min(MIN_ROWS, rows)
    few = f"below about {MIN_ROWS} rows the number of rows counts more than their purity"
    if data.ratio == "auto" and data.scorer != LEXICAL and least < enough:
        yield f"data.ratio keeps as few as {least} of {rows} rows where no more are like the validation dataset's; {few}."
    elif config.data.ratio != "auto" and kept < enough:
        yield f"data.ratio keeps {kept} of {rows} rows; {few}, so expect a worse model than on all rows."
    if config.data.selection is None and data.scorer in RATING_SCORERS and kept < rows and not validation_guide:
        yield (
            "Rows held out of the dataset itself guide the choice of rows: they are as clean as it is. "
            "Send a validation dataset of rows that you have checked."
        )


def _no_comparison(config: JobConfig, heads: HeadsConfig, every_row: bool) -> Iterator[str]:
    """Controls that draw what the job has already. Rows of a selection that is given are not counted here."""
    drawn = (
        ("random_heads", heads_ratio(heads) == 1, "all heads", "heads.ratio"),
        ("random_data", every_row and config.data.selection is None, "all rows", "data.ratio"),
    )
    for control, same, what, field in drawn:
        if same and control in config.controls:
            yield (
                f"The job trains {what}, and so does the control {control!r}: it costs a training and compares nothing. "
                f"Leave it out, or set {field} below 1."
            )


def settled(
    config: JobConfig,
    reasons: Mapping[str, str],
    *,
    kept: int | None = None,
    rows: int = 0,
    learning_rate: float | None = None,
) -> tuple[JobConfig, dict[str, str]]:
    """A resolved config, and its reasons, with what the run has found of that which was left to it.

    Where guide or words decided the ratio it is what it came to, and epochs that were left to the service are as many as that asks
    for.

    Args:    kept: of the `rows` training rows, once the selection is made. learning_rate: once it was searched.
    """
    found, training, data = dict(reasons), config.training, config.data
    if kept is not None and data.ratio == "auto":
        data = replace(data, ratio=kept / rows)
        found["/data/ratio"] = (
            "all rows but those whose answer goes better with other prompts or is its prompt once more, and those that nearly "
            "repeat another"
            if data.scorer == LEXICAL
            else "as many rows as seemed to be like those of the validation dataset"
        )
        if "/training/epochs" in reasons:
            training = _epochs(config, replace(training, epochs="auto"), RECIPES[config.recipe], kept, found)
    if learning_rate is not None and training.learning_rate == "auto":
        training = replace(training, learning_rate=learning_rate)
        found["/training/learning_rate"] = SEARCHED_RATE
    return replace(config, data=data, training=training), found


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


def _data(
    config: JobConfig,
    recipe: Recipe,
    rows: int,
    map_scorer: str | None,
    validation_guide: int,
    reasons: dict[str, str],
) -> DataConfig:
    data = config.data
    if data.scorer == UNIFORM:
        return _uniform(data, reasons)
    if (data.scorer == LEXICAL and data.selection is None) or _nothing_vouches(config, recipe, validation_guide):
        return _lexical(data, reasons)
    if data.scorer == "auto":
        data, reasons["/data/scorer"] = replace(data, scorer=recipe.data_scorer), _because(config)
    guided = recipe.guide_decides and rates_guide(data.scorer, validation_guide) and data.selection is None
    if data.ratio == "auto" and guided:
        reasons["/data/ratio"] = (
            f"as many rows as seem to be like those of the validation dataset, at least {DEFAULT_RATIO:.0%}"
            + (
                "; if a random sample does, or those of it that read like it, no others are scored, and all such are kept"
                " (docs/decisions/0034, 0037, 0038)"
                if config.kind == "adapt"
                else " (docs/decisions/0034)"
            )
        )
    elif data.ratio == "auto":
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
    if data.mode == "fast" and data.ratio == "auto":
        reasons["/data/mode"] = f"as asked: of answers {FAST_ANSWER_TOKENS} tokens are read"
    elif data.mode == "fast":
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


def _uniform(data: DataConfig, reasons: dict[str, str]) -> DataConfig:
    """Every row, unless a ratio is given."""
    if data.ratio == "auto":
        reasons["/data/ratio"] = f"all rows: the data scorer {UNIFORM!r} ranks none before another"
        data = replace(data, ratio=1.0)
    if data.mode == "auto":
        reasons["/data/mode"] = f"unused: the data scorer {UNIFORM!r} looks at no row"
    return replace(data, mode="faithful")


def _lexical(data: DataConfig, reasons: dict[str, str]) -> DataConfig:
    """Rows whose answers go with their prompts, unless a ratio is given."""
    if data.ratio == "auto":
        reasons["/data/ratio"] = (
            "all rows but those whose answer goes better with other prompts, or is its prompt once more, as far as words tell "
            "(docs/decisions/0039)"
        )
    if data.scorer == "auto":
        reasons["/data/scorer"] = (
            "no validation dataset of 20 rows or more vouches for a choice by what a model makes of the rows; words alone cost "
            f"nothing, and to choose half of the rows ended higher on clean data {MEASURED}"
        )
    if data.mode == "auto":
        reasons["/data/mode"] = f"unused: the data scorer {LEXICAL!r} asks no model"
    return replace(data, scorer=LEXICAL, mode="faithful")


def _nothing_vouches(config: JobConfig, recipe: Recipe, validation_guide: int) -> bool:
    """Whether nothing vouches for a choice of rows, and nothing asks for one: no setting of it, no control of random rows."""
    data = config.data
    asked = {data.scorer, data.ratio, data.mode} != {"auto"} or data.selection is not None
    return (
        recipe.guide_decides
        and config.kind == "adapt"
        and not asked
        and "random_data" not in config.controls
        and not rates_guide(recipe.data_scorer, validation_guide)
    )


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
    return _epochs(config, training, recipe, kept, reasons)


def _epochs(
    config: JobConfig, training: TrainingConfig, recipe: Recipe, kept: int, reasons: dict[str, str]
) -> TrainingConfig:
    if training.epochs == "auto":
        steps = -(-kept // training.batch_size)
        epochs = min(MAX_EPOCHS, max(recipe.epochs, -(-MIN_STEPS // steps)))
        reasons["/training/epochs"] = (
            _because(config)
            if recipe.epochs == MAX_EPOCHS
            else f"{epochs}: more rows once are worth more than fewer rows twice at the same cost, in all four pools {MEASURED}"
            if epochs == recipe.epochs
            else f"{epochs}: {kept} rows once are {steps} optimizer steps, and {MIN_STEPS} are wanted, in at most {MAX_EPOCHS} "
            "epochs (docs/decisions/0035)"
        )
        training = replace(training, epochs=epochs)
    return training
