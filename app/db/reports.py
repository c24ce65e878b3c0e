"""Rows about reports: what was wrong with files that were refused. The faults themselves lie in the store, never row text."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, insert, select

from app.db.engine import Connection, Json
from app.db.ids import new_id
from app.db.objects import hold_objects
from app.db.paging import newest_first
from app.db.tables import reports


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRecord:
    """One report, until its time is over."""

    id: str
    project_id: str
    name: str
    code: str
    detail: str
    report: Json
    sha256: str
    stored_bytes: int
    created_at: datetime
    expires_at: datetime


def insert_report(
    conn: Connection,
    *,
    name: str,
    code: str,
    detail: str,
    report: Json,
    sha256: str,
    stored_bytes: int,
    kept_d: float,
) -> ReportRecord:
    """Record a report whose faults are in the store as `sha256` (`stored_bytes` long). Raises ObjectCollected."""
    hold_objects(conn, [sha256])
    row = conn.execute(
        insert(reports)
        .values(
            id=new_id("rep"),
            name=name,
            code=code,
            detail=detail,
            report=report,
            sha256=sha256,
            stored_bytes=stored_bytes,
            expires_at=func.now() + func.make_interval(0, 0, 0, 0, 0, 0, kept_d * 86400),
        )
        .returning(reports)
    ).one()
    return ReportRecord(**row._mapping)


def get_report(conn: Connection, report_id: str) -> ReportRecord | None:
    """The report, or None if there is none or its time is over."""
    row = conn.execute(select(reports).where(reports.c.id == report_id, reports.c.expires_at > func.now())).first()
    return ReportRecord(**row._mapping) if row else None


def list_reports(conn: Connection, *, limit: int, before: str | None = None) -> list[ReportRecord]:
    """Newest first; `before` is the id of the last one of the page before."""
    query = newest_first(select(reports), reports, limit=limit, before=before)
    return [ReportRecord(**row._mapping) for row in conn.execute(query.where(reports.c.expires_at > func.now()))]


def delete_report(conn: Connection, report_id: str) -> bool:
    """Delete it; False if there is none."""
    return conn.execute(delete(reports).where(reports.c.id == report_id)).rowcount > 0


def forget_reports(conn: Connection) -> int:
    """Delete those whose time is over; how many."""
    return conn.execute(delete(reports).where(reports.c.expires_at <= func.now())).rowcount
