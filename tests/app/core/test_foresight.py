"""An estimate comes with the error that such estimates had, and the time left of a job with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text, update

from app.core import lifecycle
from app.core.foresight import Interval, estimate_json, stretched, time_left
from app.core.lifecycle import StepFacts
from app.db.estimates import DEFAULT, FEWEST, Error, past_errors
from app.db.leases import claim
from app.db.steps import Work
from app.db.tables import jobs, steps
from app.settings import Settings
from tests.rig import Rig, make_rig

SLOW = Error(p10=1.0, p50=2.0, p90=4.0, runs=9)


@pytest.fixture
def rig(settings: Settings, tmp_path: Path) -> Iterator[Rig]:
    """A ledger without workers, and without the steps of the test before."""
    rig = make_rig(settings, tmp_path)
    with rig.db.begin() as conn:
        conn.execute(update(steps).values(token=2))  # not in one go, so nothing is judged by them
    yield rig
    rig.stop()


def finish(rig: Rig, facts: StepFacts) -> None:
    with rig.db.begin() as conn:
        lease = claim(conn, queue=rig.settings.worker_queue, worker="worker-1", lease_s=60)
        assert lease is not None
        lifecycle.begin_step(conn, lease)
        lifecycle.finish_step(conn, lease, [], facts)


def finish_one(rig: Rig, *, took_s: float) -> str:
    """A job whose step `heads` was estimated at 10 s and took another time."""
    job_id = rig.submit(kind="identify_heads")
    finish(rig, StepFacts(estimate_s={"heads": 10.0, "package": 0.1}))
    finish(rig, StepFacts())
    finish(rig, StepFacts())
    with rig.db.begin() as conn:
        conn.execute(update(steps).where(steps.c.job_id == job_id, steps.c.step == "heads").values(seconds=took_s))
    return job_id


def test_what_is_estimated_is_stretched_by_the_errors_of_its_steps() -> None:
    seconds = {"heads": 10.0, "train": 5.0}

    assert stretched(seconds, {"heads": SLOW}) == Interval(p10=10 + 3, p50=20 + 5, p90=40 + 10)
    kept = estimate_json(seconds, {"heads": SLOW})
    assert kept["total_s"] == 15
    assert kept["interval_s"] == {"p10": 13, "p50": 25, "p90": 50}
    assert kept["errors"]["heads"]["runs"] == 9
    assert kept["errors"]["train"]["runs"] == DEFAULT.runs == 0


def test_time_left_follows_the_errors_first_and_the_pace_of_the_job_then() -> None:
    estimate = estimate_json({"heads": 10.0, "train": 10.0}, {"heads": SLOW, "train": SLOW})

    fresh = time_left(Work(total_s=20, left={"heads": 10, "train": 10}, spent_s=0), estimate)
    half = time_left(Work(total_s=20, left={"heads": 0, "train": 10}, spent_s=5), estimate)

    assert fresh == Interval(p10=20, p50=40, p90=80)
    assert half == Interval(p10=2.5, p50=5, p90=10)  # it runs at twice the speed that was estimated
    assert (
        time_left(Work(total_s=20, left={"train": 10}, spent_s=20), {"total_s": 20}).p50 == 20
    )  # of an earlier version


def test_errors_are_learnt_from_finished_steps_once_there_are_some(rig: Rig) -> None:
    for took_s in (8, 10, 12, 14):
        finish_one(rig, took_s=took_s)
    with rig.db.begin() as conn:
        assert past_errors(conn) == {}
    finish_one(rig, took_s=30)

    with rig.db.begin() as conn:
        (found,) = past_errors(conn).items()

    assert FEWEST == 5
    step, error = found
    assert (step, error.runs) == ("heads", 5)
    assert (error.p10, error.p50, error.p90) == pytest.approx((0.88, 1.2, 2.36))

    job_id = rig.submit(kind="identify_heads")
    finish(rig, StepFacts(estimate_s={"heads": 100.0, "package": 0.1}))
    job = rig.job(job_id)
    assert job.estimate is not None
    assert job.estimate["errors"]["heads"]["runs"] == 5
    assert job.estimate["interval_s"]["p50"] == pytest.approx(120.1)
    assert job.eta_p10_at is not None
    assert job.eta_at is not None
    assert job.eta_p90_at is not None
    with rig.db.begin() as conn:
        now = conn.execute(text("select now()")).scalar_one()
    assert [round((at - now).total_seconds()) for at in (job.eta_p10_at, job.eta_at, job.eta_p90_at)] == pytest.approx(
        [89, 121, 237], abs=5
    )


def test_steps_that_were_tried_again_or_had_no_estimate_teach_nothing(rig: Rig) -> None:
    for _ in range(5):
        resumed, guessed = finish_one(rig, took_s=10), finish_one(rig, took_s=10)
        with rig.db.begin() as conn:
            conn.execute(update(steps).where(steps.c.job_id == resumed).values(token=2))
            conn.execute(update(jobs).where(jobs.c.id == guessed).values(estimate=None))

    with rig.db.begin() as conn:
        assert past_errors(conn) == {}
