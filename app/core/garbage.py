"""Remove what nobody needs any more: old checkpoints of ended jobs, old deliveries of webhooks, old reports, and objects of the
store to which nothing refers.

Never an object that a row refers to, nor one that somebody is about to register: docs/decisions/0016 says why. Parts of
uploads have a life of their own (app.core.uploads).
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from app.blobs import BlobStore
from app.core.retention import drop_jobs
from app.db.deliveries import forget_deliveries
from app.db.engine import Engine
from app.db.jobs import lock_job
from app.db.leases import try_advisory_lock
from app.db.objects import (
    announce_object,
    condemn_objects,
    confirm_object,
    forget_checkpoints,
    jobs_with_old_checkpoints,
    lock_condemned,
    mark_collected,
    outlast_idleness,
    still_locked,
    sum_unreferenced,
)
from app.db.reports import forget_reports
from app.settings import Settings

GARBAGE_LOCK = 0x703264_03
"""Advisory lock key; see also migrations.MIGRATION_LOCK."""

BATCH = 100
"""Objects removed in one transaction: a writer of the same bytes waits for at most so many."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """What was removed, or would be."""

    objects: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ObjectBook:
    """Where a store writes down what it puts (`app.blobs.Book`)."""

    engine: Engine

    def announce(self, sha256: str, size_bytes: int) -> int | None:
        """Before putting."""
        with self.engine.begin() as conn:
            return announce_object(conn, sha256, size_bytes)

    def confirm(self, sha256: str, generation: int) -> bool:
        """After putting."""
        with self.engine.begin() as conn:
            return confirm_object(conn, sha256, generation)


def sweep_garbage(engine: Engine, blobs: BlobStore, settings: Settings) -> None:
    """One sweep by the settings; does nothing while another process sweeps."""
    with engine.begin() as guard:
        if not try_advisory_lock(guard, GARBAGE_LOCK):
            return
        outlast_idleness(guard)
        with engine.begin() as conn:
            forget_deliveries(conn, kept_d=settings.webhook_kept_d)
        jobs, done = clear(engine, blobs, settings)
    if jobs:
        log.info("jobs.deleted", jobs=jobs, kept_d=settings.jobs_kept_d)
    if done.objects:
        log.info("objects.collected", objects=done.objects, size_bytes=done.size_bytes)


def clear(engine: Engine, blobs: BlobStore, settings: Settings) -> tuple[int, Collected]:
    """All that the settings let go: how many jobs, and which objects."""
    drop_checkpoints(engine, kept_d=settings.checkpoints_kept_d)
    with engine.begin() as conn:
        forget_reports(conn)
    jobs = drop_jobs(engine, kept_d=settings.jobs_kept_d)
    return jobs, collect(engine, blobs, kept_h=settings.unreferenced_kept_h)


def drop_checkpoints(engine: Engine, *, kept_d: float) -> None:
    """Forget the checkpoints of jobs that ended that long ago and were not retried."""
    with engine.begin() as conn:
        ended = jobs_with_old_checkpoints(conn, kept_d=kept_d)
    for job_id in ended:
        with engine.begin() as conn:
            job = lock_job(conn, job_id)
            if job is not None and job.is_final:  # not retried just now
                forget_checkpoints(conn, job_id)


def collect(engine: Engine, blobs: BlobStore, *, kept_h: float) -> Collected:
    """Remove the objects to which nothing refers and which were last used that long ago. Safe to run anywhere, any number."""
    count = size = 0
    while True:
        with engine.begin() as conn:
            condemned = condemn_objects(conn, kept_h=kept_h, limit=BATCH)
        if not condemned:
            return Collected(objects=count, size_bytes=size)
        # Committed first: whatever becomes of this transaction, nobody registers what it removed without putting it again.
        with engine.begin() as conn:
            outlast_idleness(conn)
            removed = lock_condemned(conn, condemned)
            for one in removed:
                still_locked(conn)
                blobs.delete(one.sha256)
            mark_collected(conn, [one.sha256 for one in removed])
        count, size = count + len(removed), size + sum(one.size_bytes for one in removed)


def foresee(engine: Engine, *, kept_h: float) -> Collected:
    """What `collect` would remove now."""
    with engine.begin() as conn:
        count, size = sum_unreferenced(conn, kept_h=kept_h)
    return Collected(objects=count, size_bytes=size)
