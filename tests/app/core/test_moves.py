"""What a user may ask of a job, without workers: pause, resume, cancel and retry in every status, and against a claim."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import update

from app.core import lifecycle
from app.core.erasure import erase, erase_all
from app.core.lifecycle import NEXT, StepFacts
from app.core.moves import MOVES
from app.core.submit import JobRequest, find_dataset, submit
from app.db.datasets import delete_dataset
from app.db.jobs import Status
from app.db.leases import Lease, claim, pulse
from app.db.tables import jobs
from app.errors import DatasetInUse, DatasetNotFound, LeaseLost, MoveNotAllowed
from app.settings import Settings
from p2d.config import JobConfig
from p2d.errors import Diverged
from p2d.model_info import read_model_info
from tests.app.db.test_leases import begin, expire, take
from tests.rig import Rig, make_rig, wait_for
from workers.reconcile import reconcile


@pytest.fixture
def rig(settings: Settings, tmp_path: Path) -> Iterator[Rig]:
    """A ledger without workers: these tests play them."""
    rig = make_rig(settings, tmp_path)
    yield rig
    rig.stop()


def finish(rig: Rig, lease: Lease) -> str:
    """End a step well; the job's status after it."""
    with rig.db.begin() as conn:
        return lifecycle.finish_step(conn, lease, [], StepFacts()).status


def release(rig: Rig, lease: Lease) -> str:
    """Give a step back as a worker does that heard of the pause; the job's status after it."""
    with rig.db.begin() as conn:
        return lifecycle.release_step(conn, lease).status


def finish_all(rig: Rig) -> None:
    """Work until there is nothing to claim."""
    while (lease := take(rig)) is not None:
        with rig.db.begin() as conn:
            lifecycle.begin_step(conn, lease)
        finish(rig, lease)


def path_of(rig: Rig, job_id: str) -> list[str]:
    """Every status that the job has had."""
    return [event.data["status"] for event in rig.events(job_id) if event.type == "job.status"]


def somebody_waits(rig: Rig) -> bool:
    """Whether a transaction waits for another one's lock."""
    locked = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    with rig.db.begin() as conn:
        return bool(conn.exec_driver_sql(locked).scalar_one())


def test_a_queued_job_is_paused_at_once_and_cannot_be_claimed(rig: Rig) -> None:
    job_id = rig.submit()

    assert rig.pause(job_id).status == "paused"

    assert take(rig) is None
    assert rig.job(job_id).started_at is None
    assert rig.resume(job_id).status == "queued"
    finish_all(rig)
    assert path_of(rig, job_id) == ["queued", "paused", "queued", "running", "succeeded"]
    rig.check_ledger(job_id)


def test_a_running_job_is_paused_when_its_last_step_has_stopped_and_nothing_is_charged(rig: Rig) -> None:
    job_id = rig.submit(rows=60)
    finish(rig, begin(rig))
    first, second = begin(rig), begin(rig)
    with rig.db.begin() as conn:
        lifecycle.record_checkpoint(conn, first, {"state.json": "0" * 64})

    assert rig.pause(job_id).status == "pausing"
    assert take(rig) is None, "steps that nobody has begun are held back at once"
    with rig.db.begin() as conn:
        assert pulse(conn, job_id).pause_requested
    assert release(rig, first) == "pausing"
    assert release(rig, second) == "paused"

    rig.paused(job_id)
    given_back = next(step for step in rig.steps(job_id) if step.id == first.step_id)
    assert (given_back.status, given_back.crashes) == ("blocked", 0)
    rig.resume(job_id)
    again = take(rig)
    assert again is not None
    assert again.step_id == first.step_id
    assert again.checkpoint is not None
    assert again.checkpoint["files"] == {"state.json": "0" * 64}
    with rig.db.begin() as conn:
        assert lifecycle.begin_step(conn, again).status == "running"


def test_a_step_that_ends_while_the_job_pauses_keeps_its_result(rig: Rig) -> None:
    job_id = rig.submit()
    lease = begin(rig)
    rig.pause(job_id)

    assert finish(rig, lease) == "paused"

    rig.paused(job_id)
    assert rig.steps(job_id)[0].status == "done"
    rig.resume(job_id)
    finish_all(rig)
    assert rig.job(job_id).status == "succeeded"
    rig.check_ledger(job_id)


def test_a_job_whose_last_step_ends_while_it_pauses_has_succeeded(rig: Rig) -> None:
    job_id = rig.submit()
    while (lease := begin(rig)).step != "package":
        finish(rig, lease)
    rig.pause(job_id)

    assert finish(rig, lease) == "succeeded"

    assert path_of(rig, job_id) == ["queued", "running", "pausing", "succeeded"]
    rig.check_ledger(job_id)


def test_a_step_that_fails_while_the_job_pauses_fails_the_job(rig: Rig) -> None:
    job_id = rig.submit()
    lease = begin(rig)
    rig.pause(job_id)

    with rig.db.begin() as conn:
        assert lifecycle.fail_step(conn, lease, Diverged("no")).status == "failed"

    rig.check_ledger(job_id)


def test_a_worker_that_is_lost_while_the_job_pauses_costs_a_crash_and_the_job_is_paused(rig: Rig) -> None:
    job_id = rig.submit()
    lease = begin(rig)
    rig.pause(job_id)

    expire(rig, lease)

    rig.paused(job_id)
    assert next((step.status, step.crashes) for step in rig.steps(job_id)) == ("blocked", 1)
    with pytest.raises(LeaseLost):
        finish(rig, lease)


def test_a_resume_before_the_pause_has_come_about_takes_it_back(rig: Rig) -> None:
    job_id = rig.submit()
    finish(rig, begin(rig))
    lease = begin(rig)
    rig.pause(job_id)

    assert rig.resume(job_id).status == "running"

    assert release(rig, lease) == "running", "its worker had heard of the pause already"
    finish_all(rig)
    assert path_of(rig, job_id) == ["queued", "running", "pausing", "running", "succeeded"]
    rig.check_ledger(job_id)


def test_a_claim_that_is_under_way_is_not_overlooked_by_a_pause(rig: Rig) -> None:
    job_id = rig.submit()
    with ThreadPoolExecutor(1) as pool:
        with rig.db.begin() as conn:
            lease = claim(conn, queue=rig.settings.worker_queue, worker="w", lease_s=60)
            pausing = pool.submit(rig.pause, job_id)
            wait_for(lambda: somebody_waits(rig), "the pause to wait for the claim")
        assert pausing.result(30).status == "pausing"
    assert lease is not None

    with rig.db.begin() as conn:
        assert lifecycle.begin_step(conn, lease).status == "pausing"
    assert release(rig, lease) == "paused"
    assert rig.job(job_id).started_at is None

    rig.resume(job_id)
    finish_all(rig)
    rig.check_ledger(job_id)


def test_cancel_ends_a_paused_job_at_once_and_a_pausing_one_with_its_last_step(rig: Rig) -> None:
    paused, pausing = rig.submit(), rig.submit()
    rig.pause(paused)
    lease = begin(rig)
    rig.pause(pausing)

    assert rig.cancel(paused).status == "cancelled"
    assert rig.cancel(pausing).status == "cancelling"
    assert release(rig, lease) == "cancelled"

    rig.check_ledger(paused)
    rig.check_ledger(pausing)


def test_a_retry_keeps_what_is_done_and_starts_the_rest_again(rig: Rig) -> None:
    job_id = rig.submit(rows=60)
    finish(rig, begin(rig))
    heads, late = begin(rig), begin(rig, by="late")
    with rig.db.begin() as conn:
        lifecycle.record_checkpoint(conn, late, {"state.json": "0" * 64})
        lifecycle.fail_step(conn, heads, Diverged("no"))
    failed = rig.job(job_id)

    job = rig.retry(job_id)

    assert (job.status, job.error, job.retries) == ("queued", None, 1)
    assert (job.started_at, job.finished_at) == (None, None)
    assert (job.stage, job.progress) == (failed.stage, failed.progress), "stage and progress never go back"
    assert {(step.step, step.status, step.crashes) for step in rig.steps(job_id)} == {
        ("validate", "done", 0),
        *((step, "ready", 0) for step in ("heads", "respond")),
        *((step, "blocked", 0) for step in ("select", "train", "evaluate", "package")),
    }
    with pytest.raises(LeaseLost):
        finish(rig, late)
    (kept,) = (step.checkpoint for step in rig.steps(job_id) if step.id == late.step_id)
    assert kept is not None
    assert kept["files"] == {"state.json": "0" * 64}
    finish_all(rig)
    assert path_of(rig, job_id) == ["queued", "running", "failed", "queued", "running", "succeeded"]
    told = [event.data["error"]["code"] for event in rig.events(job_id) if "error" in event.data]
    assert told == ["engine.diverged"], "the error stays in the log"
    rig.check_ledger(job_id)


def test_a_cancelled_job_is_retried_and_cancelled_again(rig: Rig) -> None:
    job_id = rig.submit()
    rig.cancel(job_id)

    assert rig.retry(job_id).cancel_requested_at is None

    finish(rig, begin(rig))
    assert rig.cancel(job_id).status == "cancelled"
    rig.check_ledger(job_id)


def test_a_claim_from_the_moment_in_which_the_job_ended_is_void_after_a_retry(rig: Rig) -> None:
    job_id = rig.submit()
    with ThreadPoolExecutor(1) as pool:
        with rig.db.begin() as conn:  # the cancel skips the step that is being claimed, the retry waits for it
            lease = claim(conn, queue=rig.settings.worker_queue, worker="w", lease_s=60)
            assert rig.cancel(job_id).status == "cancelled"
            retrying = pool.submit(rig.retry, job_id)
            wait_for(lambda: somebody_waits(rig), "the retry to wait for the claim")
        assert retrying.result(30).status == "queued"
    assert lease is not None

    with pytest.raises(LeaseLost), rig.db.begin() as conn:
        lifecycle.begin_step(conn, lease)
    finish_all(rig)
    assert rig.job(job_id).status == "succeeded"
    rig.check_ledger(job_id)


def test_a_job_whose_dataset_is_gone_is_not_retried(rig: Rig) -> None:
    job_id = rig.submit()
    rig.cancel(job_id)
    with rig.db.begin() as conn:
        assert delete_dataset(conn, rig.job(job_id).dataset_id)

    with pytest.raises(DatasetNotFound):
        rig.retry(job_id)

    rig.check_ledger(job_id)


def test_a_dataset_is_not_deleted_under_a_job_that_is_just_being_made(rig: Rig) -> None:
    earlier = rig.job(rig.submit())
    rig.cancel(earlier.id)

    def delete() -> None:
        with rig.db.begin() as conn:
            erase(conn, earlier.dataset_id)

    with ThreadPoolExecutor(1) as pool:
        with rig.db.begin() as conn:
            model = read_model_info(rig.settings.models_dir / "stub")
            dataset = find_dataset(conn, earlier.dataset_id, "/dataset", keep=True)
            request = JobRequest(config=JobConfig(), model=model, dataset=dataset)
            later = submit(conn, request, shard_rows=20, queue=rig.settings.worker_queue)
            deleting = pool.submit(delete)
            wait_for(lambda: somebody_waits(rig) or deleting.done(), "the deletion to wait for the job")
        with pytest.raises(DatasetInUse) as refused:
            deleting.result(30)
    assert refused.value.facts["by"] == [later.id]


def test_a_retry_has_the_whole_time_again(rig: Rig) -> None:
    job_id = rig.submit(max_seconds=100)
    finish(rig, begin(rig))
    with rig.db.begin() as conn:
        conn.execute(update(jobs).where(jobs.c.id == job_id).values(started_at="2000-01-01T00:00:00Z"))
    reconcile(rig.db, rig.waker, max_crashes=3)
    assert rig.job(job_id).status == "failed"

    rig.retry(job_id)

    reconcile(rig.db, rig.waker, max_crashes=3)
    begin(rig)
    reconcile(rig.db, rig.waker, max_crashes=3)
    assert rig.job(job_id).status == "running"


def test_repeating_a_move_changes_and_tells_nothing(rig: Rig) -> None:
    job_id = rig.submit()
    begin(rig)
    for move, status in [(rig.resume, "running"), (rig.pause, "pausing"), (rig.cancel, "cancelling")]:
        move(job_id)
        told = rig.job(job_id)

        assert move(job_id).status == status
        assert rig.job(job_id) == told


@pytest.mark.parametrize(
    ("move", "status"),
    [(move, status) for move in ("pause", "resume") for status in ("cancelling", "cancelled", "succeeded", "failed")]
    + [("retry", status) for status in ("queued", "running", "pausing", "paused", "cancelling", "succeeded")],
)
def test_a_move_that_the_status_forbids_names_those_that_it_allows(rig: Rig, move: str, status: Status) -> None:
    job_id = rig.submit()
    with rig.db.begin() as conn:
        conn.execute(update(jobs).where(jobs.c.id == job_id).values(status=status))

    with pytest.raises(MoveNotAllowed) as refused:
        getattr(rig, move)(job_id)

    assert refused.value.facts == {"job_id": job_id, "status": status, "move": move, "allowed": list(MOVES[status])}


def test_every_status_says_what_may_be_asked_of_it() -> None:
    assert set(MOVES) == set(NEXT)


def test_the_time_of_a_pause_does_not_count_against_the_limit(rig: Rig) -> None:
    job_id = rig.submit(max_seconds=100)
    lease = begin(rig)

    def age(column: str, seconds: int) -> None:
        with rig.db.begin() as conn:
            conn.exec_driver_sql(f"update jobs set {column} = now() - interval '{seconds} s' where id = '{job_id}'")

    def over() -> bool:
        with rig.db.begin() as conn:
            return pulse(conn, job_id).limit_reached is not None

    rig.pause(job_id)
    release(rig, lease)
    age("started_at", 1000)
    age("paused_at", 950)  # 50 seconds of work, then a long pause
    assert not over()
    rig.resume(job_id)
    assert not over(), "a resumed job does not pay for its place in the queue"

    begin(rig)
    assert not over()
    age("started_at", 1060)
    assert over(), "50 seconds before the pause and 60 after it"


def test_what_deleted_jobs_had_counted_is_added_in_one_order_whoever_deletes_them(rig: Rig) -> None:
    def done_and_cancelled() -> str:
        """Two jobs over the same rows; the dataset of the second."""
        rig.submit(kind="identify_heads", rows=37)
        finish_all(rig)
        stopped = rig.submit(kind="identify_heads", rows=37)
        finish(rig, begin(rig))
        lease = begin(rig)
        rig.cancel(stopped)
        with rig.db.begin() as conn:
            lifecycle.cancel_step(conn, lease)
        return rig.job(stopped).dataset_id

    def delete(dataset_id: str) -> int:
        with rig.db.begin() as conn:
            return len(erase_all(conn, dataset_id)[1])

    delete(done_and_cancelled())  # so that there is a row of everything
    again = done_and_cancelled()

    with ThreadPoolExecutor(1) as pool, rig.db.begin() as conn:
        # Another deletes a cancelled job: it has added to the first row of that, and goes on to the next ones.
        conn.exec_driver_sql("update tallies set number = number where outcome = 'cancelled'")
        deleted = pool.submit(delete, again)
        wait_for(lambda: somebody_waits(rig), "the deletion to wait")
        conn.exec_driver_sql("update tallies set number = number")

    assert deleted.result() == 2
