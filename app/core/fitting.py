"""Whether a job fits the machines that the service has, and the nearest change with which it would.

The peaks are `p2d.memory`'s closed form. What the machines have is known from finished steps; before any, nothing is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from app.db.waiting import Equipment
from p2d.config import JobConfig
from p2d.memory import Machine, Peak, step_peaks
from p2d.model_info import ModelInfo
from p2d.plans import RowCounts

USABLE = 0.9
"""Share of a machine's memory that a job may take: the rest is the system's, and what allocators keep back. A guess."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One field of the job with which it fits, all else the same."""

    pointer: str
    value: Any
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Peaks in bytes, by what is computed, and what there is; None = not known."""

    steps: Mapping[str, Peak]
    peak: Peak
    available: Peak | None


def machine_of(config: JobConfig, equipment: Equipment | None, device: str) -> Machine:
    """What the job would compute on: as the newest steps did, else as the service's settings say."""
    on_gpu = equipment.device_bytes > 0 if equipment else device.startswith("cuda")
    precision: str = config.training.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
        if equipment and equipment.precision in ("fp32", "bf16"):
            precision = equipment.precision
    return Machine(on_gpu=on_gpu, wide=precision == "fp32")


def available_of(equipment: Equipment | None) -> Peak | None:
    """What a job may take of the machines."""
    if equipment is None:
        return None
    return Peak(host=round(USABLE * equipment.host_bytes), device=round(USABLE * equipment.device_bytes))


def largest(peaks: Mapping[str, Peak]) -> Peak:
    """The most that any of the steps holds."""
    return Peak(
        host=max((peak.host for peak in peaks.values()), default=0),
        device=max((peak.device for peak in peaks.values()), default=0),
    )


def fits(peak: Peak, available: Peak | None) -> bool:
    """Whether there is that much; what is not known is taken to be enough."""
    return available is None or (peak.host <= available.host and peak.device <= available.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizing:
    """A job's peaks as a function of its config and of its longest row."""

    model: ModelInfo
    machine: Machine
    counts: Mapping[str, RowCounts]
    shard_rows: int
    planned: frozenset[str]
    """Steps that the job has."""

    def memory(self, config: JobConfig, available: Peak | None, longest: int | None = None) -> Memory:
        """The peaks under a config; `longest` = if no row were longer."""
        counts = {
            name: replace(count, longest=min(count.longest, longest or count.longest))
            for name, count in self.counts.items()
        }
        machine = replace(self.machine, wide=self.machine.wide and config.training.precision != "bf16")
        found = step_peaks(self.model, config, machine, shard_rows=self.shard_rows, **counts)
        found = {step: peak for step, peak in found.items() if step in self.planned}
        return Memory(steps=found, peak=largest(found), available=available)


def changes(sizing: Sizing, config: JobConfig, available: Peak) -> Iterator[Change]:
    """Every single change of a field that makes a job fit which does not, the nearest value of each."""
    training, longest = config.training, max(count.longest for count in sizing.counts.values())

    def fit(changed: JobConfig, rows: int | None = None) -> bool:
        return fits(sizing.memory(changed, available, rows).peak, available)

    def sized(size: int) -> JobConfig:
        return replace(config, training=replace(training, batch_size=size))

    if size := _most(training.batch_size - 1, lambda size: fit(sized(size))):
        yield Change(pointer="/training/batch_size", value=size, why="the largest batch that fits")
    if (most := _most(longest - 1, lambda tokens: fit(config, tokens))) >= 8:
        why = "the longest rows that fit; longer ones would have to leave the dataset"
        yield Change(pointer="/training/max_length", value=most, why=why)
    if sizing.machine.wide and fit(replace(config, training=replace(training, precision="bf16"))):
        yield Change(pointer="/training/precision", value="bf16", why="half of the bytes of weights and activations")
    scored_here = config.heads.head_map is None and config.heads.scorer == "attribution"
    if scored_here and fit(replace(config, heads=replace(config.heads, scorer="shift"))):
        yield Change(pointer="/heads/scorer", value="shift", why="it needs no gradients of the held-out rows")


def _most(highest: int, good: Callable[[int], bool]) -> int:
    """The largest number up to `highest` that is good, 0 if none is; smaller ones are good where a larger one is."""
    low, high = 0, highest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low
