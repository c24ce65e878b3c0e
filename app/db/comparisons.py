"""Rows about comparisons: which jobs are compared. What they have in common is computed from their files when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, insert, select

from app.db.engine import Connection
from app.db.ids import new_id
from app.db.tables import comparisons


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparisonRecord:
    """Jobs side by side, in the order in which they were given; some may be deleted since."""

    id: str
    project_id: str
    name: str
    job_ids: list[str]
    created_at: datetime


def insert_comparison(conn: Connection, *, name: str, job_ids: Sequence[str]) -> ComparisonRecord:
    """Record a comparison of jobs that are there."""
    values = {"id": new_id("cmp"), "name": name, "job_ids": list(job_ids)}
    row = conn.execute(insert(comparisons).values(values).returning(comparisons)).one()
    return ComparisonRecord(**row._mapping)


def get_comparison(conn: Connection, comparison_id: str) -> ComparisonRecord | None:
    """The comparison, or None."""
    row = conn.execute(select(comparisons).where(comparisons.c.id == comparison_id)).first()
    return ComparisonRecord(**row._mapping) if row else None


def list_comparisons(conn: Connection, *, limit: int, before: str | None = None) -> list[ComparisonRecord]:
    """Newest first; `before` is the id of the last one of the page before."""
    query = select(comparisons).order_by(comparisons.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(comparisons.c.id < before)
    return [ComparisonRecord(**row._mapping) for row in conn.execute(query)]


def delete_comparison(conn: Connection, comparison_id: str) -> bool:
    """Delete it; False if there is none. The jobs stay."""
    return conn.execute(delete(comparisons).where(comparisons.c.id == comparison_id)).rowcount > 0
