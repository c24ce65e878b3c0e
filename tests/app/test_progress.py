"""What a person sees of a job, on a terminal and in a log."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from app.progress import duration, watching, watching_steps
from p2d.client import Event
from p2d.pipeline import PlannedStep

SOON = (datetime.now(UTC) + timedelta(minutes=5, seconds=1)).isoformat()
EVENTS: list[tuple[str, dict[str, Any]]] = [
    ("job.status", {"status": "queued"}),
    ("job.stage", {"stage": "validating"}),
    ("warning", {"message": "Few rows [see docs]."}),
    ("estimate", {"total_s": 200.0, "steps": {"heads": 120.0, "train": 79.8, "select": 0.2}}),
    ("job.stage", {"stage": "identifying_heads"}),
    ("metric", {"values": {"loss": 1.25}}),
    ("job.progress", {"progress": 0.4, "stage": "identifying_heads", "eta_at": SOON}),
    ("attempt", {"step": "heads", "outcome": "lost"}),
    ("job.status", {"status": "paused"}),
    ("job.stage", {"stage": "a_stage_of_tomorrow"}),
    ("an.event.of.tomorrow", {}),
    ("end", {"status": "succeeded"}),
]


def shown(*, terminal: bool, width: int = 80) -> str:
    console = Console(file=StringIO(), force_terminal=terminal, width=width, color_system=None)
    with watching(console) as watch:
        for seq, (kind, data) in enumerate(EVENTS, 1):
            watch(Event(seq=seq, type=kind, data=data))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("terminal", [True, False])
def test_estimate_warnings_pauses_and_lost_attempts_are_said_everywhere(terminal: bool) -> None:
    said = " ".join(shown(terminal=terminal).split())

    assert "This job will take about 3 min 20 s (heads 2 min, train 1 min 20 s)." in said
    assert "Note: Few rows [see docs]." in said
    assert "An attempt at heads ended: lost." in said
    assert "The job is paused" in said
    assert "a_stage_of_tomorrow" in said


def test_a_terminal_shows_stage_share_and_time_left_within_80_columns() -> None:
    lines = shown(terminal=True).splitlines()

    bars = [line for line in lines if "40%" in line]
    assert any("left" in line for line in bars)
    assert "loss" not in "".join(bars)


def test_a_wide_terminal_shows_the_loss_too() -> None:
    assert "loss" not in shown(terminal=True, width=80)
    assert "\x1b" not in shown(terminal=False)


def test_a_log_gets_lines_without_bars() -> None:
    lines = shown(terminal=False).splitlines()

    assert any(line.endswith("finding the heads") for line in lines)
    assert "━" not in "".join(lines)


def test_a_local_run_names_each_step_once() -> None:
    console = Console(file=StringIO(), width=80)
    with watching_steps(console) as show:
        for done in range(3):
            show(PlannedStep(step="heads"), done, 3, {"loss": 1.0})
        show(PlannedStep(step="train"), 1, 3, {})

    assert console.file.getvalue() == "heads ...\ntrain ...\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (125, "2 min 5 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_seconds_are_said_as_people_do(seconds: float, said: str) -> None:
    assert duration(seconds) == said
