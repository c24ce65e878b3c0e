"""An estimate comes with the error that such estimates had, and the time left of a job with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text, update

from app.core import lifecycle
from app.core.foresight import SILENCE_S, Interval, estimate_json, share_done, stretched, time_left
from app.core.lifecycle import StepFacts
from app.db.estimates import DEFAULT, FEWEST, Error, past_errors
from app.db.leases import Lease, claim
from app.db.steps import Work, work_of
from app.db.tables import jobs, steps
from app.settings import Settings
from tests.rig import Rig, make_rig
from workers.reconcile import reconcile

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


def begin_heads(rig: Rig, *, package_s: float) -> tuple[str, Lease]:
    """A job whose heads, of ten seconds, have just been begun."""
    job_id = rig.submit(kind="identify_heads")
    finish(rig, StepFacts(estimate_s={"heads": 10.0, "package": package_s}))
    with rig.db.begin() as conn:
        lease = claim(conn, queue=rig.settings.worker_queue, worker="worker-1", lease_s=60)
        assert lease is not None
        lifecycle.begin_step(conn, lease)
    return job_id, lease


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


def work(whole: dict[str, float], share: dict[str, float], *, spent_s: float, running: dict[str, float]) -> Work:
    """What the ledger says of steps that are done to a share each, and how long the running ones have run."""
    left = {step: seconds * (1 - share.get(step, 0)) for step, seconds in whole.items()}
    paced = {step: seconds * (1 - share.get(step, 0) * (step in running)) for step, seconds in left.items()}
    own_s = sum((1 - share.get(step, 0)) * seconds for step, seconds in running.items())
    return Work(whole=whole, left=left, paced=paced, own_s=own_s, spent_s=spent_s)


def test_time_left_follows_the_errors_first_and_the_pace_of_the_job_then() -> None:
    whole = {"heads": 10.0, "train": 10.0}
    estimate = estimate_json(whole, {"heads": SLOW, "train": SLOW})

    fresh = time_left(work(whole, {}, spent_s=0, running={}), estimate)
    half = time_left(work(whole, {"heads": 1}, spent_s=5, running={}), estimate)

    assert fresh == Interval(p10=20, p50=40, p90=80)
    assert half.p50 == 5  # it runs at twice the speed that was estimated
    older = {"total_s": 20}  # of an earlier version
    assert time_left(work(whole, {"heads": 1}, spent_s=20, running={}), older).p50 == 20


def test_a_step_of_which_such_estimates_were_too_low_counts_for_more_of_the_progress() -> None:
    whole = {"heads": 10.0, "train": 10.0}
    half = work(whole, {"heads": 1}, spent_s=10, running={})

    assert share_done(half, None) == 0.5
    assert share_done(half, estimate_json(whole, {"train": Error(p10=2, p50=3, p90=4, runs=9)})) == 0.25


def test_a_running_step_goes_by_its_own_pace_the_more_of_it_is_done() -> None:
    whole = {"train": 100.0, "evaluate": 100.0}
    estimate = estimate_json(whole, {})

    def left(share: float) -> float:
        took_s = 400 * share  # four times what the rest of the job made likely
        found = work(whole, {"train": 1, "evaluate": share}, spent_s=100 + took_s, running={"evaluate": took_s})
        return time_left(found, estimate).p50

    assert left(0.5) == pytest.approx(0.5 * 100 * 0.5 * 2 + 0.5 * 200)  # the job's pace is 2 by now, its own 4
    assert left(0.98) == pytest.approx(8, rel=0.02)


def test_the_interval_narrows_more_slowly_than_what_is_left_and_is_never_past() -> None:
    whole = {"train": 10_000.0}
    estimate = estimate_json(whole, {})

    def found(share: float) -> Interval:
        done_s = 10_000 * share
        return time_left(work(whole, {"train": share}, spent_s=done_s, running={"train": done_s}), estimate)

    quarter, hundredth = found(0.75), found(0.99)
    assert [quarter.p50, hundredth.p50] == pytest.approx([2500, 100])
    assert quarter.p90 - quarter.p50 == pytest.approx(10_000 * (DEFAULT.p90 - 1) * (0.25 + 0.5) / 2)
    assert hundredth.p90 - hundredth.p50 == pytest.approx(10_000 * (DEFAULT.p90 - 1) * (0.01 + 0.1) / 2)
    assert 0 < hundredth.p10 < 100 * DEFAULT.p10
    for end in (found(1.0), found(0.999_999)):
        assert 0 <= end.p10 <= end.p50 <= end.p90
        assert end.p90 >= SILENCE_S  # until it is looked at anew


@pytest.mark.parametrize("evaluate_s", [50, 100, 200])
def test_most_intervals_of_a_job_hold_its_end_also_where_its_last_step_was_foreseen_wrongly(evaluate_s: int) -> None:
    whole, took = (
        {"heads": 50.0, "train": 100.0, "evaluate": 100.0},
        {"heads": 50, "train": 100, "evaluate": evaluate_s},
    )
    estimate, end = estimate_json(whole, {}), sum(took.values())

    held = []
    for now in range(5, end, 5):
        share, running, begun = dict[str, float](), dict[str, float](), 0
        for step, seconds in took.items():
            if begun < now:
                share[step] = min(1.0, (now - begun) / seconds)
                running = {step: now - begun} if share[step] < 1 else {}
            begun += seconds
        left = time_left(work(whole, share, spent_s=now, running=running), estimate)
        held.append(left.p10 <= end - now <= left.p90)

    assert sum(held) / len(held) >= 0.8


def test_the_ledger_tells_what_is_left_and_how_long_the_running_step_took(rig: Rig) -> None:
    job_id, lease = begin_heads(rig, package_s=2.0)
    with rig.db.begin() as conn:
        ten_s_ago = text("update steps set started_at = now() - interval '10 s', progress = 0.25 where id = :id")
        conn.execute(ten_s_ago, {"id": lease.step_id})
        conn.execute(update(steps).where(steps.c.job_id == job_id, steps.c.step == "validate").values(seconds=1))
        found = work_of(conn, job_id)

    assert (found.whole["heads"], found.whole["package"]) == (10, 2)
    assert found.left == {"validate": 0, "heads": 7.5, "package": 2}
    assert found.paced == {"validate": 0, "heads": pytest.approx(7.5 * 0.75), "package": 2}
    assert found.own_s == pytest.approx(7.5)
    assert found.spent_s == pytest.approx(11)


def test_a_step_that_says_nothing_is_foreseen_anew_and_a_job_that_nobody_works_on_not_at_all(rig: Rig) -> None:
    job_id, lease = begin_heads(rig, package_s=0.1)

    def pass_by() -> None:
        with rig.db.begin() as conn:
            past = "update jobs set eta_p10_at = now() - interval '3 s', eta_at = now() - interval '2 s',"
            past += " eta_p90_at = now() - interval '1 s', progress_at = now() - interval '1 min' where id = :id"
            conn.execute(text(past), {"id": job_id})

    pass_by()
    with rig.db.begin() as conn:
        lifecycle.look_ahead(conn, lease)
        now = conn.execute(text("select now()")).scalar_one()
    job = rig.job(job_id)
    assert job.eta_p90_at is not None
    assert job.eta_p90_at >= now
    assert rig.events(job_id)[-1].type == "job.progress"
    with rig.db.begin() as conn:
        lifecycle.release_step(conn, lease)
    pass_by()
    reconcile(rig.db, rig.waker, max_crashes=3)
    job = rig.job(job_id)
    assert (job.eta_p10_at, job.eta_at, job.eta_p90_at) == (None, None, None)


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
