"""How much a project may have: unfinished jobs, stored bytes, rows. Checked before anything is added, for the caller's project.

Checked where it is recorded, under a lock of the project: of two things in one moment of which one fits, one is recorded. Nothing
is locked while bytes come in or are stored. Jobs that are changed, or whose files are needed, are locked before the project.
"""

from __future__ import annotations

import threading
import time

from app.access_errors import StorageFull, TooManyJobs
from app.db.engine import Connection
from app.db.projects import lock_project
from app.db.usage import open_jobs, stored_bytes, stored_rows
from app.settings import Settings

IN_FLIGHT = 40
"""Most requests that a process works on at one time: AnyIO's threads."""

COUNTED_S = 1.0
"""Seconds for which a count of unfinished jobs is good."""


class JobQuota:
    """How many unfinished jobs a project may have. One for each process; threads share it.

    To count thousands of them for each new one would be most of its cost. So a count is good for `COUNTED_S` and for a small
    share of what was left then: far from the quota it is seldom taken, near it always, and there one request after another:
    each waits until the one before it has committed. Several processes that counted while the quota was far may together go
    beyond it, by an eighth at most.
    """

    def __init__(self, settings: Settings) -> None:
        self._limit, self._processes = settings.quota_jobs, settings.api_processes
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, int]] = {}
        """Of each project, until when and for how many jobs nothing is counted."""

    def allow(self, conn: Connection, project_id: str) -> None:
        """Raise TooManyJobs if the caller's project has as many unfinished jobs as it may."""
        with self._lock:
            until, left = self._known.get(project_id, (0.0, 0))
            if left > 0 and time.monotonic() < until:
                self._known[project_id] = until, left - 1
                return
        lock_project(conn)
        if (made := open_jobs(conn)) >= self._limit:
            raise TooManyJobs(limit=self._limit)
        # Less what may be on its way unseen: jobs of requests that took of the share before.
        share = max(0, self._limit - made - IN_FLIGHT * self._processes) // (8 * self._processes)
        with self._lock:
            self._known[project_id] = time.monotonic() + COUNTED_S, share


def allow_storage(
    conn: Connection, settings: Settings, *, size_bytes: int, rows: int = 0, freed_bytes: int = 0
) -> None:
    """Raise StorageFull if the project may not store so much more. Others of it wait until the caller's transaction has ended.

    Args:   freed_bytes: what is still counted, and is no more when that transaction has ended.
    """
    lock_project(conn)
    if (used := stored_bytes(conn) - freed_bytes) + size_bytes > settings.quota_bytes:
        raise StorageFull(what="bytes", used=used, more=size_bytes, limit=settings.quota_bytes)
    if rows and (used := stored_rows(conn)) + rows > settings.quota_rows:
        raise StorageFull(what="rows", used=used, more=rows, limit=settings.quota_rows)
