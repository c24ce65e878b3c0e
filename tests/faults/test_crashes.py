"""Whatever is killed, and wherever: one result, the same as undisturbed, nothing lost and nothing published twice."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import workers.attempt
from app.blobs import BlobStore
from p2d.pipeline import STEPS
from tests.rig import Rig, wait_for
from workers.transfer import put_checkpoint


def undisturbed(rig: Rig) -> str:
    """A job that nothing happened to, to compare with."""
    job_id = rig.submit()
    with rig.in_process():
        assert rig.ended(job_id).status == "succeeded"
    return job_id


def test_kill_9_of_the_child_in_each_step_costs_one_attempt_each(rig: Rig) -> None:
    reference = undisturbed(rig)
    for step in STEPS:
        rig.steer("hold", step)
    job_id = rig.submit()

    with rig.in_process():
        for step in STEPS:
            os.kill(rig.reached(step), signal.SIGKILL)
            rig.let_go(step)
        assert rig.ended(job_id).status == "succeeded"

    rig.check(job_id, like=reference)
    lost = [attempt.step for attempt in rig.attempts(job_id) if attempt.outcome == "lost"]
    assert lost == list(STEPS)
    assert all(step.crashes <= 1 for step in rig.steps(job_id))


def test_kill_9_of_the_worker_in_each_step_costs_one_attempt_each(rig: Rig) -> None:
    rig.settings = rig.settings.model_copy(update={"lease_s": 1.5})  # it is waited for seven times
    reference = undisturbed(rig)
    for step in STEPS:
        rig.steer("hold", step)
    job_id = rig.submit()

    for step in STEPS:
        worker = rig.worker()
        child = rig.reached(step)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        wait_for(partial(dead, child), "the child to die with its parent")
        rig.let_go(step)
    with rig.in_process():
        assert rig.ended(job_id).status == "succeeded"

    rig.check(job_id, like=reference)
    lost = [attempt.step for attempt in rig.attempts(job_id) if attempt.outcome == "lost"]
    assert lost == list(STEPS)
    assert not list((rig.settings.work_dir / "steps").iterdir()), "a killed worker's folder was left behind"


def test_a_step_that_kills_its_process_is_tried_three_times_and_no_more(rig: Rig) -> None:
    rig.steer("crash", "train", "99")
    job_id = rig.submit()

    with rig.in_process(2):
        job = rig.ended(job_id)

    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "job.worker_lost"
    assert len([run for run in rig.runs() if run.startswith("train")]) == 3
    assert [a.outcome for a in rig.attempts(job_id) if a.step == "train"] == ["lost"] * 3
    rig.check(job_id)


def test_two_crashes_are_survived(rig: Rig) -> None:
    reference = undisturbed(rig)
    rig.steer("crash", "heads", "2")
    job_id = rig.submit()

    with rig.in_process():
        assert rig.ended(job_id).status == "succeeded"

    rig.check(job_id, like=reference)


def test_training_goes_on_from_its_last_checkpoint_after_a_crash(rig: Rig) -> None:
    reference = undisturbed(rig)
    rig.steer("crash", "train", "1 2")
    job_id = rig.submit()

    with rig.in_process():
        assert rig.ended(job_id).status == "succeeded"

    runs = [run.split()[-1] for run in rig.runs() if run.startswith("train")]
    assert runs[1:] == ["fresh", "resumed"]  # runs[0] is the reference's
    kept = [event.data for event in rig.events(job_id) if event.type == "checkpoint"]
    assert [one.pop("attempt") for one in kept] == [1, 1, 2, 2]
    assert all(one == {"step": "train", "shard": 0, "name": "latest", "files": 1} for one in kept)
    rig.check(job_id, like=reference)


def test_a_hung_step_is_killed_and_ends_as_stalled(rig: Rig) -> None:
    rig.settings = rig.settings.model_copy(update={"stall_s": 0.5})
    rig.steer("deaf", "select")
    job_id = rig.submit(kind="select_data")

    with rig.in_process():
        job = rig.ended(job_id)

    assert job.error is not None
    assert job.error["code"] == "job.stalled"
    assert dead(rig.reached("select"))
    rig.check(job_id)


def test_a_child_that_waits_for_a_store_that_is_away_is_not_hung(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.settings = rig.settings.model_copy(update={"stall_s": 60.0, "engine": "tests.stub_engine:run_quietly"})
    waited_s = [0.0]

    def put_late(store: BlobStore, folder: Path) -> dict[str, str]:
        waited_s[0] += 61.0  # by the clock of the attempt
        return put_checkpoint(store, folder)

    monkeypatch.setattr(workers.attempt, "put_checkpoint", put_late)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + waited_s[0])
    monkeypatch.setattr(workers.attempt, "time", clock)
    job_id = rig.submit()

    with rig.in_process():
        assert rig.ended(job_id).status == "succeeded"

    assert {attempt.outcome for attempt in rig.attempts(job_id)} == {"done"}
    rig.check(job_id)


def test_a_child_that_holds_the_gil_keeps_its_lease(rig: Rig) -> None:
    """The parent beats, so a step that is silent for longer than a lease is not taken away."""
    rig.steer("deaf", "heads")
    job_id = rig.submit(kind="identify_heads")
    lease_s = rig.settings.lease_s

    with rig.in_process(2):
        rig.reached("heads")
        step = next(step for step in rig.steps(job_id) if step.step == "heads")
        assert step.lease_until is not None
        first = step.lease_until
        wait_for(
            lambda: (now := rig.steps(job_id)[1]).lease_until and (now.lease_until - first).total_seconds() > lease_s,
            "the lease to be renewed past its first length",
        )
        rig.let_go("heads")
        assert rig.ended(job_id).status == "succeeded"

    assert [attempt.outcome for attempt in rig.attempts(job_id)] == ["done"] * 3
    rig.check(job_id)


@pytest.mark.parametrize("kind", ["identify_heads", "select_data", "adapt"])
def test_every_kind_of_job_survives_its_worker(rig: Rig, kind: str) -> None:
    rig.steer("crash", "package", "1")
    job_id = rig.submit(kind=kind)  # type: ignore[arg-type]

    with rig.in_process():
        assert rig.ended(job_id).status == "succeeded"

    rig.check(job_id)


def dead(pid: int) -> bool:
    """Whether the process has ended; a zombie has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
