"""Who holds which step: claim, renew and give back, each fenced by the attempt's token. By PostgreSQL's clock alone.

A claim locks only the step and never waits. Everything else locks the job first (app.db.jobs.lock_job), then the step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Text, case, cast, func, insert, literal, or_, select, text, update
from sqlalchemy.dialects.postgresql import JSONB

from app.db.engine import Connection, Json
from app.db.ids import new_id
from app.db.jobs import used_s
from app.db.objects import hold_objects
from app.db.tables import attempts, jobs, projects, steps
from app.errors import LeaseLost

Limit = Literal["deadline", "max_seconds", "max_gpu_seconds"]
"""What a job may reach."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """The right to work on one step until someone with a higher token takes it."""

    job_id: str
    step_id: str
    step: str
    shard: int
    shards: int
    token: int
    worker: str
    model_digest: str | None
    checkpoint: Json | None

    @property
    def attempt(self) -> str:
        """A short name of this attempt for logs and folders."""
        return f"{self.step}-{self.shard:05d}-{self.token}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """What a worker learns when it shows a sign of life."""

    cancel_requested: bool
    pause_requested: bool
    limit_reached: Limit | None
    """Because of which the job is to end."""


def claim(conn: Connection, *, queue: str, worker: str, lease_s: float, warm: str | None = None) -> Lease | None:
    """Take one ready step of the queue, or None.

    The project comes first of whose steps the fewest are running, whatever the queue, and among several of these the one that
    was served longest ago; of its steps those of the highest priority, of these those of the model that is loaded (`warm`),
    then the oldest. So a project that queues a thousand jobs delays another's by one step at most, with one worker too. A step
    whose output is just being computed for another job of the project waits for that one to end, in whatever way (`is_free`).
    Expired leases are not claimed here: the reconciler makes them ready, so that crashes are counted in one place.
    """
    found = _find_free(conn, queue, warm)
    if found is None:
        return None
    taken = conn.execute(
        update(steps)
        .where(steps.c.id == found)
        .values(
            status="running",
            token=steps.c.token + 1,
            lease_until=_lease_until(lease_s),
            worker=worker,
            started_at=func.now(),
            finished_at=None,
            progress=0,
        )
        .returning(
            steps.c.job_id,
            steps.c.id.label("step_id"),
            steps.c.step,
            steps.c.shard,
            steps.c.shards,
            steps.c.token,
            steps.c.worker,
            steps.c.model_digest,
            steps.c.checkpoint,
        )
    ).one()
    lease = Lease(**taken._mapping)
    _note_turn(conn, lease.step_id)
    # Before any work: an attempt that dies without a word is still on record.
    conn.execute(
        insert(attempts).values(
            id=new_id("att"), job_id=lease.job_id, step_id=lease.step_id, token=lease.token, worker=worker
        )
    )
    return lease


def _note_turn(conn: Connection, step_id: str) -> None:
    """The step's project was served now. Where another claim of it is just saying the same, that one's word is enough."""
    mine = select(steps.c.project_id).where(steps.c.id == step_id).scalar_subquery()
    row = select(projects.c.id).where(projects.c.id == mine).with_for_update(skip_locked=True, key_share=True)
    conn.execute(update(projects).where(projects.c.id.in_(row)).values(served_at=func.clock_timestamp()))


def is_free() -> ColumnElement[bool]:
    """Whether a step is there to be claimed: ready, and no running step of its project computes the same output."""
    twin = steps.alias("twin")
    same = (twin.c.project_id == steps.c.project_id) & (twin.c.fingerprint == steps.c.fingerprint)
    return (steps.c.status == "ready") & ~select(twin.c.id).where(twin.c.status == "running", same).correlate(
        steps
    ).exists()


def fence(conn: Connection, lease: Lease) -> None:
    """Lock the leased step until the caller's transaction ends. Raises LeaseLost if it is no longer this attempt's."""
    mine = (
        select(steps.c.id)
        .where(steps.c.id == lease.step_id, steps.c.token == lease.token, steps.c.status == "running")
        .with_for_update(key_share=True)
    )
    if conn.execute(mine).first() is None:
        raise LeaseLost(step_id=lease.step_id, token=lease.token)


def heartbeat(conn: Connection, lease: Lease, *, lease_s: float) -> Pulse:
    """Renew the lease and hear what the job wants. Raises LeaseLost."""
    renewed = conn.execute(
        update(steps)
        .where(steps.c.id == lease.step_id, steps.c.token == lease.token, steps.c.status == "running")
        .values(lease_until=_lease_until(lease_s))
    )
    if renewed.rowcount == 0:
        raise LeaseLost(step_id=lease.step_id, token=lease.token)
    return pulse(conn, lease.job_id)


def pulse(conn: Connection, job_id: str) -> Pulse:
    """Whether the job was asked to stop or to pause, and whether it reached a limit."""
    columns = (
        jobs.c.cancel_requested_at.is_not(None).label("cancel_requested"),
        jobs.c.pause_requested_at.is_not(None).label("pause_requested"),
        case(*((over, name) for name, over in _over().items())).label("limit_reached"),
    )
    return Pulse(**conn.execute(select(*columns).where(jobs.c.id == job_id)).one()._mapping)


def leave(
    conn: Connection,
    lease: Lease,
    status: Literal["ready", "blocked", "done", "failed", "cancelled"],
    *,
    charge_crash: int = 0,
    facts: Json | None = None,
    fingerprint: str | None = None,
    reused: Json | None = None,
) -> int:
    """End the lease of a fenced step with a status; returns the step's crashes so far.

    Args:   facts, fingerprint, reused: kept of a step that is done. reused: whose outputs it took; it then weighs nothing
            in the job's progress and time left.
    """
    values: dict[str, Any] = {"status": status, "lease_until": None, "crashes": steps.c.crashes + charge_crash}
    if status not in ("ready", "blocked"):
        values["finished_at"] = func.now()
        values["seconds"] = func.extract("epoch", func.now() - steps.c.started_at)
    if status == "done":
        values |= {"facts": facts, "fingerprint": fingerprint, "progress": 1, "checkpoint": None}
        values |= {"reused": reused, "weight": 0.001} if reused else {}
    query = update(steps).where(steps.c.id == lease.step_id).values(values).returning(steps.c.crashes)
    return int(conn.execute(query).scalar_one())


def set_checkpoint(conn: Connection, lease: Lease, checkpoint: Json) -> None:
    """Note on a fenced step where its next attempt goes on. Raises ObjectCollected."""
    hold_objects(conn, checkpoint["files"].values())
    # The time is PostgreSQL's, like all others of the ledger.
    stamped = func.jsonb_set(cast(checkpoint, JSONB), ["stored_at"], func.to_jsonb(func.now()))
    conn.execute(update(steps).where(steps.c.id == lease.step_id).values(checkpoint=stamped))


def set_step_progress(conn: Connection, lease: Lease, progress: float) -> None:
    """Note on a fenced step how far it is, 0 to 1; never falls within an attempt."""
    conn.execute(
        update(steps).where(steps.c.id == lease.step_id).values(progress=func.greatest(steps.c.progress, progress))
    )


def expired_leases(conn: Connection) -> list[Lease]:
    """Running steps whose worker has been silent for too long; nothing is locked or changed."""
    query = select(
        steps.c.job_id,
        steps.c.id.label("step_id"),
        steps.c.step,
        steps.c.shard,
        steps.c.shards,
        steps.c.token,
        steps.c.worker,
        steps.c.model_digest,
        steps.c.checkpoint,
    ).where(steps.c.status == "running", steps.c.lease_until < func.now())
    return [Lease(**row._mapping) for row in conn.execute(query.order_by(steps.c.id))]


def is_expired(conn: Connection, lease: Lease) -> bool:
    """Whether the lease, read under its fence, has still run out."""
    query = select(steps.c.lease_until < func.now()).where(steps.c.id == lease.step_id)
    return bool(conn.execute(query).scalar_one())


def ready_by_queue(conn: Connection) -> dict[str, int]:
    """How many steps wait for a worker, per queue."""
    query = select(steps.c.queue, func.count()).where(is_free()).group_by(steps.c.queue)
    return {row[0]: row[1] for row in conn.execute(query)}


def stale_jobs(conn: Connection) -> list[str]:
    """Unfinished jobs that need a decision without a worker: over their time, or asked to stop with nobody on them."""
    over = or_(*_over().values())
    held = select(steps.c.id).where(steps.c.job_id == jobs.c.id, steps.c.status == "running").exists()
    asked = jobs.c.cancel_requested_at.is_not(None) & ~held
    query = select(jobs.c.id).where(jobs.c.status.in_(["queued", "running", "pausing", "cancelling"]), over | asked)
    return [row[0] for row in conn.execute(query.order_by(jobs.c.id))]


def _over() -> dict[Limit, ColumnElement[bool]]:
    """Whether a job has reached each of its limits; null where it has none."""
    used_gpu_s = (
        select(
            func.sum(func.extract("epoch", func.coalesce(attempts.c.finished_at, func.now()) - attempts.c.started_at))
        )
        .where(attempts.c.job_id == jobs.c.id, attempts.c.started_at >= jobs.c.started_at)  # a retry counts anew
        .correlate(jobs)
        .scalar_subquery()
    )
    return {
        "deadline": func.now() > jobs.c.deadline_at,
        "max_seconds": used_s() > jobs.c.max_seconds,
        # Only where there is such a limit is anything added up: every heartbeat asks.
        "max_gpu_seconds": case((jobs.c.max_gpu_seconds.is_not(None), used_gpu_s > jobs.c.max_gpu_seconds)),
    }


def try_advisory_lock(conn: Connection, key: int) -> bool:
    """Take an advisory lock until the transaction ends; False if somebody else has it."""
    return bool(conn.execute(text("select pg_try_advisory_xact_lock(:key)"), {"key": key}).scalar_one())


def _find_free(conn: Connection, queue: str, warm: str | None) -> str | None:
    """Lock the step that is next to be claimed; its id, or None."""
    running = steps.alias("running")
    share = select(running.c.project_id, func.count().label("steps")).where(running.c.status == "running")
    share_of = share.group_by(running.c.project_id).subquery()
    free = (
        select(steps.c.id, steps.c.project_id, steps.c.fingerprint)
        .join(projects, projects.c.id == steps.c.project_id)
        .outerjoin(share_of, share_of.c.project_id == steps.c.project_id)
        .where(steps.c.queue == queue, is_free())
        .order_by(
            func.coalesce(share_of.c.steps, 0),
            projects.c.served_at.asc().nulls_first(),
            steps.c.priority.desc(),
            steps.c.model_digest.is_not_distinct_from(cast(literal(warm), Text)).desc(),
            steps.c.id,
        )
        .limit(1)
        .with_for_update(of=steps, skip_locked=True)
    )
    passed: list[str] = []
    while (found := conn.execute(free.where(steps.c.id.not_in(passed))).first()) is not None:
        if found.fingerprint is None or _is_first(conn, found.id, found.project_id + found.fingerprint):
            return str(found.id)
        passed.append(found.id)
    return None


def _is_first(conn: Connection, step_id: str, output: str) -> bool:
    """Whether no other claim of the same output is under way or has just been committed; none will until our commit."""
    lock = func.pg_try_advisory_xact_lock(func.hashtextextended(output, 0))
    if not conn.execute(select(lock)).scalar_one():
        return False
    return bool(conn.execute(select(is_free()).where(steps.c.id == step_id)).scalar_one())


def _lease_until(lease_s: float) -> Any:
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, lease_s)
