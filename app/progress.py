"""A job's events as a person sees them: stage, bar and time left on a terminal, plain lines anywhere else.

Only shows. Where events come from and how a cut stream is resumed is `p2d.client`'s business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from p2d.client import Event
from p2d.pipeline import PlannedStep, spec_of

STAGES = {
    "validating": "checking the rows",
    "identifying_heads": "finding the heads",
    "selecting_data": "selecting the rows",
    "training": "training the heads",
    "evaluating": "measuring before and after",
    "packaging": "writing the report",
}

PLAIN_EVERY_S = 15.0
"""Seconds between two plain progress lines of one stage."""


WIDE = 110
"""Columns of a terminal that has room for metrics."""


class Watcher(Protocol):
    """Is shown every event of a job."""

    def __call__(self, event: Event, /) -> None: ...


@contextmanager
def watching(console: Console) -> Iterator[Watcher]:
    """A watcher that suits the console."""
    if not console.is_terminal:
        yield PlainWatcher(console)
        return
    with Progress(*_columns(console), console=console) as progress:
        yield BarWatcher(progress)


def _columns(console: Console) -> list[ProgressColumn]:
    """What fits: the bar and the time on 80 columns, numbers of the engine beside them on wider terminals."""
    columns: list[ProgressColumn] = [
        TextColumn("{task.description:<26}"),
        BarColumn(bar_width=16),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    ]
    return columns + ([TextColumn("[dim]{task.fields[metrics]}")] if console.width >= WIDE else [])


class BarWatcher:
    """One bar for the whole job, on a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("waiting for a worker", total=1.0, left="", metrics="")

    def __call__(self, event: Event) -> None:
        """Move the bar, or print a line above it."""
        data = event.data
        if event.type == "job.stage":
            self._progress.update(self._task, description=stage_name(data), metrics="")
        elif event.type == "job.progress":
            self._progress.update(self._task, completed=float(data["progress"]), left=time_left(data))
        elif event.type == "metric":
            self._progress.update(self._task, metrics=_metrics(data.get("values") or {}))
        elif line := _line(event):
            self._progress.console.print(line, highlight=False, markup=False)


class PlainWatcher:
    """Lines with the seconds since the start, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._said = 0.0
        self._stage = "waiting for a worker"

    def __call__(self, event: Event) -> None:
        """Print a line where the event is worth one."""
        if event.type == "job.stage":
            self._stage, self._said = stage_name(event.data), time.monotonic()
            self._print(self._stage)
        elif event.type == "job.progress":
            if time.monotonic() - self._said >= PLAIN_EVERY_S:
                self._said = time.monotonic()
                self._print(f"{self._stage}: {float(event.data['progress']):.0%} {time_left(event.data)}".rstrip())
        elif line := _line(event):
            self._print(line)

    def _print(self, text: str) -> None:
        self._console.print(
            f"{time.monotonic() - self._started:6.0f} s  {text}", highlight=False, markup=False, soft_wrap=True
        )


def stage_name(data: Mapping[str, Any]) -> str:
    """What the stage of a `job.stage` event does, in words; a stage that this version does not know shows as itself."""
    stage = str(data.get("stage"))
    return STAGES.get(stage, stage)


def time_left(data: Mapping[str, Any]) -> str:
    """What a `job.progress` event says about the end."""
    if not data.get("eta_at"):
        return ""
    said = f"{_until(data['eta_at'])} left"
    if data.get("eta_p10_at") and data.get("eta_p90_at"):
        said += f" ({_until(data['eta_p10_at'])} to {_until(data['eta_p90_at'])})"
    return said


def _until(at: Any) -> str:
    return duration(max((datetime.fromisoformat(str(at)) - datetime.now(UTC)).total_seconds(), 0.0))


def duration(seconds: float) -> str:
    """Seconds as a person says them: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _line(event: Event) -> str:
    data = event.data
    if event.type == "estimate":
        steps = ", ".join(f"{name} {duration(float(s))}" for name, s in (data.get("steps") or {}).items() if s >= 1)
        return f"This job will take about {duration(float(data['total_s']))}" + (f" ({steps})." if steps else ".")
    if event.type == "warning":
        return f"Note: {data.get('message')}"
    if event.type == "job.status" and data.get("status") == "paused":
        return "The job is paused, and waits to be resumed."
    if event.type == "cache.hit" and data.get("shard") == 0:
        return (
            f"An earlier job has done the step {data.get('step')} already: its result is taken ({data.get('job_id')})."
        )
    if event.type == "heads.ranked" and "kept" in data:
        return f"{data['kept']} of {data['heads']} heads are kept."
    if event.type == "examples.scored":
        return f"{data.get('kept')} of {data.get('rows')} rows are kept."
    if event.type == "attempt" and data.get("outcome") not in ("running", "done"):
        return f"An attempt at {data.get('step')} ended: {data.get('outcome')}."
    return ""


def _metrics(values: Mapping[str, Any]) -> str:
    shown = [(name, value) for name, value in values.items() if isinstance(value, int | float)][:2]
    return "  ".join(f"{name} {value:.4g}" for name, value in shown)


StepWatcher = Callable[[PlannedStep, int, int, Mapping[str, float]], None]
"""Is told after every batch of a step."""


@contextmanager
def watching_steps(console: Console) -> Iterator[StepWatcher]:
    """The same for a run without the service: one bar a step, or one line where there is no terminal."""
    bars: dict[tuple[str, int], TaskID] = {}
    with Progress(*_columns(console), console=console, disable=not console.is_terminal) as progress:

        def show(step: PlannedStep, done: int, total: int, metrics: Mapping[str, float]) -> None:
            key = (step.step, step.shard)
            if key not in bars:
                bars[key] = progress.add_task(stage_name({"stage": spec_of(step.step).stage}), left="", metrics="")
                if not console.is_terminal:
                    console.print(f"{step.step} ...", highlight=False)
            progress.update(bars[key], completed=done, total=total, metrics=_metrics(metrics))

        yield show
