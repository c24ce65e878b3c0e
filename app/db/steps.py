"""Rows about steps: the units of a job that workers claim. Who holds one is the business of app.db.leases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, bindparam, case, func, select, text, update
from sqlalchemy.dialects.postgresql import JSONB

from app.db.engine import Connection, Json
from app.db.ids import new_id
from app.db.jobs import Job
from app.db.tables import steps

StepStatus = Literal["blocked", "ready", "running", "done", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NewStep:
    """A step to be recorded with its job. `after` names steps; all their shards must be done first."""

    step: str
    shard: int
    shards: int
    after: tuple[str, ...]
    queue: str
    model_digest: str | None
    weight: float
    """Estimated seconds: the step's share of the job's progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step, or one shard of it, as the ledger knows it."""

    id: str
    project_id: str
    job_id: str
    step: str
    shard: int
    shards: int
    after: list[str]
    status: StepStatus
    token: int
    lease_until: datetime | None
    worker: str | None
    crashes: int
    queue: str
    priority: int
    model_digest: str | None
    weight: float
    progress: float
    checkpoint: Json | None
    facts: Json | None
    fingerprint: str | None
    reused: Json | None
    seconds: float | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


# One short statement for any number of rows: psycopg reads a long one anew each time, and many ones are many words.
_INSERTED = "id, job_id, step, shard, shards, after, status, queue, priority, model_digest, weight"
_OPEN = text(
    f"""with told as (insert into events (job_id, seq, type, data) values (:job_id, 1, 'job.status', :data))
    insert into steps ({_INSERTED}) select {_INSERTED} from jsonb_populate_recordset(null::steps, :rows)"""  # noqa: S608 - of constants
).bindparams(bindparam("rows", type_=JSONB), bindparam("data", type_=JSONB))


def open_steps(conn: Connection, job: Job, new: Sequence[NewStep]) -> None:
    """Record the steps of a job that was just inserted, in the order given, and its first event.

    Steps that wait for nothing are ready at once.
    """
    values = [
        {
            "id": new_id("step"),
            "job_id": job.id,
            "step": step.step,
            "shard": step.shard,
            "shards": step.shards,
            "after": list(step.after),
            "status": "blocked" if step.after else "ready",
            "queue": step.queue,
            "priority": job.priority,
            "model_digest": step.model_digest,
            "weight": step.weight,
        }
        for step in new
    ]
    conn.execute(_OPEN, {"job_id": job.id, "data": {"status": job.status}, "rows": values})


def list_steps(conn: Connection, job_id: str) -> list[Step]:
    """All steps of a job, in the order they were planned."""
    rows = conn.execute(select(steps).where(steps.c.job_id == job_id).order_by(steps.c.id))
    return [Step(**row._mapping) for row in rows]


def find_step(conn: Connection, project_id: str, fingerprint: str) -> Step | None:
    """The project's newest step of this fingerprint that is done, or None."""
    mine = steps.c.project_id == project_id
    query = select(steps).where(steps.c.fingerprint == fingerprint, mine, steps.c.status == "done")
    row = conn.execute(query.order_by(steps.c.id.desc()).limit(1)).first()
    return Step(**row._mapping) if row else None


def set_fingerprints(conn: Connection, fingerprints: Mapping[str, str]) -> None:
    """Note on steps of a locked job, by their ids, what they are going to compute."""
    if fingerprints:
        known = [{"step_id": step_id, "known": known} for step_id, known in fingerprints.items()]
        conn.execute(
            update(steps).where(steps.c.id == bindparam("step_id")).values(fingerprint=bindparam("known")), known
        )


def unblock_steps(conn: Connection, job_id: str) -> int:
    """Make every blocked step ready whose steps before it are all done. The job must be locked. Returns how many."""
    unfinished = steps.alias("unfinished")
    waits = (
        select(unfinished.c.id)
        .where(
            unfinished.c.job_id == steps.c.job_id,
            unfinished.c.status != "done",
            unfinished.c.step == func.any(steps.c.after),
        )
        .exists()
    )
    done = conn.execute(
        update(steps).where(steps.c.job_id == job_id, steps.c.status == "blocked", ~waits).values(status="ready")
    )
    return done.rowcount


def count_unfinished(conn: Connection, job_id: str) -> int:
    """How many steps of the job are not done yet."""
    query = select(func.count()).where(steps.c.job_id == job_id, steps.c.status != "done")
    return int(conn.execute(query).scalar_one())


def stop_waiting_steps(conn: Connection, job_id: str) -> None:
    """Cancel the steps of a locked job that nobody has claimed yet; one that is just being claimed is left alone."""
    # SKIP LOCKED, because a claim holds a step's lock without the job's: whoever claims it reads the job next.
    waiting = (
        select(steps.c.id)
        .where(steps.c.job_id == job_id, steps.c.status.in_(["blocked", "ready"]))
        .with_for_update(skip_locked=True)
    )
    conn.execute(update(steps).where(steps.c.id.in_(waiting)).values(status="cancelled", finished_at=func.now()))


def hold_waiting_steps(conn: Connection, job_id: str) -> None:
    """Leave nothing to claim of a locked job; `unblock_steps` undoes it. A claim that is under way is waited for."""
    # Claims wait for nothing, so this cannot deadlock; and whoever is faster is counted as running by the caller.
    conn.execute(update(steps).where(steps.c.job_id == job_id, steps.c.status == "ready").values(status="blocked"))


def set_priority(conn: Connection, job_id: str, priority: int) -> None:
    """Let the steps of a locked job be claimed before those of lower priority from now on."""
    conn.execute(update(steps).where(steps.c.job_id == job_id, steps.c.status != "done").values(priority=priority))


def revoke_running_steps(conn: Connection, job_id: str) -> None:
    """Take running steps of a locked job away from their workers: their next write raises LeaseLost."""
    conn.execute(
        update(steps)
        .where(steps.c.job_id == job_id, steps.c.status == "running")
        .values(status="cancelled", lease_until=None, finished_at=func.now(), seconds=_seconds())
    )


def restart_steps(conn: Connection, job_id: str) -> None:
    """Block every step of a locked job that is not done, as if never tried, but for its checkpoint and its token.

    The token goes on, so that no worker of an earlier attempt can write any more.
    """
    conn.execute(
        update(steps)
        .where(steps.c.job_id == job_id, steps.c.status != "done")
        .values(status="blocked", lease_until=None, crashes=0, started_at=None, finished_at=None, seconds=None)
    )


def count_running(conn: Connection, job_id: str) -> int:
    """How many steps of the job a worker holds now."""
    query = select(func.count()).where(steps.c.job_id == job_id, steps.c.status == "running")
    return int(conn.execute(query).scalar_one())


def set_weights(conn: Connection, job_id: str, seconds: Mapping[str, float]) -> None:
    """Set the estimated seconds of each step by name; shards share theirs equally. Unknown names are ignored."""
    for step, weight in seconds.items():
        conn.execute(
            update(steps)
            .where(steps.c.job_id == job_id, steps.c.step == step)
            .values(weight=max(weight, 0.001) / steps.c.shards)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """How far a job is, in estimated seconds of its steps, and what it took so far."""

    whole: Mapping[str, float]
    """Estimated seconds of all, done or not, by step."""
    left: Mapping[str, float]
    """Estimated seconds still to work."""
    paced: Mapping[str, float]
    """Of those, the part that goes by the pace of the whole job. All of a step that waits; the further a running one is,
    the less of it."""
    own_s: float
    """Seconds of the rest: it goes by the running steps' own pace, which was measured."""
    spent_s: float
    """Measured seconds of the steps that are done or running."""


def work_of(conn: Connection, job_id: str) -> Work:
    """Add up the steps of a job.

    A running step that took `e` seconds for a share `q` of its `w` estimated ones would take `(1 - q) * w` more at the job's
    pace, and `(1 - q) / q * e` at its own. The second counts for a share `q`, the first for the rest.
    """
    ready = case((steps.c.status == "done", 1.0), else_=steps.c.progress)
    running = steps.c.status == "running"
    spent = case((steps.c.status == "done", steps.c.seconds), (running, _seconds()), else_=0.0)
    left = steps.c.weight * (1 - ready)
    paced = case((running, left * (1 - ready)), else_=left)
    own = case((running, (1 - ready) * _seconds()), else_=0.0)
    sums = [func.coalesce(func.sum(part), 0.0) for part in (steps.c.weight, left, paced, own, spent)]
    rows = conn.execute(select(steps.c.step, *sums).where(steps.c.job_id == job_id).group_by(steps.c.step)).all()
    return Work(
        whole={row[0]: row[1] for row in rows},
        left={row[0]: row[2] for row in rows},
        paced={row[0]: row[3] for row in rows},
        own_s=float(sum(row[4] for row in rows)),
        spent_s=float(sum(row[5] for row in rows)),
    )


def _seconds() -> ColumnElement[Any]:
    return func.extract("epoch", func.now() - steps.c.started_at)
