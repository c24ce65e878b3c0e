"""Sums of what a project has, as far as the transaction may see: call them on an engine of `for_project`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, false, func, select

from app.db.engine import Connection
from app.db.jobs import OPEN
from app.db.tables import artifacts, datasets, head_maps, jobs, reports, uploads, webhooks

# By status, which an index knows: the rows of all jobs that ever were are megabytes.
_OPEN_JOBS = select(func.count()).select_from(jobs).where(jobs.c.status.in_(sorted(OPEN)))


def open_jobs(conn: Connection) -> int:
    """Jobs that have not ended."""
    return _number(conn, _OPEN_JOBS)


def webhooks_made(conn: Connection) -> int:
    """Webhooks, enabled or not."""
    return _number(conn, select(func.count()).select_from(webhooks))


def stored_rows(conn: Connection) -> int:
    """Rows of all datasets."""
    return _number(conn, select(func.sum(datasets.c.rows)).where(datasets.c.deleted_at.is_(None)))


def stored_bytes(conn: Connection) -> int:
    """Bytes of datasets, open uploads, jobs' files, imported head maps and reports. What equal content saves is not taken off."""
    gone = uploads.c.dataset_id.is_not(None) | uploads.c.deleted_at.is_not(None) | (uploads.c.expires_at <= func.now())
    expired = func.coalesce(artifacts.c.expires_at <= func.now(), false())
    sums = (
        select(func.sum(datasets.c.stored_bytes)).where(datasets.c.deleted_at.is_(None)),
        select(func.sum(uploads.c.size_bytes)).where(~gone),
        select(func.sum(artifacts.c.size_bytes)).where(artifacts.c.deleted_at.is_(None), ~expired),
        select(func.sum(head_maps.c.size_bytes)),  # of those that were imported
        select(func.sum(reports.c.stored_bytes)).where(reports.c.expires_at > func.now()),
    )
    return sum(_number(conn, one) for one in sums)


def _number(conn: Connection, query: Select[Any]) -> int:
    return int(conn.execute(query).scalar_one() or 0)
