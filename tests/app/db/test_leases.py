"""One step, one holder: claims under contention, and what a lease that is lost may still do (nothing)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import update

from app.core import lifecycle
from app.core.lifecycle import StepFacts
from app.db.artifacts import NewArtifact
from app.db.jobs import lock_job
from app.db.leases import Lease, claim
from app.db.projects import open_project
from app.db.steps import set_priority
from app.db.tables import steps
from app.errors import LeaseLost
from app.settings import Settings
from tests.rig import Rig, make_rig
from workers.reconcile import reconcile


@pytest.fixture
def rig(settings: Settings, tmp_path: Path) -> Iterator[Rig]:
    """A ledger without workers: these tests play them."""
    rig = make_rig(settings, tmp_path)
    yield rig
    rig.stop()


def take(rig: Rig, *, by: str = "worker-1", warm: str | None = None) -> Lease | None:
    """Claim as a worker does."""
    with rig.db.begin() as conn:
        return claim(conn, queue=rig.settings.worker_queue, worker=by, lease_s=60, warm=warm)


def begin(rig: Rig, *, by: str = "worker-1") -> Lease:
    """Claim and begin; there must be something to claim."""
    lease = take(rig, by=by)
    assert lease is not None
    with rig.db.begin() as conn:
        lifecycle.begin_step(conn, lease)
    return lease


def expire(rig: Rig, lease: Lease) -> None:
    """Let the lease run out and the sweep take the step away."""
    with rig.db.begin() as conn:
        conn.execute(update(steps).where(steps.c.id == lease.step_id).values(lease_until="2000-01-01T00:00:00Z"))
    reconcile(rig.db, rig.waker, max_crashes=3)


def test_no_step_is_claimed_twice_by_16_threads(rig: Rig) -> None:
    jobs = 60
    for _ in range(jobs):
        rig.submit()
    taken: list[str] = []

    def work(number: int) -> None:
        while lease := take(rig, by=f"worker-{number}"):
            taken.append(lease.step_id)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(work, range(16)))

    assert len(taken) == jobs
    assert max(Counter(taken).values()) == 1


def test_a_claim_does_not_wait_for_another_claim(rig: Rig) -> None:
    rig.submit()
    rig.submit()
    with rig.db.begin() as slow:
        first = claim(slow, queue=rig.settings.worker_queue, worker="worker-1", lease_s=60)
        second = take(rig, by="worker-2")
        third = take(rig, by="worker-3")

    assert first is not None
    assert second is not None
    assert first.job_id != second.job_id
    assert third is None


def test_a_worker_that_lost_its_lease_can_write_nothing(rig: Rig) -> None:
    job_id = rig.submit()
    late = begin(rig)
    expire(rig, late)
    begin(rig, by="worker-2")
    before = rig.job(job_id), rig.steps(job_id), rig.events(job_id)

    file = NewArtifact(name="rows.jsonl", media_type="application/x-ndjson", sha256="0" * 64, size_bytes=1)
    for write in (
        lambda conn: lifecycle.finish_step(conn, late, [file], StepFacts()),
        lambda conn: lifecycle.record_progress(conn, late, 1, 2, {}),
        lambda conn: lifecycle.record_checkpoint(conn, late, {"a": "0" * 64}),
        lambda conn: lifecycle.fail_step(conn, late, LeaseLost(step_id="x", token=1)),
        lambda conn: lifecycle.lose_step(conn, late, max_crashes=1),
        lambda conn: lifecycle.renew(conn, late, lease_s=60),
        lambda conn: lifecycle.release_step(conn, late),
        lambda conn: lifecycle.cancel_step(conn, late),
        lambda conn: lifecycle.begin_step(conn, late),
    ):
        with pytest.raises(LeaseLost), rig.db.begin() as conn:
            write(conn)

    assert (rig.job(job_id), rig.steps(job_id), rig.events(job_id)) == before
    assert rig.artifacts(job_id) == {}


def test_five_sweeps_at_once_charge_one_crash(rig: Rig) -> None:
    job_id = rig.submit()
    lease = begin(rig)
    with rig.db.begin() as conn:
        conn.execute(update(steps).where(steps.c.id == lease.step_id).values(lease_until="2000-01-01T00:00:00Z"))

    together = threading.Barrier(5)

    def sweep(_: int) -> None:
        together.wait()
        reconcile(rig.db, rig.waker, max_crashes=3)

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(sweep, range(5)))

    assert rig.steps(job_id)[0].crashes == 1
    assert [attempt.outcome for attempt in rig.attempts(job_id)] == ["lost"]


def test_a_worker_prefers_steps_of_the_model_that_it_has_loaded(rig: Rig) -> None:
    older, newer = rig.submit(kind="identify_heads"), rig.submit(kind="identify_heads")
    for _ in range(2):
        lease = begin(rig)
        with rig.db.begin() as conn:
            lifecycle.finish_step(conn, lease, [], StepFacts())
    last = rig.steps(newer)[1]
    with rig.db.begin() as conn:
        conn.execute(update(steps).where(steps.c.id == last.id).values(model_digest="other"))
    assert rig.steps(older)[1].status == last.status == "ready"

    preferred = take(rig, warm="other")

    assert preferred is not None
    assert preferred.step_id == last.id


def test_projects_take_turns_however_much_one_of_them_queues(rig: Rig) -> None:
    with rig.db.begin() as conn:
        greedy, modest, third = (open_project(conn, name) for name in ("greedy", "modest", "third"))
    first = {rig.submit(project=greedy) for _ in range(20)}
    later = [rig.submit(project=project) for project in (modest, third, modest)]

    taken = [begin(rig, by=f"worker-{number}") for number in range(6)]

    # The oldest first, then those of whom nothing runs, then equal shares again, oldest first.
    assert taken[0].job_id in first
    assert [lease.job_id for lease in taken[1:3]] == later[:2]
    assert taken[3].job_id in first
    assert taken[4].job_id == later[2]
    assert taken[5].job_id in first  # nobody else has anything to claim

    for lease in taken[:4]:
        with rig.db.begin() as conn:
            lifecycle.release_step(conn, lease)
    again = begin(rig)
    assert rig.job(again.job_id).project_id == third  # of whom nothing runs any more


def test_one_worker_alone_serves_projects_in_turns_whatever_their_priorities(rig: Rig) -> None:
    with rig.db.begin() as conn:
        eager, calm = (open_project(conn, name) for name in ("eager", "calm"))
    for _ in range(3):
        rig.submit(project=eager, priority=5)
    rig.submit(project=calm)

    served = []
    for _ in range(4):
        lease = begin(rig)
        served.append(rig.job(lease.job_id).project_id)
        with rig.db.begin() as conn:
            lifecycle.release_step(conn, lease)

    assert served == [eager, calm, eager, calm]


def test_a_loaded_model_does_not_keep_the_turn_of_another_project(rig: Rig) -> None:
    with rig.db.begin() as conn:
        greedy, modest = (open_project(conn, name) for name in ("greedy", "modest"))
    mine = [rig.submit(project=greedy) for _ in range(2)]
    begin(rig)
    theirs = rig.submit(project=modest)
    with rig.db.begin() as conn:
        conn.execute(update(steps).where(steps.c.job_id == mine[1]).values(model_digest="warm"))

    lease = take(rig, warm="warm")

    assert lease is not None
    assert lease.job_id == theirs


def test_a_higher_priority_is_claimed_first_and_may_change_later(rig: Rig) -> None:
    low, high, older = rig.submit(), rig.submit(priority=3), rig.submit()
    first, second = take(rig), take(rig)
    assert first is not None
    assert second is not None
    assert (first.job_id, second.job_id) == (high, low)

    newer = rig.submit()
    with rig.db.begin() as conn:
        lock_job(conn, newer)
        set_priority(conn, newer, 1)

    third, fourth = take(rig), take(rig)
    assert third is not None
    assert fourth is not None
    assert (third.job_id, fourth.job_id) == (newer, older)


def test_a_step_claimed_while_its_job_ends_is_left_alone_and_tidied_up(rig: Rig) -> None:
    job_id = rig.submit()
    with rig.db.begin() as claiming:
        lease = claim(claiming, queue=rig.settings.worker_queue, worker="worker-1", lease_s=60)
        assert lease is not None
        assert rig.cancel(job_id).status == "cancelled"  # does not wait for the claim
    with pytest.raises(LeaseLost), rig.db.begin() as conn:
        lifecycle.begin_step(conn, lease)

    expire(rig, lease)

    rig.check_ledger(job_id)
