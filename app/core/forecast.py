"""What a job would take, told before it is made: seconds by step, the wait before them, memory, bytes, cost, the projected AER,
and what does not fit. Makes nothing.

The arithmetic is that of p2d.estimate, p2d.memory and p2d.sizes. What it needs and only a run can tell, tokens by row, the speed
and the memory of the machine, is taken from earlier jobs of the ledger; where there is none, it is guessed, said so, and the
interval is wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from app.core.fitting import Change, Memory, Sizing, available_of, changes, fits, machine_of
from app.core.foresight import Interval, stretched
from app.core.outlook import Outlook
from app.core.plan import GUESSED_S
from app.core.submit import Content, resolution_of
from app.db.engine import Connection
from app.db.estimates import Error, MeasuredSpeed, measured_rows, measured_speed, past_errors
from app.db.jobs import seconds_until
from p2d.config import WITHOUT_RESPONSES, JobConfig, epochs_of, most_kept, proxy_count
from p2d.estimate import EFFICIENCY, Speed, estimate_seconds
from p2d.flops import full_fine_tuning, lora_training, typical_work
from p2d.memory import Peak, full_peak, lora_peak
from p2d.model_info import ModelInfo
from p2d.pipeline import plan_steps
from p2d.plans import RowCounts, guide_count
from p2d.resolution import Resolution
from p2d.sizes import Size, adapter_size, full_model_bytes, lora_bytes, response_size

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
class Alternative:
    """Another way to adapt the model, on all rows and for the same epochs, on the same machine."""

    seconds: float
    peak: Peak
    artifact_bytes: int
    fits: bool
    cost: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Money, in the currency of the rate."""

    per_hour: float
    job: Interval


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """What the service says of itself, for an estimate."""

    outlook: Outlook
    shard_rows: int
    device: str
    """As set for the engine; what is computed on where no step has told."""
    cost_per_hour: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a job would take."""

    resolution: Resolution
    warnings: tuple[str, ...]
    """The resolution's, and what the projection says of the worth of the job."""
    steps: tuple[StepForecast, ...]
    seconds: Interval
    wait: Interval
    """Seconds before them, until a worker is there."""
    rows: Mapping[str, int]
    """`train`, `guide`, `evaluation`; `proxy` and `kept` of the first."""
    tokens: Mapping[str, int]
    """`train`, `guide` and `evaluation`."""
    size_bytes: Mapping[str, int]
    """The largest files that it would store, at most."""
    artifacts: Mapping[str, Size]
    """The same files, from the least to the most that they can be."""
    memory: Memory
    misfits: tuple[str, ...]
    changes: tuple[Change, ...]
    """Each alone makes the job fit, as far as its misfit can be mended by one."""
    cost: Cost | None
    full: Alternative | None
    lora: Alternative | None
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
    known: Known,
    *,
    map_scorer: str | None,
) -> Forecast:
    """Foresee a job that was checked (`app.core.submit.refusals`); writes nothing.

    Args:   map_scorer: of the head map that the job names.
    """
    own_rows = validation.rows if validation else None
    found = resolution_of(config, model, dataset.rows, own_rows, map_scorer=map_scorer)
    config = found.resolution.config
    counted = measured_rows(conn, content_hash=dataset.content_hash, model_digest=model.digest)
    speed = measured_speed(conn, model_digest=model.digest)
    judging = guide_count(found.held_out)
    counts = {
        "train": _counts(found.train_rows, dataset, counted),
        "guide": _counts(judging, dataset, counted),
        "evaluation": _counts(found.held_out - judging, dataset, counted),
    }
    flop_per_s = speed.flop_per_s if speed else FLOP_PER_S
    planned = plan_steps(config, dataset.rows, known.shard_rows)
    shards = {step: sum(p.step == step for p in planned) for step in dict.fromkeys(p.step for p in planned)}
    foreseen = estimate_seconds(model, config, Speed(flop_per_s), **counts, shard_rows=known.shard_rows)
    seconds = {step: GUESSED_S["validate"] if step == "validate" else foreseen[step] for step in shards}
    errors = past_errors(conn) if counted and speed else dict.fromkeys(seconds, WIDE)
    steps = tuple(
        StepForecast(step=step, shards=shards[step], seconds=stretched({step: s}, errors))
        for step, s in seconds.items()
    )
    whole = stretched(seconds, errors)
    sizing = Sizing(
        model=model,
        machine=machine_of(config, known.outlook.equipment, known.device),
        counts=counts,
        shard_rows=known.shard_rows,
        planned=frozenset(shards),
    )
    memory = sizing.memory(config, available_of(known.outlook.equipment))
    artifacts = _artifacts(sizing, config, dataset, shards)
    full, lora = (
        _alternatives(sizing, config, flop_per_s, memory.available, known.cost_per_hour)
        if config.kind == "adapt"
        else (None, None)
    )
    counting = sum(step.seconds.p50 for step in steps if step.step != "evaluate")
    return Forecast(
        resolution=found.resolution,
        warnings=(*found.resolution.warnings, *_dearer(config, steps, counting, full, lora)),
        steps=steps,
        seconds=whole,
        wait=known.outlook.wait,
        rows={
            **{name: count.rows for name, count in counts.items()},
            "proxy": proxy_count(config.heads) if config.heads.head_map is None else 0,
            "kept": most_kept(config.data, found.train_rows),
        },
        tokens={name: count.tokens for name, count in counts.items()},
        size_bytes={name: size.most for name, size in artifacts.items()},
        artifacts=artifacts,
        memory=memory,
        misfits=(
            *_late(conn, config, known.outlook.wait, whole),
            *_misfits(config, whole, counted, memory),
        ),
        changes=tuple(_changes(sizing, config, whole, counted, memory)),
        cost=_cost(whole, known.cost_per_hour),
        full=full,
        lora=lora,
        full_s=full.seconds if full else None,
        lora_s=lora.seconds if lora else None,
        aer=counting / full.seconds if full else None,
        aer_lora=counting / lora.seconds if lora else None,
        basis=_basis(counted, speed, model, errors) | _machine_basis(known.outlook, sizing),
    )


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


def _alternatives(
    sizing: Sizing, config: JobConfig, flop_per_s: float, available: Peak | None, per_hour: float | None
) -> tuple[Alternative, Alternative]:
    """Full fine-tuning, and LoRA on all linear layers: all rows, same epochs, at the same speed, on the same machine."""
    model, train, machine = sizing.model, sizing.counts["train"], sizing.machine
    work = typical_work(rows=train.rows, tokens=train.tokens, answer_tokens=train.answer_tokens)
    once = epochs_of(config.training) / (flop_per_s * EFFICIENCY)

    def other(flops: float, peak: Peak, size: int) -> Alternative:
        seconds = once * flops
        cost = per_hour and _money(seconds, per_hour)
        return Alternative(seconds=seconds, peak=peak, artifact_bytes=size, fits=fits(peak, available), cost=cost)

    return (
        other(full_fine_tuning(model, work), full_peak(model, config, machine, train=train), full_model_bytes(model)),
        other(
            lora_training(model, work),
            lora_peak(model, config, machine, train=train),
            lora_bytes(model, wide=machine.wide),
        ),
    )


def _dearer(
    config: JobConfig,
    steps: tuple[StepForecast, ...],
    counting: float,
    full: Alternative | None,
    lora: Alternative | None,
) -> Iterator[str]:
    """One warning where choosing and training take longer than training all rows in another way; with what could be left out.

    Args:   counting: seconds that count in AER, those of all steps but `evaluate`.
    """
    others = (("full fine-tuning", full), ("LoRA", lora))
    cheaper = [
        f"{name} on all rows {_told(other.seconds)}" for name, other in others if other and other.seconds < counting
    ]
    if not cheaper:
        return
    spent = {step.step: step.seconds.p50 for step in steps}
    savings = {
        "heads": "heads.ratio 1 with heads.scorer 'uniform' looks for no heads" if proxy_count(config.heads) else "",
        "respond": "data.ratio 1 with data.scorer 'uniform' scores no rows"
        if config.data.scorer not in WITHOUT_RESPONSES
        and config.data.ratio in ("auto", 1)  # else training would be dearer
        else "",
        "train": "a training.learning_rate needs no search" if config.training.learning_rate == "auto" else "",
    }
    found = [
        (spent[step], f"{saving} ({step}: {_told(spent[step])})")
        for step, saving in savings.items()
        if saving and step in spent
    ]
    change = "; ".join(text for _, text in sorted(found, reverse=True)) or "nothing more can be left out of the job"
    yield (
        f"Without its evaluation the job is projected to take {_told(counting)}, {' and '.join(cheaper)} for as many epochs. "
        f"What would be cheaper: {change}."
    )


def _told(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def _artifacts(sizing: Sizing, config: JobConfig, dataset: Content, shards: Mapping[str, int]) -> dict[str, Size]:
    # rows.jsonl lacks the rows that are held out; how long those are nobody has looked.
    whole = sizing.counts["train"].rows == dataset.rows
    sizes = {"rows": Size(least=dataset.stored_bytes if whole else 0, most=dataset.stored_bytes)}
    if "respond" in shards:
        train = sizing.counts["train"].rows
        sizes["responses"] = response_size(
            sizing.model, config, rows=train, guide=sizing.counts["guide"].rows, shards=shards["respond"]
        )
    if "train" in shards:
        sizes["adapter"] = adapter_size(sizing.model, config, wide=sizing.machine.wide)
    total = Size(least=sum(s.least for s in sizes.values()), most=sum(s.most for s in sizes.values()))
    return sizes | {"total": total}


def _late(conn: Connection, config: JobConfig, wait: Interval, whole: Interval) -> Iterator[str]:
    deadline = config.limits.ends_at
    if deadline is not None and (left_s := seconds_until(conn, deadline)) < wait.p50 + whole.p50:
        yield (
            f"limits.deadline is in {max(0.0, left_s):.0f} s, the middle of the estimate {wait.p50 + whole.p50:.0f} s with the "
            f"wait; {math.ceil(wait.p90 + whole.p90)} would be enough in nine of ten cases."
        )


def _tight(config: JobConfig, whole: Interval) -> Iterator[tuple[str, int]]:
    """Limits in seconds that are below the middle of the estimate. Shards that run side by side are counted as if they did not."""
    for name in ("max_seconds", "max_gpu_seconds"):
        most = getattr(config.limits, name)
        if most is not None and whole.p50 > most:
            yield name, most


def _misfits(config: JobConfig, whole: Interval, counted: RowCounts | None, memory: Memory) -> Iterator[str]:
    limit = config.training.max_length
    for name, most in _tight(config, whole):
        yield (
            f"limits.{name} is {most}, the middle of the estimate {whole.p50:.0f} s; {math.ceil(whole.p90)} would be "
            "enough in nine of ten cases."
        )
    if counted is not None and limit != "auto" and counted.longest > limit:
        yield f"training.max_length is {limit}, the longest row has {counted.longest} tokens."
    for name in ("host", "device"):
        needed, there = getattr(memory.peak, name), getattr(memory.available, name, math.inf)
        if needed > there:
            step = max(memory.steps, key=lambda step: getattr(memory.steps[step], name))
            yield f"The step {step} needs {needed / 1e9:.1f} GB of the {name}'s memory; {there / 1e9:.1f} GB are usable."


def _changes(
    sizing: Sizing, config: JobConfig, whole: Interval, counted: RowCounts | None, memory: Memory
) -> Iterator[Change]:
    limit = config.training.max_length
    for name, _ in _tight(config, whole):
        yield Change(pointer=f"/limits/{name}", value=math.ceil(whole.p90), why="enough in nine of ten cases")
    if counted is not None and limit != "auto" and counted.longest > limit:
        yield Change(pointer="/training/max_length", value=counted.longest, why="tokens of the longest row")
    if memory.available is not None and not fits(memory.peak, memory.available):
        yield from changes(sizing, config, memory.available)


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


def _machine_basis(outlook: Outlook, sizing: Sizing) -> dict[str, str]:
    formula = "closed form of what the engine holds, rows as long as the longest"
    kind = f"{'a GPU' if sizing.machine.on_gpu else 'a CPU'} in {'fp32' if sizing.machine.wide else 'bf16'}"
    there = f"{kind}, a guess: no step has told of its machine yet, so nothing is judged by memory"
    if (machines := outlook.equipment) is not None:
        there = f"{kind}; {machines.host_bytes / 1e9:.0f} GB" + (
            f" and {machines.device_bytes / 1e9:.0f} GB of the device" if machines.device_bytes else ""
        )
        there += " on the smallest machine of the newest finished steps"
    return {"wait": outlook.basis, "memory": f"{formula}; {there}"}


def _cost(seconds: Interval, per_hour: float | None) -> Cost | None:
    return None if per_hour is None else Cost(per_hour=per_hour, job=_priced(seconds, per_hour))


def _priced(seconds: Interval, per_hour: float) -> Interval:
    return Interval(**{name: _money(getattr(seconds, name), per_hour) for name in ("p10", "p50", "p90")})


def _money(seconds: float, per_hour: float) -> float:
    return round(seconds / 3600 * per_hour, 4)
