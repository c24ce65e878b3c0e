"""What every part of the benchmark works with: the model, rows, device, clock, and how arms take turns.

Arms run one after the other in every round, and the order turns from round to round, so that a machine that slows down
slows all of them; what is published is the median and the range of per-round ratios, never a time by itself.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from p2d.config import Precision
from p2d.models import BaseModel, load_base_model
from p2d.rows import Row, read_rows

Times = dict[str, list[float]]
"""Seconds of every arm in every round."""


@dataclass(slots=True)
class Workbench:
    """One run of the benchmark."""

    model_dir: Path
    rows: list[Row]
    """Of the task, in the order of its file."""
    scored: int
    """How many of them the engine scores in all."""
    rounds: int
    device: str
    scratch: Path
    """A folder for what an arm writes; whoever made it removes it."""
    precision: Precision = "auto"
    """`auto` = what the device computes fastest."""
    _base: BaseModel | None = field(default=None, init=False)

    @property
    def base(self) -> BaseModel:
        """The model, loaded once."""
        if self._base is None:
            self.say(f"loading {self.model_dir.name}")
            self._base = load_base_model(self.model_dir, precision=self.precision, device=self.device)
        return self._base

    def say(self, line: str) -> None:
        """Tell how far the run has come."""
        print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)  # noqa: T201 - a command line

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds that `work` takes: of the processor on a CPU (other processes do not count), else of the wall."""
        cuda = self.base.device.type == "cuda"
        clock = time.perf_counter if cuda else time.process_time
        if cuda:
            torch.cuda.synchronize(self.base.device)
        started = clock()
        work()
        if cuda:
            torch.cuda.synchronize(self.base.device)
        return clock() - started

    def take_turns(
        self,
        arms: Mapping[str, Callable[[], object]],
        *,
        unwarmed: Collection[str] = (),
        inside: Mapping[str, Callable[[], AbstractContextManager[object]]] | None = None,
    ) -> Times:
        """Time every arm once a round.

        Args: unwarmed: arms that get no run before the first round: too dear to do once more. inside: what holds around
              an arm's run, made and undone outside of its time.
        """
        names, around = list(arms), inside or {}
        for name in names:
            if name not in unwarmed:
                with around.get(name, nullcontext)():
                    arms[name]()
        times: Times = {name: [] for name in names}
        for number in range(self.rounds):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                with around.get(name, nullcontext)():
                    times[name].append(self.seconds(arms[name]))
            shown = ", ".join(f"{name} {times[name][-1]:.3g} s" for name in names)
            self.say(f"  round {number + 1} of {self.rounds}: {shown}")
        return times


def per_round(above: Sequence[float], below: Sequence[float], *, scale: float = 1.0) -> list[float]:
    """Ratios of two arms round by round, times a fixed scale (rows or tokens of the one over those of the other)."""
    return [scale * a / b for a, b in zip(above, below, strict=True)]


def environment(bench: Workbench) -> dict[str, str | int | float]:
    """What a reader needs to know about the machine."""
    base = bench.base
    facts: dict[str, str | int | float] = {
        "machine": machine(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else "cpu",
        "dtype": str(base.dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "model": base.info.name,
        "model_digest": base.info.digest[:12],
        "parameters": base.info.parameters,
    }
    return facts


def example_rows(path: Path) -> list[Row]:
    """The rows of a JSONL file that is known to be good."""
    rows: list[Row] = []
    for row in read_rows(path, "jsonl"):
        assert isinstance(row, Row), row
        rows.append(row)
    return rows


def load_average() -> float:
    """Processes that want to run, mean of the last minute."""
    return os.getloadavg()[0]


def machine() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def median_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, lowest, highest)."""
    return statistics.median(values), min(values), max(values)
