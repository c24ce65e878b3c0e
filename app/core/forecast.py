"""What a job would take, told before it is made: seconds by step, bytes, the projected AER, and what does not fit. Makes nothing.

The arithmetic is p2d.estimate's. What it needs and only a run can tell, tokens by row and the speed of the machine, is taken from
earlier jobs of the ledger; where there is none, it is guessed, said so, and the interval is wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from app.core.foresight import Interval, stretched
from app.core.plan import GUESSED_S
from app.core.submit import Content, resolution_of
from app.db.engine import Connection
from app.db.estimates import Error, MeasuredSpeed, measured_rows, measured_speed, past_errors
from p2d.arch.spec import every_head
from p2d.config import JobConfig, Resolution, proxy_count, top_count
from p2d.estimate import EFFICIENCY, Speed, estimate_seconds
from p2d.flops import full_fine_tuning, lora_training, typical_work
from p2d.model_info import ModelInfo
from p2d.pipeline import PlannedStep, plan_steps
from p2d.plans import GUIDE_ROWS, RowCounts

BYTES_PER_TOKEN = 3.5
"""Of text that no job has counted yet. A guess: SmolLM2 has 2.7 on GSM8K, which is full of digits; prose has above 4."""

ROW_BYTES = 40
"""What the normalised form of a row has beside its text. Measured on GSM8K."""

TEMPLATE_TOKENS = 30
"""What a chat template puts around a row. Measured: 31 of SmolLM2's."""

ANSWER_SHARE = 0.5
"""Tokens of the answer, of all. A guess; 0.54 on GSM8K."""

FLOP_PER_S = 1e11
"""Of a service on which nothing has run yet. A guess, for two CPU cores."""

WIDE = Error(p10=0.15, p50=1.0, p90=4.0, runs=0)
"""Error of an estimate in which tokens or speed are guessed. A guess: two CPU cores may have seven times FLOP_PER_S (AMX, bf16)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepForecast:
    """One step, all its shards together."""

    step: str
    shards: int
    seconds: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a job would take."""

    resolution: Resolution
    steps: tuple[StepForecast, ...]
    seconds: Interval
    rows: Mapping[str, int]
    """`train`, `guide`, `evaluation`; `proxy` and `kept` of the first."""
    tokens: Mapping[str, int]
    """`train`, `guide` and `evaluation`."""
    size_bytes: Mapping[str, int]
    """The largest files that it would store, at most."""
    misfits: tuple[str, ...]
    full_s: float | None
    lora_s: float | None
    aer: float | None
    aer_lora: float | None
    basis: Mapping[str, str]


def forecast(
    conn: Connection,
    config: JobConfig,
    model: ModelInfo,
    dataset: Content,
    validation: Content | None,
    *,
    shard_rows: int,
) -> Forecast:
    """Foresee a job that was checked (`app.core.submit.refusals`); writes nothing."""
    found = resolution_of(config, model, dataset.rows, validation.rows if validation else None)
    config = found.resolution.config
    counted = measured_rows(conn, content_hash=dataset.content_hash, model_digest=model.digest)
    speed = measured_speed(conn, model_digest=model.digest)
    judging = min(GUIDE_ROWS, 2 * found.held_out // 5)
    counts = {
        "train": _counts(found.train_rows, dataset, counted),
        "guide": _counts(judging, dataset, counted),
        "evaluation": _counts(found.held_out - judging, dataset, counted),
    }
    flop_per_s = speed.flop_per_s if speed else FLOP_PER_S
    planned = plan_steps(config, dataset.rows, shard_rows)
    seconds = _seconds(model, config, planned, counts, flop_per_s)
    errors = past_errors(conn) if counted and speed else dict.fromkeys(seconds, WIDE)
    steps = tuple(
        StepForecast(step=step, shards=sum(p.step == step for p in planned), seconds=stretched({step: s}, errors))
        for step, s in seconds.items()
    )
    whole = stretched(seconds, errors)
    kept = top_count(_ratio(config), found.train_rows)
    finds_heads = config.heads.head_map is None
    against = _alternatives(model, config, counts["train"], flop_per_s) if config.kind == "adapt" else None
    counting = sum(step.seconds.p50 for step in steps if step.step != "evaluate")
    return Forecast(
        resolution=found.resolution,
        steps=steps,
        seconds=whole,
        rows={
            **{name: count.rows for name, count in counts.items()},
            "proxy": proxy_count(config.heads) if finds_heads else 0,
            "kept": kept,
        },
        tokens={name: count.tokens for name, count in counts.items()},
        size_bytes=_sizes(model, config, dataset, {step.step for step in steps}),
        misfits=tuple(_misfits(config, whole, counted)),
        full_s=against and against[0],
        lora_s=against and against[1],
        aer=against and counting / against[0],
        aer_lora=against and counting / against[1],
        basis=_basis(counted, speed, model, errors),
    )


def _seconds(
    model: ModelInfo,
    config: JobConfig,
    planned: list[PlannedStep],
    counts: Mapping[str, RowCounts],
    flop_per_s: float,
) -> dict[str, float]:
    foreseen = {"validate": GUESSED_S["validate"]} | estimate_seconds(model, config, Speed(flop_per_s), **counts)
    return {step: foreseen[step] for step in dict.fromkeys(p.step for p in planned)}


def _counts(rows: int, dataset: Content, counted: RowCounts | None) -> RowCounts:
    """Tokens of so many rows of the dataset: as an earlier job counted them, or by the bytes."""
    if counted is not None:
        share = rows / max(1, counted.rows)
        return replace(
            counted,
            rows=rows,
            tokens=round(counted.tokens * share),
            answer_tokens=round(counted.answer_tokens * share),
        )
    text_bytes = max(1.0, dataset.stored_bytes / max(1, dataset.rows) - ROW_BYTES)
    tokens = text_bytes / BYTES_PER_TOKEN
    return RowCounts(
        rows=rows,
        tokens=math.ceil(rows * (tokens + TEMPLATE_TOKENS)),
        answer_tokens=math.ceil(rows * tokens * ANSWER_SHARE),
        longest=math.ceil(2 * tokens + TEMPLATE_TOKENS),
    )


def _alternatives(model: ModelInfo, config: JobConfig, train: RowCounts, flop_per_s: float) -> tuple[float, float]:
    """Seconds of full fine-tuning and of LoRA on all rows, for the same epochs, at the same speed."""
    work = typical_work(rows=train.rows, tokens=train.tokens, answer_tokens=train.answer_tokens)
    once = config.training.epochs / (flop_per_s * EFFICIENCY)
    return once * full_fine_tuning(model, work), once * lora_training(model, work)


def _sizes(model: ModelInfo, config: JobConfig, dataset: Content, steps: set[str]) -> dict[str, int]:
    heads = len(every_head(model))
    sizes = {"rows": dataset.stored_bytes}
    if "respond" in steps:
        sizes["responses"] = 2 * dataset.rows * heads
    if "train" in steps:
        slices = config.training.slices
        assert slices != "auto", "resolve the config first"
        sizes["adapter"] = 4 * len(slices) * top_count(config.heads.ratio, heads) * model.head_dim * model.hidden_size
    return sizes | {"total": sum(sizes.values())}


def _misfits(config: JobConfig, whole: Interval, counted: RowCounts | None) -> Iterator[str]:
    most, limit = config.limits.max_seconds, config.training.max_length
    if most is not None and whole.p50 > most:
        yield (
            f"limits.max_seconds is {most}, the middle of the estimate {whole.p50:.0f} s; {math.ceil(whole.p90)} would be "
            "enough in nine of ten cases."
        )
    if counted is not None and limit != "auto" and counted.longest > limit:
        yield f"training.max_length is {limit}, the longest row has {counted.longest} tokens."


def _basis(
    counted: RowCounts | None, speed: MeasuredSpeed | None, model: ModelInfo, errors: Mapping[str, Error]
) -> dict[str, str]:
    tokens = "counted by an earlier job with this dataset and model" if counted else "guessed by the bytes of the rows"
    measured = f"{FLOP_PER_S:.0e} operations a second, a guess: nothing has run here yet"
    if speed is not None:
        whose = model.name if speed.same_model else "other models"
        measured = f"{speed.flop_per_s:.2e} operations a second, median of {speed.runs} finished steps of {whose}"
    runs = sum(error.runs for error in errors.values())
    past = f"errors of {runs} earlier steps" if runs else "a guess"
    return {"tokens": tokens, "speed": measured, "interval": past}


def _ratio(config: JobConfig) -> float:
    assert config.data.ratio != "auto", "resolve the config first"
    return config.data.ratio
