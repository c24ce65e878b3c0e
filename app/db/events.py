"""The event log of a job: numbered 1, 2, 3 ... without gaps, because the number is taken from the locked job row."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import func, insert, select, update

from app.db.engine import Connection, Json
from app.db.tables import events, jobs

EventType = Literal[
    "job.status",
    "job.stage",
    "job.progress",
    "metric",
    "heads.ranked",
    "examples.scored",
    "checkpoint",
    "warning",
    "artifact",
    "attempt",
    "estimate",
    "cache.hit",
    "end",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing that happened to a job. `end` is the last one, unless the job is retried."""

    job_id: str
    seq: int
    type: EventType
    data: Json
    created_at: datetime


def append_event(conn: Connection, job_id: str, type: EventType, data: Json) -> int:
    """Append one event and return its number. Locks the job row until the caller's transaction ends."""
    seq = conn.execute(
        update(jobs).where(jobs.c.id == job_id).values(event_seq=jobs.c.event_seq + 1).returning(jobs.c.event_seq)
    ).scalar_one()
    conn.execute(insert(events), {"job_id": job_id, "seq": seq, "type": type, "data": data})
    return int(seq)


def list_events(conn: Connection, job_id: str, *, after: int = 0, limit: int = 100) -> list[Event]:
    """Events numbered above `after`, oldest first."""
    query = select(events).where(events.c.job_id == job_id, events.c.seq > after).order_by(events.c.seq).limit(limit)
    return [Event(**row._mapping) for row in conn.execute(query)]


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricEvent:
    """The values that a step told at one time."""

    seq: int
    at: datetime
    data: Json


def list_metrics(conn: Connection, job_id: str, *, points: int) -> tuple[list[MetricEvent], bool]:
    """A job's metric events in order, and whether some were left out.

    Args: points: of each step and shard about so many at most: every n-th, with the first and the last.
    """
    shard = events.c.data["step"].astext, events.c.data["shard"].astext
    numbered = (
        select(
            events.c.seq,
            events.c.created_at.label("at"),
            events.c.data,
            func.row_number().over(partition_by=shard, order_by=events.c.seq).label("number"),
            func.count().over(partition_by=shard).label("count"),
        )
        .where(events.c.job_id == job_id, events.c.type == "metric")
        .subquery()
    )
    every = (numbered.c.count + points - 1) // points
    chosen = (numbered.c.number % every == 0) | (numbered.c.number == 1) | (numbered.c.number == numbered.c.count)
    found = conn.execute(select(numbered).where(chosen).order_by(numbered.c.seq)).all()
    rows = [MetricEvent(seq=row.seq, at=row.at, data=row.data) for row in found]
    return rows, any(row[4] > points for row in found)


def last_seqs(conn: Connection, job_ids: Collection[str]) -> dict[str, int]:
    """The number of the newest event of each of these jobs: one cheap look for all open streams."""
    rows = conn.execute(select(jobs.c.id, jobs.c.event_seq).where(jobs.c.id.in_(job_ids)))
    return {row.id: row.event_seq for row in rows}
