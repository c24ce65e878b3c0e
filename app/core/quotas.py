"""How much a project may have: unfinished jobs, stored bytes, rows. Checked before anything is added, for the caller's project.

Two requests in the same moment may both be the last that fits: a quota holds back, it does not count money.
"""

from __future__ import annotations

from app.access_errors import StorageFull, TooManyJobs
from app.db.engine import Connection
from app.db.usage import open_jobs, stored_bytes, stored_rows
from app.settings import Settings


def allow_job(conn: Connection, settings: Settings) -> None:
    """Raise TooManyJobs if the project has as many unfinished jobs as it may."""
    if open_jobs(conn) >= settings.quota_jobs:
        raise TooManyJobs(limit=settings.quota_jobs)


def allow_storage(conn: Connection, settings: Settings, *, size_bytes: int, rows: int = 0) -> None:
    """Raise StorageFull if the project may not store so much more."""
    if (used := stored_bytes(conn)) + size_bytes > settings.quota_bytes:
        raise StorageFull(what="bytes", used=used, more=size_bytes, limit=settings.quota_bytes)
    if rows and (used := stored_rows(conn)) + rows > settings.quota_rows:
        raise StorageFull(what="rows", used=used, more=rows, limit=settings.quota_rows)
