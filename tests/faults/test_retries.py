"""A job that failed is tried again: what it had finished is reused, and the result is that of an unbroken run."""

from __future__ import annotations

import pytest

from tests.faults.test_crashes import undisturbed
from tests.rig import Rig


def test_a_retry_after_a_failing_step_reuses_what_was_done(rig: Rig) -> None:
    reference = undisturbed(rig)
    rig.steer("fail", "train", "user")
    job_id = rig.submit()

    with rig.in_process() as (worker,):
        assert rig.ended(job_id).status == "failed"
        kept = rig.artifacts(job_id)
        (rig.stub / "fail-train").unlink()
        rig.retry(job_id)
        worker.wake()
        assert rig.ended(job_id).status == "succeeded"

    rig.check(job_id, like=reference)
    assert kept.items() <= rig.artifacts(job_id).items()
    assert [attempt.outcome for attempt in rig.attempts(job_id) if attempt.step == "train"] == ["failed", "done"]
    assert len(rig.attempts(job_id)) == len(rig.steps(job_id)) + 1, "a step that was done ran again"


def test_a_retry_after_the_last_crash_goes_on_from_the_checkpoint(rig: Rig) -> None:
    reference = undisturbed(rig)
    rig.settings = rig.settings.model_copy(update={"max_crashes": 1})
    rig.steer("crash", "train", "1 2")
    job_id = rig.submit()

    with rig.in_process() as (worker,):
        assert rig.ended(job_id).status == "failed"
        rig.retry(job_id)
        worker.wake()
        assert rig.ended(job_id).status == "succeeded"

    rig.check(job_id, like=reference)
    assert [run.split()[-1] for run in rig.runs() if run.startswith("train")][1:] == ["fresh", "resumed"]


@pytest.mark.parametrize("step", ["heads", "respond"])
def test_a_cancelled_job_is_retried_while_its_worker_still_stops(rig: Rig, step: str) -> None:
    reference = undisturbed(rig)
    rig.steer("hold", step)
    job_id = rig.submit()

    with rig.in_process(2) as workers:
        rig.reached(step)
        rig.cancel(job_id)
        assert rig.ended(job_id).status == "cancelled"
        rig.let_go(step)
        rig.retry(job_id)
        for worker in workers:
            worker.wake()
        assert rig.ended(job_id).status == "succeeded"

    rig.check(job_id, like=reference)
