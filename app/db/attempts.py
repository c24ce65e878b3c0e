"""Rows about attempts: one per claim of a step, written before any work, closed once with its outcome."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import func, select, update

from app.db.engine import Connection, Json
from app.db.tables import attempts, steps

Outcome = Literal["running", "done", "failed", "lost", "released", "cancelled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One try at a step. `seconds` is wall time from claim to end; for `lost` until the loss was noticed."""

    id: str
    job_id: str
    step_id: str
    step: str
    shard: int
    token: int
    worker: str
    outcome: Outcome
    error: Json | None
    seconds: float | None
    started_at: datetime
    finished_at: datetime | None


def close_attempt(conn: Connection, step_id: str, token: int, outcome: Outcome, error: Json | None = None) -> None:
    """Write the outcome of an attempt that still runs; one that is closed stays as it is."""
    conn.execute(
        update(attempts)
        .where(attempts.c.step_id == step_id, attempts.c.token == token, attempts.c.outcome == "running")
        .values(outcome=outcome, error=error, finished_at=func.now(), seconds=_seconds())
    )


def close_attempts_of_job(conn: Connection, job_id: str, outcome: Outcome) -> None:
    """Write one outcome for all attempts of a job that still run, because their steps were taken away."""
    conn.execute(
        update(attempts)
        .where(attempts.c.job_id == job_id, attempts.c.outcome == "running")
        .values(outcome=outcome, finished_at=func.now(), seconds=_seconds())
    )


def keep_log(conn: Connection, step_id: str, token: int, lines: list[Json], dropped: int) -> None:
    """Keep what a worker noted of an attempt, in place of what it noted before."""
    mine = attempts.c.step_id == step_id, attempts.c.token == token
    conn.execute(update(attempts).where(*mine).values(log=lines, log_dropped=dropped))


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptLog:
    """The newest lines that a worker noted of an attempt."""

    id: str
    step: str
    shard: int
    token: int
    lines: list[Json]
    dropped: int


def list_logs(conn: Connection, job_id: str, *, since: str | None, limit: int) -> list[AttemptLog]:
    """Logs of up to `limit` attempts of a job that have any, oldest first, from the one with the id `since` on."""
    query = (
        select(
            attempts.c.id,
            steps.c.step,
            steps.c.shard,
            attempts.c.token,
            attempts.c.log.label("lines"),
            attempts.c.log_dropped.label("dropped"),
        )
        .join(steps, steps.c.id == attempts.c.step_id)
        .where(attempts.c.job_id == job_id, attempts.c.log.is_not(None))
        .order_by(attempts.c.id)
        .limit(limit)
    )
    if since is not None:
        query = query.where(attempts.c.id >= since)
    return [AttemptLog(**row._mapping) for row in conn.execute(query)]


def list_attempts(
    conn: Connection, job_id: str, *, after: str | None = None, limit: int | None = None
) -> list[Attempt]:
    """Attempts of a job, oldest first: all, or up to `limit` behind the one with the id `after`."""
    query = (
        select(*_SHOWN, steps.c.step, steps.c.shard)
        .join(steps, steps.c.id == attempts.c.step_id)
        .where(attempts.c.job_id == job_id)
        .order_by(attempts.c.id)
        .limit(limit)
    )
    if after is not None:
        query = query.where(attempts.c.id > after)
    return [Attempt(**row._mapping) for row in conn.execute(query)]


_SHOWN = [column for column in attempts.c if column.name not in ("log", "log_dropped")]


def _seconds() -> object:
    return func.extract("epoch", func.now() - attempts.c.started_at)
