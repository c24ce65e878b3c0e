"""Asked to stop, by the user, by a limit or by the machine: the step stops soon, and the ledger says what is true."""

from __future__ import annotations

import time

import psutil
import pytest

from p2d.pipeline import STEPS
from tests.rig import Rig


def test_cancel_in_each_step_ends_the_job_and_keeps_the_worker(rig: Rig) -> None:
    with rig.in_process():
        for step in STEPS:
            rig.steer("hold", step)
            job_id = rig.submit()
            child = rig.reached(step)

            assert rig.cancel(job_id).status == "cancelling"
            assert rig.cancel(job_id).status == "cancelling"  # harmless
            assert rig.ended(job_id).status == "cancelled", step

            rig.let_go(step)
            rig.check(job_id)
            assert psutil.pid_exists(child), "a child that stopped by itself stays warm"
            assert next(s for s in rig.steps(job_id) if s.step == step).status == "cancelled"
            assert rig.cancel(job_id).status == "cancelled"  # harmless


def test_a_child_that_does_not_hear_the_cancel_is_killed(rig: Rig) -> None:
    rig.steer("deaf", "train")
    job_id = rig.submit()

    with rig.in_process():
        child = rig.reached("train")
        rig.cancel(job_id)
        assert rig.ended(job_id).status == "cancelled"
        assert not psutil.pid_exists(child)

    rig.check(job_id)


def test_a_queued_job_is_cancelled_at_once(rig: Rig) -> None:
    job_id = rig.submit()

    assert rig.cancel(job_id).status == "cancelled"

    rig.check(job_id)


def test_term_gives_the_step_back_uncharged_and_another_worker_resumes_it(rig: Rig) -> None:
    rig.steer("hold", "train", "3")
    job_id = rig.submit()
    worker = rig.worker()
    rig.reached("train")

    told = time.monotonic()
    worker.terminate()
    assert worker.wait(30) == 0
    assert time.monotonic() - told < 25

    step = next(step for step in rig.steps(job_id) if step.step == "train")
    assert (step.status, step.crashes) == ("ready", 0)
    rig.let_go("train")
    with rig.in_process():
        assert rig.ended(job_id).status == "succeeded"
    assert [a.outcome for a in rig.attempts(job_id) if a.step == "train"] == ["released", "done"]
    assert [run.split()[-1] for run in rig.runs() if run.startswith("train")] == ["fresh", "resumed"]
    rig.check(job_id)


def test_term_ends_a_worker_whose_child_does_not_listen(rig: Rig) -> None:
    rig.steer("deaf", "heads")
    job_id = rig.submit(kind="identify_heads")
    worker = rig.worker()
    child = rig.reached("heads")

    worker.terminate()
    worker.wait(25)

    assert not psutil.pid_exists(child)
    assert [attempt.outcome for attempt in rig.attempts(job_id)] == ["done", "released"]


def test_a_job_over_its_time_fails_as_limit_reached(rig: Rig) -> None:
    rig.steer("hold", "heads")
    job_id = rig.submit(kind="identify_heads", max_seconds=1)

    with rig.in_process():
        job = rig.ended(job_id)

    assert job.error is not None
    assert (job.error["code"], job.error["fault"]) == ("job.limit_reached", "user")
    rig.check(job_id)


def test_a_job_ends_once_its_workers_have_spent_what_it_may_cost(rig: Rig) -> None:
    rig.steer("hold", "heads")
    job_id = rig.submit(kind="identify_heads", max_gpu_seconds=4)  # on a busy machine the first step takes a second

    with rig.in_process():
        job = rig.ended(job_id)

    assert job.error is not None
    assert (job.error["code"], job.error["facts"]) == ("job.limit_reached", {"limit": "max_gpu_seconds", "value": 4})
    assert "plan.json" in rig.artifacts(job_id)
    rig.check(job_id)


def test_a_job_that_runs_into_its_deadline_fails_and_keeps_what_was_finished(rig: Rig) -> None:
    rig.steer("hold", "heads")
    job_id = rig.submit(kind="identify_heads", deadline="2999-01-01T00:00:00Z")

    with rig.in_process():
        rig.reached("heads")
        with rig.db.begin() as conn:
            conn.exec_driver_sql("update jobs set deadline_at = now()")
        job = rig.ended(job_id)

    assert job.error is not None
    assert (job.error["code"], job.error["facts"]["limit"]) == ("job.limit_reached", "deadline")
    assert "plan.json" in rig.artifacts(job_id)
    rig.check(job_id)


def test_a_step_that_fails_fails_the_job_with_its_error(rig: Rig) -> None:
    rig.steer("fail", "train", "user")
    job_id = rig.submit()

    with rig.in_process():
        job = rig.ended(job_id)

    assert job.error is not None
    assert job.error["code"] == "engine.diverged"
    assert job.error["facts"] == {"step": 3}
    assert [attempt.outcome for attempt in rig.attempts(job_id) if attempt.step == "train"] == ["failed"]
    rig.check(job_id)


def test_an_exception_that_quotes_a_row_shows_no_row(rig: Rig, capfd: pytest.CaptureFixture[str]) -> None:
    rig.steer("fail", "heads")
    job_id = rig.submit()

    with rig.in_process():
        job = rig.ended(job_id)

    assert job.error is not None
    assert job.error["code"] == "engine.failed"
    assert job.error["facts"]["exception"] == "ValueError"
    told = str(job.error) + "".join(str(event.data) for event in rig.events(job_id)) + "".join(capfd.readouterr())
    assert "What is" not in told
    assert "secret" not in told
    rig.check(job_id)
