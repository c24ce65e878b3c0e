"""Wake-ups may be doubled, lost or flushed away, and the broker may be gone: no job runs twice and none is forgotten."""

from __future__ import annotations

import time

import redis
from pydantic import SecretStr

from tests.faults.test_crashes import undisturbed
from tests.rig import Rig


def test_the_same_wake_50_times_at_several_workers_runs_each_step_once(rig: Rig) -> None:
    reference = undisturbed(rig)
    rig.settings = rig.settings.model_copy(update={"poll_s": 60.0})  # so that only wake-ups make them look
    for _ in range(3):
        rig.worker()
    job_id = rig.submit()

    for _ in range(50):
        rig.waker.wake(rig.settings.worker_queue)
    assert rig.ended(job_id).status == "succeeded"

    assert {attempt.outcome for attempt in rig.attempts(job_id)} == {"done"}
    assert len(rig.attempts(job_id)) == len(rig.steps(job_id))
    rig.check(job_id, like=reference)


def test_flushall_in_the_middle_loses_nothing(rig: Rig) -> None:
    reference = undisturbed(rig)
    rig.settings = rig.settings.model_copy(update={"poll_s": 60.0})
    rig.steer("hold", "respond")
    first = rig.submit()
    rig.worker()
    rig.waker.wake(rig.settings.worker_queue)
    rig.reached("respond")
    waiting = [rig.submit(kind="identify_heads") for _ in range(5)]
    for _ in waiting:
        rig.waker.wake(rig.settings.worker_queue)

    with redis.Redis.from_url(rig.settings.url("broker_url")) as broker:
        broker.flushall()
    rig.let_go("respond")

    for job_id in (first, *waiting):
        assert rig.ended(job_id).status == "succeeded"
        rig.check(job_id)
    rig.check(first, like=reference)


def test_without_a_broker_workers_poll_and_leave_when_told(rig: Rig) -> None:
    rig.settings = rig.settings.model_copy(update={"broker_url": SecretStr("redis://127.0.0.1:1/0")})
    job_id = rig.submit()
    worker = rig.worker()

    assert rig.ended(job_id).status == "succeeded"

    told = time.monotonic()
    worker.terminate()
    worker.wait(30)
    assert time.monotonic() - told < 25
    rig.check(job_id)


def test_a_wake_up_that_was_never_sent_is_made_up_for(rig: Rig) -> None:
    """The gap between commit and wake-up: the sweep of another worker sends it again."""
    rig.settings = rig.settings.model_copy(update={"poll_s": 60.0})
    with rig.in_process() as (worker,):
        job_id = rig.submit(kind="identify_heads")
        rig.worker()  # it hears the sweep's wake-up through the broker
        assert rig.ended(job_id).status == "succeeded"
        assert worker.id

    rig.check(job_id)
