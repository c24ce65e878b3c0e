"""Rows about jobs: insert, read, page, and the one lock that orders all changes of a job.

What a job may do next is decided in app.core.lifecycle; this file only writes it down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, DateTime, case, delete, func, insert, literal, or_, select, update
from sqlalchemy.dialects.postgresql import JSONB

from app.db.engine import Connection, Json
from app.db.ids import new_id
from app.db.tables import artifacts, attempts, head_maps, jobs, selections
from app.errors import JobNotFound

Status = Literal["queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"]
Stage = Literal["validating", "identifying_heads", "selecting_data", "training", "evaluating", "packaging"]

FINAL: frozenset[Status] = frozenset({"cancelled", "succeeded", "failed"})
OPEN: frozenset[Status] = frozenset(get_args(Status)) - FINAL
"""Of jobs that have not ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedJob:
    """What a list shows of a job: without its configuration, which is most of the row."""

    id: str
    kind: str
    name: str
    status: Status
    stage: Stage | None
    dataset_id: str
    validation_dataset_id: str | None
    base_model: str
    model_digest: str
    priority: int
    progress: float
    eta_at: datetime | None
    eta_p10_at: datetime | None
    eta_p90_at: datetime | None
    adapter_id: str | None
    """The artifact that an export is of."""
    artifact_ttl: int | None
    """Seconds that the job's files live after its end; None: as long as the job."""
    error: Json | None
    metadata: Json
    cancel_requested_at: datetime | None
    pause_requested_at: datetime | None
    retries: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Job(ListedJob):
    """One job as the ledger knows it."""

    project_id: str
    config: Json
    resolved: Json | None
    queue: str
    estimate: Json | None
    progress_at: datetime | None
    max_seconds: int | None
    max_gpu_seconds: int | None
    deadline_at: datetime | None
    event_seq: int
    paused_at: datetime | None
    paused_s: float
    webhooks: list[str]
    """Ids of those that it names; one may be gone since."""
    base_artifact_id: str | None
    """The weights of the merged model that is its base; None where its base is installed, or was deleted since."""

    @property
    def is_final(self) -> bool:
        """Whether the job has ended; only a retry changes its status again."""
        return self.status in FINAL


# Statements of every POST are built once, with their values apart: building one takes longer than running it.
_INSERT = insert(jobs).returning(*(column for column in jobs.c if not isinstance(column.type, JSONB)))


def insert_job(
    conn: Connection,
    *,
    kind: str,
    name: str,
    config: Json,
    dataset_id: str,
    validation_dataset_id: str | None,
    base_model: str,
    model_digest: str,
    queue: str,
    priority: int,
    max_seconds: int | None,
    metadata: Json,
    resolved: Json,
    max_gpu_seconds: int | None = None,
    deadline_at: datetime | None = None,
    artifact_ttl: int | None = None,
    adapter_id: str | None = None,
    webhooks: Sequence[str] = (),
    base_artifact_id: str | None = None,
) -> Job:
    """Record a queued job; its steps and first event (`open_steps`) are written by the caller in the same transaction."""
    values = {
        "id": new_id("job"),
        "kind": kind,
        "name": name,
        "config": config,
        "dataset_id": dataset_id,
        "validation_dataset_id": validation_dataset_id,
        "base_model": base_model,
        "model_digest": model_digest,
        "queue": queue,
        "priority": priority,
        "max_seconds": max_seconds,
        "max_gpu_seconds": max_gpu_seconds,
        "deadline_at": deadline_at,
        "metadata": metadata,
        "resolved": resolved,
        "event_seq": 1,
        "artifact_ttl": artifact_ttl,
        "adapter_id": adapter_id,
        "webhooks": list(webhooks),
        "base_artifact_id": base_artifact_id,
    }
    row = conn.execute(_INSERT, values).one()._mapping
    return Job(**row, config=config, resolved=resolved, metadata=metadata, estimate=None, error=None)


def get_job(conn: Connection, job_id: str) -> Job | None:
    """The job, or None."""
    row = conn.execute(select(jobs).where(jobs.c.id == job_id)).first()
    return Job(**row._mapping) if row else None


def find_job(conn: Connection, job_id: str, *, lock: bool = False) -> Job:
    """The job, or with `lock` as `lock_job` gives it. Raises JobNotFound."""
    job = lock_job(conn, job_id) if lock else get_job(conn, job_id)
    if job is None:
        raise JobNotFound(id=job_id)
    return job


def lock_job(conn: Connection, job_id: str) -> Job | None:
    """The job, locked until the caller's transaction ends.

    Every change of a job or its steps takes this lock first (claims alone take none): one order, so no deadlock.
    """
    # NO KEY UPDATE, so that the foreign key checks of inserts elsewhere do not wait for us.
    row = conn.execute(select(jobs).where(jobs.c.id == job_id).with_for_update(key_share=True)).first()
    return Job(**row._mapping) if row else None


def keep_job(conn: Connection, job_id: str) -> None:
    """Let nobody delete the job before the caller's transaction has ended; if somebody just does, wait for that."""
    conn.execute(select(jobs.c.id).where(jobs.c.id == job_id).with_for_update(key_share=True, read=True))


def readers_of(conn: Connection, job_id: str) -> list[str]:
    """Jobs that have not ended and read the head map, the selection, the adapter or the merged model of this locked one.

    None that names its head map or selection can be added until the caller's transaction has ended.
    """
    conn.execute(select(jobs.c.id).where(jobs.c.id == job_id).with_for_update())  # waits for whom `keep_job` holds it
    head_map = select(head_maps.c.id).where(head_maps.c.job_id == job_id)
    selection = select(selections.c.id).where(selections.c.job_id == job_id)
    reads = or_(_HEAD_MAP.in_(head_map), _SELECTION.in_(selection), _reads_file_of(job_id))
    query = select(jobs.c.id).where(jobs.c.finished_at.is_(None), reads).order_by(jobs.c.id)
    return [row[0] for row in conn.execute(query)]


def users_of_files(conn: Connection, job_id: str) -> list[str]:
    """Jobs that have not ended, and are exports of this job's adapter or have its merged model as their base."""
    query = select(jobs.c.id).where(jobs.c.finished_at.is_(None), _reads_file_of(job_id))
    return list(conn.scalars(query.order_by(jobs.c.id)))


def _reads_file_of(job_id: str) -> ColumnElement[bool]:
    files = select(artifacts.c.id).where(artifacts.c.job_id == job_id)
    return or_(jobs.c.adapter_id.in_(files), jobs.c.base_artifact_id.in_(files))


def jobs_kept_long(conn: Connection, *, kept_d: float) -> list[str]:
    """Jobs that ended that long ago, but for those of which a job that may still run reads something."""
    query = select(jobs.c.id).where(_ended_before(kept_d)).order_by(jobs.c.id)
    files = ((artifacts, jobs.c.adapter_id), (artifacts, jobs.c.base_artifact_id))
    for made, named in ((head_maps, _HEAD_MAP), (selections, _SELECTION), *files):
        read = select(named).where(jobs.c.status != "succeeded").correlate(None)
        makers = select(made.c.job_id).where(made.c.job_id.is_not(None), made.c.id.in_(read))
        query = query.where(jobs.c.id.not_in(makers))
    return list(conn.scalars(query))


def is_kept_long(conn: Connection, job_id: str, *, kept_d: float) -> bool:
    """Whether a locked job ended that long ago."""
    return conn.execute(select(jobs.c.id).where(jobs.c.id == job_id, _ended_before(kept_d))).first() is not None


def delete_job(conn: Connection, job_id: str) -> None:
    """Delete a locked job and every row about it. Objects to which nothing else refers are collected later."""
    conn.execute(delete(jobs).where(jobs.c.id == job_id))


Order = Literal["desc", "asc"]


@dataclass(frozen=True, kw_only=True, slots=True)
class JobFilter:
    """Which jobs a list holds, and in which order; None = whatever."""

    status: Status | None = None
    stage: Stage | None = None
    kind: str | None = None
    base_model: str | None = None
    dataset: str | None = None
    head_map: str | None = None
    """Id of a head map: the job that made it, and those that named it."""
    created_after: datetime | None = None
    created_before: datetime | None = None
    q: str | None = None
    """Somewhere in name, id or base model, whatever the case."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    order: Order = "desc"


_LISTED = tuple(jobs.c[one.name] for one in fields(ListedJob))


def list_jobs(
    conn: Connection, *, limit: int, after: str | None = None, wanted: JobFilter | None = None
) -> list[ListedJob]:
    """A page of jobs; `after` is the id of the last one of the page before."""
    wanted = wanted or JobFilter()
    newest = wanted.order == "desc"
    query = select(*_LISTED).where(*_conditions(wanted)).limit(limit)
    query = query.order_by(jobs.c.id.desc() if newest else jobs.c.id)
    if after is not None:
        query = query.where(jobs.c.id < after if newest else jobs.c.id > after)
    return [ListedJob(**row._mapping) for row in conn.execute(query)]


def _conditions(wanted: JobFilter) -> list[ColumnElement[bool]]:
    equal = {
        jobs.c.status: wanted.status,
        jobs.c.stage: wanted.stage,
        jobs.c.kind: wanted.kind,
        jobs.c.base_model: wanted.base_model,
        jobs.c.dataset_id: wanted.dataset,
    }
    found: list[ColumnElement[bool]] = [column == value for column, value in equal.items() if value is not None]
    if wanted.head_map is not None:
        made = jobs.c.id == select(head_maps.c.job_id).where(head_maps.c.id == wanted.head_map).scalar_subquery()
        found.append(made | (jobs.c.config[("heads", "head_map")].astext == wanted.head_map))
    if wanted.created_after is not None:
        found.append(jobs.c.created_at >= wanted.created_after)
    if wanted.created_before is not None:
        found.append(jobs.c.created_at < wanted.created_before)
    if wanted.q is not None:
        found.append(
            or_(*(c.icontains(wanted.q, autoescape=True) for c in (jobs.c.name, jobs.c.id, jobs.c.base_model)))
        )
    if wanted.metadata:
        found.append(jobs.c.metadata.contains(dict(wanted.metadata)))
    return found


def update_job(conn: Connection, job_id: str, **values: Any) -> Job:
    """Write columns of a locked job and return it as it then is."""
    query = update(jobs).where(jobs.c.id == job_id).values(**values).returning(jobs)
    return Job(**conn.execute(query).one()._mapping)


def start_job(conn: Connection, job_id: str) -> Job:
    """Write that a queued job runs: limits.max_seconds counts from the first claim, and not from a pause to the next."""
    mine = (attempts.c.job_id == job_id, attempts.c.outcome == "running")
    # The claim was another transaction: from now on, its attempt would be older than the start and spend nothing.
    claimed_at = select(func.min(attempts.c.started_at)).where(*mine).scalar_subquery()
    return update_job(
        conn,
        job_id,
        status="running",
        started_at=func.coalesce(jobs.c.started_at, claimed_at, func.now()),
        paused_at=None,
        paused_s=case(
            (jobs.c.started_at.is_(None), 0.0),
            else_=jobs.c.paused_s + func.coalesce(func.extract("epoch", func.now() - jobs.c.paused_at), 0.0),
        ),
    )


def used_s() -> ColumnElement[Any]:
    """Seconds of limits.max_seconds that a job has used: null before the first claim, and still while it is paused."""
    clock = func.coalesce(jobs.c.paused_at, func.now())
    return func.extract("epoch", clock - jobs.c.started_at) - jobs.c.paused_s


def seconds_until(conn: Connection, moment: datetime) -> float:
    """Seconds from now, by PostgreSQL's clock, to a moment; negative once it has passed."""
    left = func.extract("epoch", literal(moment, DateTime(timezone=True)) - func.clock_timestamp())
    return float(conn.execute(select(left)).scalar_one())


def note_cancel(conn: Connection, job_id: str) -> Job:
    """Write that a stop was asked for; the first time counts."""
    return update_job(conn, job_id, cancel_requested_at=func.coalesce(jobs.c.cancel_requested_at, func.now()))


def note_pause(conn: Connection, job_id: str) -> Job:
    """Write that a pause was asked for; the first time counts."""
    return update_job(conn, job_id, pause_requested_at=func.coalesce(jobs.c.pause_requested_at, func.now()))


def pause_job(conn: Connection, job_id: str) -> Job:
    """Write that nobody works on the job any more; its clock stands still from here to the next claim."""
    return update_job(conn, job_id, status="paused", paused_at=func.coalesce(jobs.c.paused_at, func.now()), **_NO_ETA)


def reopen_job(conn: Connection, job_id: str) -> Job:
    """Forget how a job ended and what it was asked, and count a retry; its time starts anew with the next claim."""
    forgotten = dict.fromkeys(
        ("error", "cancel_requested_at", "pause_requested_at", "paused_at", "started_at", "finished_at")
    )
    return update_job(conn, job_id, **forgotten, paused_s=0, retries=jobs.c.retries + 1)


def note_progress(
    conn: Connection, job_id: str, progress: float, left_s: tuple[float, float, float] | None, every_s: float
) -> bool:
    """Raise the progress of a locked job (it never falls) and its ETA; True if an event is due after `every_s`.

    Args:   left_s: seconds that it still takes: p10, p50, p90.
    """
    eta = dict(_NO_ETA) if left_s is None else {name: _in(s) for name, s in zip(_ETA, left_s, strict=True)}
    due = jobs.c.progress_at.is_(None) | (
        func.now() - jobs.c.progress_at >= func.make_interval(0, 0, 0, 0, 0, 0, every_s)
    )
    query = (
        update(jobs)
        .where(jobs.c.id == job_id)
        .values(
            progress=func.greatest(jobs.c.progress, progress),
            **eta,
            progress_at=case((due, func.now()), else_=jobs.c.progress_at),
        )
        # now() is the time of the transaction, so equality says that this call set it.
        .returning(jobs.c.progress_at == func.now())
    )
    return bool(conn.execute(query).scalar_one())


def forget_passed_etas(conn: Connection) -> None:
    """Take away intervals that are past: nobody works on the job, or they would have been told anew."""
    passed = select(jobs.c.id).where(jobs.c.status.in_(["queued", "running"]), jobs.c.eta_p90_at < func.now())
    query = update(jobs).where(jobs.c.id.in_(passed.with_for_update(skip_locked=True)))
    conn.execute(query.values(dict(_NO_ETA)))


def finish_job(conn: Connection, job_id: str, status: Status, **values: Any) -> Job:
    """Write a final status and its time."""
    return update_job(conn, job_id, status=status, finished_at=func.now(), **_NO_ETA, **values)


def _ended_before(kept_d: float) -> ColumnElement[bool]:
    return jobs.c.finished_at < func.now() - func.make_interval(0, 0, 0, 0, 0, 0, kept_d * 86400)


_HEAD_MAP, _SELECTION = jobs.c.config[("heads", "head_map")].astext, jobs.c.config[("data", "selection")].astext
"""What a job names of an earlier one."""

_ETA = ("eta_p10_at", "eta_at", "eta_p90_at")
_NO_ETA: Mapping[str, None] = dict.fromkeys(_ETA)


def _in(seconds: float) -> ColumnElement[datetime]:
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
