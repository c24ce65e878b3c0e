"""Paused and resumed anywhere, whatever else happens: the result is that of an unbroken run, bit for bit."""

from __future__ import annotations

import os
import signal

import psutil

from p2d.pipeline import STEPS
from tests.faults.test_crashes import undisturbed
from tests.rig import Rig


def test_pause_and_resume_in_each_step_change_no_bit_of_the_result(rig: Rig) -> None:
    reference = undisturbed(rig)
    for step in STEPS:
        rig.steer("hold", step)
    job_id = rig.submit()

    with rig.in_process() as (worker,):
        for step in STEPS:
            child = rig.reached(step)
            assert rig.pause(job_id).status == "pausing"
            rig.paused(job_id)
            assert psutil.pid_exists(child), "a child that stopped by itself stays warm"
            rig.let_go(step)
            assert rig.resume(job_id).status == "queued"
            worker.wake()
        assert rig.ended(job_id).status == "succeeded"

    rig.check(job_id, like=reference)
    assert [attempt.step for attempt in rig.attempts(job_id) if attempt.outcome == "released"] == list(STEPS)
    assert all(step.crashes == 0 for step in rig.steps(job_id))


def test_training_goes_on_from_its_checkpoint_after_a_pause(rig: Rig) -> None:
    reference = undisturbed(rig)
    rig.steer("hold", "train", "3")
    job_id = rig.submit()

    with rig.in_process() as (worker,):
        rig.reached("train")
        rig.pause(job_id)
        progress = rig.paused(job_id).progress
        rig.let_go("train")
        rig.resume(job_id)
        assert rig.job(job_id).progress == progress
        worker.wake()
        assert rig.ended(job_id).status == "succeeded"

    assert [run.split()[-1] for run in rig.runs() if run.startswith("train")][1:] == ["fresh", "resumed"]
    rig.check(job_id, like=reference)


def test_a_worker_does_other_jobs_while_one_is_paused(rig: Rig) -> None:
    rig.steer("hold", "heads")
    job_id = rig.submit()

    with rig.in_process() as (worker,):
        rig.reached("heads")
        rig.pause(job_id)
        rig.paused(job_id)
        rig.let_go("heads")
        other = rig.submit(kind="identify_heads")
        worker.wake()
        assert rig.ended(other).status == "succeeded"

        rig.paused(job_id)
        rig.resume(job_id)
        worker.wake()
        assert rig.ended(job_id).status == "succeeded"

    rig.check(job_id)
    rig.check(other)


def test_a_child_that_does_not_hear_the_pause_is_killed_and_nothing_is_charged(rig: Rig) -> None:
    reference = undisturbed(rig)
    rig.steer("deaf", "train", "2")
    job_id = rig.submit()

    with rig.in_process() as (worker,):
        child = rig.reached("train")
        rig.pause(job_id)
        rig.paused(job_id)
        assert not psutil.pid_exists(child)
        rig.let_go("train")
        rig.resume(job_id)
        worker.wake()
        assert rig.ended(job_id).status == "succeeded"

    assert all(step.crashes == 0 for step in rig.steps(job_id))
    rig.check(job_id, like=reference)


def test_kill_9_of_the_worker_while_it_pauses_still_ends_in_a_pause(rig: Rig) -> None:
    reference = undisturbed(rig)
    rig.settings = rig.settings.model_copy(update={"cancel_grace_s": 30.0})  # the child is deaf: the worker would wait
    rig.steer("deaf", "train", "2")
    job_id = rig.submit()
    worker = rig.worker()
    rig.reached("train")
    rig.pause(job_id)

    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    rig.let_go("train")
    with rig.in_process() as (other,):
        rig.paused(job_id)  # another worker's sweep says so
        rig.resume(job_id)
        other.wake()
        assert rig.ended(job_id).status == "succeeded"

    assert [attempt.outcome for attempt in rig.attempts(job_id) if attempt.step == "train"] == ["lost", "done"]
    rig.check(job_id, like=reference)


def test_a_pause_followed_by_a_cancel_ends_cancelled(rig: Rig) -> None:
    rig.steer("deaf", "heads")  # so that the cancel comes while the job is still pausing
    job_id = rig.submit()

    with rig.in_process():
        rig.reached("heads")
        assert rig.pause(job_id).status == "pausing"
        assert rig.cancel(job_id).status == "cancelling"
        assert rig.ended(job_id).status == "cancelled"

    rig.check(job_id)
