"""Delete jobs that ended long ago, as their users could, with a receipt in the audit log. Off unless the operator says how long.

Their files leave the store as those of every deleted job do (app.core.garbage).
"""

from __future__ import annotations

from app.core.moves import delete
from app.db.audit import SERVICE, append_entry
from app.db.engine import Engine
from app.db.jobs import is_kept_long, jobs_kept_long, lock_job
from app.errors import JobInUse


def old_jobs(engine: Engine, *, kept_d: float | None) -> list[str]:
    """The jobs that `drop_jobs` would delete now."""
    if kept_d is None:
        return []
    with engine.begin() as conn:
        return jobs_kept_long(conn, kept_d=kept_d)


def drop_jobs(engine: Engine, *, kept_d: float | None) -> int:
    """Delete what ended that many days ago and nobody needs, each in a transaction of its own; None keeps all. How many."""
    if kept_d is None:
        return 0
    return sum(_drop(engine, job_id, kept_d) for job_id in old_jobs(engine, kept_d=kept_d))


def _drop(engine: Engine, job_id: str, kept_d: float) -> bool:
    try:
        with engine.begin() as conn:
            job = lock_job(conn, job_id)
            if job is None or not is_kept_long(conn, job_id, kept_d=kept_d):  # deleted or retried just now
                return False
            facts = {"sha256": sorted(set(delete(conn, job_id))), "kept_d": kept_d}
            who = {"actor": SERVICE, "project_id": job.project_id}
            append_entry(conn, action="job.delete", object_id=job_id, facts=facts, **who)
            return True
    except JobInUse:  # since just now
        return False
