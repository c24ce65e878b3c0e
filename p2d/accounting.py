"""What a job cost, line by line, and the two ratios made of it: AER and AER against LoRA. No torch here.

AER = (everything the job spent to find heads, select rows and train) / (full fine-tuning on all rows, same epochs).
What was taken from an earlier job counts as if it had been computed again: its seconds then, on lines of their own, so that
AER is the method's cost whatever happened to be known; `spent_s` is what this job took besides.
Counted: start-up, loading, tokenising, proxies, responses, selection, training with its learning-rate search, packaging
and every attempt that was stopped (by a pause, a cancel, a worker that left, or a kill of a run without the service) or failed.
Shown but not counted: evaluation, and measuring the two baselines.

The same two ratios in floating point operations (`p2d.flops`) stand beside them: free of noise and of the machine, but blind
to all that is not a matrix product, and to failed attempts, of which nobody knows how far they came.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """What the successful attempt of one step (or shard) measured about itself: `accounting-{step}[-shard].json`."""

    step: str
    shard: int = 0
    load_s: float
    """Seconds of loading the base model; 0 where it was warm."""
    work_s: float
    """Seconds of everything else inside the step."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Named seconds inside `work_s`."""
    part_flops: Mapping[str, int] = field(default_factory=dict)
    """Those of `flops` that were spent in them; of the other parts they stand with the step itself."""
    tokens: int
    """Of rows that were scored or trained on, each pass counted, or judged; looks at held-out rows only in stage 1."""
    rows: int
    flops: int = 0
    """Floating point operations by `p2d.flops`; 0 where the step multiplies no matrices, or where it is unknown."""
    peak_memory_bytes: int
    device: str
    host_memory_bytes: int = 0
    """What the machine has, or its container may have; 0 = not said."""
    device_memory_bytes: int = 0
    """What the device has beside it; 0 on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One try at a step as whoever ran it saw it, failed ones included: an entry of `steps.json`."""

    step: str
    shard: int = 0
    attempt: int = 1
    status: Literal["done", "failed", "cancelled", "lost", "released"]
    seconds: float
    """Wall seconds from claim to end: process start, transfer and work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reused:
    """A step whose outputs an earlier job had computed: an entry of `steps.json`."""

    step: str
    shard: int = 0
    seconds: float
    """Wall seconds of the attempt that computed them."""
    job_id: str
    """The job that did."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostLine:
    """One line of the bill."""

    name: str
    seconds: float
    counted: bool
    """Whether it is part of AER's numerator."""
    flops: int = 0
    """Of all parts of the step, on the step's own line."""
    reused: bool = False
    """Whether an earlier job spent it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternatives:
    """What full fine-tuning, and LoRA on all linear layers, would take: all rows, same epochs. None = not known."""

    full_s: float | None = None
    """Projected from measured steps, as is `lora_s`."""
    lora_s: float | None = None
    full_flops: int | None = None
    """By `p2d.flops`, as is `lora_flops`."""
    lora_flops: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Bill:
    """All lines, their sum, and the ratios where a baseline was measured."""

    lines: tuple[CostLine, ...]
    counted_s: float
    """The numerator."""
    spent_s: float
    """The part of it that this job itself took: without what it reused."""
    full_s: float | None
    """Full fine-tuning on all rows, same epochs: projected from measured steps."""
    lora_s: float | None
    """LoRA on all linear layers and all rows, same epochs: projected from measured steps."""
    aer: float | None
    aer_lora: float | None
    counted_flops: int
    full_flops: int | None
    lora_flops: int | None
    aer_flop: float | None
    aer_lora_flop: float | None


_WORK_NAMES = {
    "validate": "read and tokenise",
    "heads": "heads: proxies and scores",
    "respond": "rows: responses",
    "select": "rows: selection",
    "train": "train",
    "evaluate": "evaluate",
    "package": "package",
}

_UNFINISHED = {
    # A pause, a worker that left, a kill of a run without the service; a cancel before a retry.
    "attempts that were stopped": ("released", "cancelled"),
    "attempts that failed": ("failed", "lost"),
}
"""Lines of attempts that are not the one that ended a step well. What they computed is not in the steps' own seconds."""


def bill(
    costs: Iterable[StepCost], attempts: Iterable[Attempt], against: Alternatives, reused: Iterable[Reused] = ()
) -> Bill:
    """Add up a job. Seconds of shards that ran side by side are summed: cost, not waiting time."""
    costs, attempts = list(costs), list(attempts)
    earlier = {(one.step, one.shard): one for one in reused}
    own = [cost for cost in costs if (cost.step, cost.shard) not in earlier]
    ended = [a for a in attempts if a.status == "done" and a.step != "evaluate"]
    lines = _lines_of(own, {(a.step, a.shard): a.seconds for a in ended}, reused=False)
    for name, statuses in _UNFINISHED.items():
        lost_s = sum(a.seconds for a in attempts if a.status in statuses and a.step != "evaluate")
        lines.append(CostLine(name=name, seconds=round(lost_s, 3), counted=True))
    if earlier:
        taken = [cost for cost in costs if (cost.step, cost.shard) in earlier]
        lines += _lines_of(taken, {at: one.seconds for at, one in earlier.items()}, reused=True)
    counted = [line for line in lines if line.counted]
    counted_s = sum(line.seconds for line in counted)
    counted_flops = sum(line.flops for line in counted)
    return Bill(
        lines=tuple(lines),
        counted_s=round(counted_s, 3),
        spent_s=round(sum(line.seconds for line in counted if not line.reused), 3),
        full_s=against.full_s,
        lora_s=against.lora_s,
        aer=counted_s / against.full_s if against.full_s else None,
        aer_lora=counted_s / against.lora_s if against.lora_s else None,
        counted_flops=counted_flops,
        full_flops=against.full_flops,
        lora_flops=against.lora_flops,
        aer_flop=counted_flops / against.full_flops if against.full_flops else None,
        aer_lora_flop=counted_flops / against.lora_flops if against.lora_flops else None,
    )


def _lines_of(costs: list[StepCost], wall_s: Mapping[tuple[str, int], float], *, reused: bool) -> list[CostLine]:
    """Load, work by step and part, and what the steps' wall seconds (by step and shard) hold besides."""
    counted = [cost for cost in costs if cost.step != "evaluate"]
    seconds: dict[str, float] = {"load the model": sum(cost.load_s for cost in counted)}
    flops: dict[str, int] = {}
    for step, name in _WORK_NAMES.items():
        for cost in costs:
            if cost.step != step:
                continue
            rest_s, rest_flops = cost.work_s, cost.flops
            for part, part_s in cost.parts.items():
                line, part_flops = f"{name}: {part}", cost.part_flops.get(part, 0)
                seconds[line] = seconds.get(line, 0.0) + part_s
                flops[line] = flops.get(line, 0) + part_flops
                rest_s, rest_flops = rest_s - part_s, rest_flops - part_flops
            seconds[name] = seconds.get(name, 0.0) + max(rest_s, 0.0)
            flops[name] = flops.get(name, 0) + rest_flops
            if step == "evaluate":
                seconds[name] += cost.load_s
    measured = {(cost.step, cost.shard): cost.load_s + cost.work_s for cost in counted}
    # A step without a cost of its own is one that was taken from an earlier job: all of it was looking up.
    around = sum(max(s - measured.get(at, 0.0), 0.0) for at, s in wall_s.items())
    seconds["start processes, move files"] = around
    return [
        CostLine(
            name=f"{name} (reused)" if reused else name,
            seconds=round(s, 3),
            counted=not name.startswith("evaluate"),
            flops=flops.get(name, 0),
            reused=reused,
        )
        for name, s in seconds.items()
    ]


def step_cost(data: Mapping[str, Any]) -> StepCost:
    """A StepCost from its JSON."""
    return StepCost(**data)


def attempts_of(data: Mapping[str, Any] | None) -> list[Attempt]:
    """The attempts in a `steps.json`: `{"steps": [{step, shard, attempt, status, seconds}, ...]}`."""
    return [Attempt(**entry) for entry in data["steps"]] if data else []


def reused_of(data: Mapping[str, Any] | None) -> list[Reused]:
    """The steps in a `steps.json` that an earlier job had computed: `{"reused": [{step, shard, seconds, job_id}, ...]}`."""
    return [Reused(**entry) for entry in data.get("reused", ())] if data else []


CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container's limit stands, by version of cgroups."""


def host_memory_bytes() -> int:
    """Memory that processes here may have together: the machine's, or the container's where that is less."""
    limits = [psutil.virtual_memory().total]
    for path in map(Path, CGROUP_LIMITS):
        with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
            limits.append(int(path.read_text()))
    return min(limits)


def peak_memory_bytes() -> int:
    """Most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
