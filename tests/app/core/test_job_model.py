"""The whole life of jobs against a small model of it: whatever happens in whatever order, rule by rule.

`P2D_TEST_SEED=N` repeats a run; `P2D_TEST_DEEP=N` does N times as many.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import delete

from app.db.datasets import get_dataset
from app.db.jobs import find_job
from app.db.tables import jobs
from app.settings import Settings
from p2d.model_info import read_model_info
from tests.job_machine import JobMachine
from tests.job_model import POSSIBLE, WAYS
from tests.rig import Rig, make_rig

EXAMPLES, RULES = 12, 15
"""Runs, and rules of one run: some ten seconds."""

DEEP = int(os.environ.get("P2D_TEST_DEEP", "1"))


@pytest.fixture
def rig(settings: Settings, tmp_path: Path) -> Iterator[Rig]:
    """A ledger without workers: the machine plays them."""
    rig = make_rig(settings, tmp_path)
    yield rig
    rig.stop()


@pytest.fixture
def machine(rig: Rig) -> Iterator[type[JobMachine]]:
    """The machine on this ledger."""
    first = rig.submit(rows=30)
    with rig.db.begin() as conn:
        dataset = get_dataset(conn, find_job(conn, first).dataset_id)
        conn.execute(delete(jobs))
    with rig.db.connect().execution_options(isolation_level="AUTOCOMMIT") as eye:
        values: dict[str, Any] = {"rig": rig, "dataset": dataset, "eye": eye, "files": {}, "covered": Counter()}
        values["model_info"] = read_model_info(rig.settings.models_dir / "stub")
        yield type("Machine", (JobMachine,), values)


PAIRS = {(status, event) for event, statuses in POSSIBLE.items() for status in statuses}


def test_every_event_in_every_status_does_what_the_model_says(machine: type[JobMachine]) -> None:
    before = -1
    while len(machine.covered) > before:  # until a round over all ways meets nothing new
        before = len(machine.covered)
        for way in WAYS:
            run = machine()
            run.first(way)
            while new := [event for event in POSSIBLE if run.can(event) and (run.status, event) not in machine.covered]:
                run.do(new[0])
                run.agrees()
            run.teardown()

    print(f"{len(machine.covered)} of {len(PAIRS)} pairs of status and event")
    assert set(machine.covered) == PAIRS


@pytest.mark.timeout(300 * DEEP)
def test_no_order_of_events_takes_a_job_off_its_way(machine: type[JobMachine], seed: int) -> None:
    run = hypothesis_settings(
        max_examples=EXAMPLES * DEEP,
        stateful_step_count=RULES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=run)

    met = machine.covered
    print(f"{len(met)} of {len(PAIRS)} pairs of status and event, {met.total()} events")
    print(*(f"{count:6d} {status} {event}" for (status, event), count in met.most_common()), sep="\n")
