"""The rules of a job's life, without workers: states, progress, and everybody doing everything at once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import update

from app.core import lifecycle, moves
from app.core.lifecycle import NEXT, STAGES, StepFacts
from app.db.jobs import FINAL
from app.db.leases import claim, pulse
from app.db.tables import jobs, steps
from app.errors import JobAlreadyFinal, LeaseLost, MoveNotAllowed
from app.result_errors import DeadlinePassed
from app.settings import Settings
from p2d.errors import Diverged
from p2d.pipeline import STEPS
from tests.app.db.test_leases import begin
from tests.rig import Rig, make_rig, wait_for
from workers.reconcile import reconcile


@pytest.fixture
def rig(settings: Settings, tmp_path: Path) -> Iterator[Rig]:
    """A ledger without workers: these tests play them."""
    rig = make_rig(settings, tmp_path)
    yield rig
    rig.stop()


def finish(rig: Rig, facts: StepFacts | None = None) -> str:
    """Claim the next step and end it at once; its name."""
    lease = begin(rig)
    with rig.db.begin() as conn:
        lifecycle.finish_step(conn, lease, [], facts or StepFacts())
    return lease.step


def test_the_stages_of_the_engine_are_those_of_the_service() -> None:
    assert {spec.stage for spec in STEPS.values()} == set(STAGES)


def test_out_of_a_final_state_leads_only_a_retry_and_every_other_leads_to_one() -> None:
    assert {status for status, following in NEXT.items() if following <= {"queued"}} == FINAL
    assert all(following & FINAL for status, following in NEXT.items() if status not in FINAL)


def test_steps_wait_for_all_shards_of_those_before_them(rig: Rig) -> None:
    rig.submit(rows=60)  # three shards

    order = [finish(rig) for _ in range(9)]

    assert order == ["validate", "heads", "respond", "respond", "respond", "select", "train", "evaluate", "package"]


def test_the_rate_that_training_found_stands_in_the_resolved_config(rig: Rig) -> None:
    job_id = rig.submit()
    before = rig.job(job_id).resolved
    assert before is not None
    assert before["config"]["training"]["learning_rate"] == "auto"

    while (step := finish(rig, StepFacts(learning_rate=4e-3))) != "train":
        assert step != "package"
    finish(rig)

    after = rig.job(job_id).resolved
    assert after is not None
    assert after["config"]["training"] == {**before["config"]["training"], "learning_rate": 4e-3}
    assert after["reasons"]["/training/learning_rate"] == "the best of a short search on held-out rows"


def test_progress_follows_the_estimated_seconds_and_never_falls(rig: Rig) -> None:
    job_id = rig.submit(rows=60)
    plan = {
        "validate": 1.0,
        "heads": 9.0,
        "respond": 30.0,
        "select": 1.0,
        "train": 50.0,
        "evaluate": 8.0,
        "package": 1.0,
    }
    finish(rig, StepFacts(estimate_s=plan))
    after_validate = rig.job(job_id)
    finish(rig)
    after_heads = rig.job(job_id)
    lease = begin(rig)
    with rig.db.begin() as conn:
        lifecycle.record_progress(conn, lease, 1, 2, {})
        lifecycle.record_progress(conn, lease, 0, 2, {})  # a step that counts anew does not take the job back
    half_a_shard = rig.job(job_id)

    assert after_validate.progress == pytest.approx(0.01)
    assert after_validate.eta_at is not None
    assert after_heads.progress == pytest.approx(0.10)
    assert half_a_shard.progress == pytest.approx(0.15)
    rig.cancel(job_id)
    with rig.db.begin() as conn:
        assert lifecycle.cancel_step(conn, lease).status == "cancelled"
    rig.check_ledger(job_id)


def test_one_second_holds_at_most_one_progress_event(rig: Rig) -> None:
    job_id = rig.submit()
    lease = begin(rig)

    started = time.monotonic()
    for done in range(30):
        with rig.db.begin() as conn:
            lifecycle.record_progress(conn, lease, done, 30, {})
    took_s = time.monotonic() - started

    told = [event for event in rig.events(job_id) if event.type == "job.progress"]
    assert 1 <= len(told) <= 1 + took_s


def test_a_metric_that_is_not_finite_is_left_out(rig: Rig) -> None:
    job_id = rig.submit()
    lease = begin(rig)

    with rig.db.begin() as conn:
        lifecycle.record_progress(conn, lease, 1, 2, {"loss": 1.5, "norm": float("nan"), "rate": float("inf")})

    metric = next(event for event in rig.events(job_id) if event.type == "metric")
    assert metric.data["values"] == {"loss": 1.5}


def test_a_failed_shard_stops_the_others_and_the_job(rig: Rig) -> None:
    job_id = rig.submit(rows=60)
    finish(rig)
    finish(rig)
    leases = [begin(rig, by=f"worker-{n}") for n in range(3)]

    with rig.db.begin() as conn:
        assert lifecycle.fail_step(conn, leases[1], Diverged("The loss was not finite.")).status == "failed"

    for other in (leases[0], leases[2]):
        with pytest.raises(LeaseLost), rig.db.begin() as conn:
            lifecycle.finish_step(conn, other, [], StepFacts())
    rig.check_ledger(job_id)


def test_a_job_over_its_time_ends_even_with_no_worker_on_it(rig: Rig) -> None:
    job_id = rig.submit(max_seconds=60)
    finish(rig)
    with rig.db.begin() as conn:
        conn.execute(update(jobs).where(jobs.c.id == job_id).values(started_at="2000-01-01T00:00:00Z"))

    reconcile(rig.db, rig.waker, max_crashes=3)

    error = rig.job(job_id).error
    assert error is not None
    assert error["code"] == "job.limit_reached"
    rig.check_ledger(job_id)


def test_what_workers_spend_is_added_up_over_attempts_while_waiting_and_earlier_tries_are_free(rig: Rig) -> None:
    job_id, other = (rig.submit(max_gpu_seconds=100) for _ in range(2))
    finish(rig)
    with rig.db.begin() as conn:
        # It was first claimed an hour ago and waited for most of it.
        conn.exec_driver_sql("update jobs set started_at = now() - interval '1 hour' where id = %s", (job_id,))
        conn.exec_driver_sql(
            "update attempts set started_at = now() - interval '99 seconds', finished_at = now() where job_id = %s",
            (job_id,),
        )
    reconcile(rig.db, rig.waker, max_crashes=3)
    assert not rig.job(job_id).is_final

    with rig.db.begin() as conn:
        conn.exec_driver_sql(
            "insert into attempts (id, job_id, step_id, token, worker, started_at, finished_at) select 'att_2', job_id, step_id,"
            " 99, worker, now() - interval '2 seconds', now() from attempts where job_id = %s",
            (job_id,),
        )
    reconcile(rig.db, rig.waker, max_crashes=3)

    error = rig.job(job_id).error
    assert error is not None
    assert (error["code"], error["facts"]["limit"]) == ("job.limit_reached", "max_gpu_seconds")
    assert not rig.job(other).is_final
    rig.retry(job_id)
    reconcile(rig.db, rig.waker, max_crashes=3)
    assert rig.job(job_id).status == "queued"


def test_the_first_attempt_counts_against_what_a_job_may_cost_and_so_does_the_first_of_a_retry(rig: Rig) -> None:
    job_id = rig.submit(max_gpu_seconds=100)

    for run in ("the first", "a retry"):
        lease = begin(rig)
        with rig.db.begin() as conn:
            assert pulse(conn, job_id).limit_reached is None
            conn.exec_driver_sql("update jobs set started_at = started_at - interval '101 seconds'")
            conn.exec_driver_sql(
                "update attempts set started_at = started_at - interval '101 seconds' where outcome = 'running'"
            )
        with rig.db.begin() as conn:
            assert pulse(conn, job_id).limit_reached == "max_gpu_seconds", run
        with rig.db.begin() as conn:
            lifecycle.fail_step(conn, lease, Diverged("The loss was not finite."))
        rig.retry(job_id)


@pytest.mark.parametrize("begun", [False, True])
def test_a_job_past_its_deadline_ends_even_if_it_still_waits(rig: Rig, begun: bool) -> None:
    job_id, other = (rig.submit(max_seconds=60, deadline="2999-01-01T00:00:00Z") for _ in range(2))
    if begun:
        finish(rig)
    with rig.db.begin() as conn:
        conn.execute(update(jobs).where(jobs.c.id == job_id).values(deadline_at="2000-01-01T00:00:00Z"))

    reconcile(rig.db, rig.waker, max_crashes=3)

    error = rig.job(job_id).error
    assert error is not None
    assert (error["code"], error["facts"]["limit"]) == ("job.limit_reached", "deadline")
    assert not rig.job(other).is_final
    with pytest.raises(DeadlinePassed):
        rig.retry(job_id)
    rig.check_ledger(job_id)


def test_everybody_doing_everything_at_once_deadlocks_nobody_and_ends_every_job(rig: Rig, seed: int) -> None:
    """Workers that finish, fail, crash, go away or forget; users that pause, resume, cancel; sweeps; all on ten jobs."""
    job_ids = [rig.submit(rows=60) for _ in range(10)]
    over, errors = threading.Event(), []

    def work(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while not over.is_set():
            try:
                act(rng)
            except (LeaseLost, JobAlreadyFinal, MoveNotAllowed):
                pass
            except BaseException as error:
                errors.append(error)
                raise

    def act(rng: random.Random) -> None:
        what = rng.random()
        if what < 0.02:
            with rig.db.begin() as conn:
                moves.request_cancel(conn, rng.choice(job_ids))
            return
        if what < 0.08:
            with rig.db.begin() as conn:
                (moves.request_pause if what < 0.04 else moves.request_resume)(conn, rng.choice(job_ids))
            return
        if what < 0.14:
            reconcile(rig.db, rig.waker, max_crashes=3)
            return
        with rig.db.begin() as conn:
            lease = claim(conn, queue=rig.settings.worker_queue, worker="storm", lease_s=0.05)
        if lease is None:
            return
        with rig.db.begin() as conn:
            job = lifecycle.begin_step(conn, lease)
        with rig.db.begin() as conn:
            lifecycle.record_progress(conn, lease, 1, 2, {"loss": 1.0})
        with rig.db.begin() as conn:
            if job.cancel_requested_at is not None:
                lifecycle.cancel_step(conn, lease)
            elif job.pause_requested_at is not None and what > 0.5:
                lifecycle.release_step(conn, lease)
            elif what < 0.19:
                lifecycle.lose_step(conn, lease, max_crashes=3)
            elif what < 0.24:
                lifecycle.release_step(conn, lease)
            elif what < 0.25:
                lifecycle.fail_step(conn, lease, Diverged("no"))
            elif what > 0.34:
                lifecycle.finish_step(conn, lease, [], StepFacts(estimate_s={"train": rng.random() * 100}))
            # else: forget it; the lease runs out

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: errors or all(rig.job(job_id).is_final for job_id in job_ids), "the end of all jobs")
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert errors == []

    with rig.db.begin() as conn:  # claims that were forgotten just before the end
        conn.execute(update(steps).where(steps.c.status == "running").values(lease_until="2000-01-01T00:00:00Z"))
    reconcile(rig.db, rig.waker, max_crashes=3)
    for job_id in job_ids:
        rig.check_ledger(job_id)
