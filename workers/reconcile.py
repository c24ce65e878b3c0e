"""What time alone brings about: expired leases, jobs out of time, forgotten wake-ups, old keys. Safe to run anywhere, any number.

An advisory lock lets one process at a time do it; each decision is a transaction of its own under the job's lock, so one
that dies half-way leaves nothing half-done.
"""

from __future__ import annotations

import structlog

from app.core import lifecycle
from app.core.wake import Waker
from app.db.engine import Engine
from app.db.idempotency import forget_keys
from app.db.jobs import forget_passed_etas
from app.db.leases import expired_leases, ready_by_queue, stale_jobs, try_advisory_lock
from app.errors import LeaseLost

RECONCILE_LOCK = 0x703264_02
"""Advisory lock key; see also migrations.MIGRATION_LOCK."""

KEYS_KEPT_H = 48
"""Hours that an Idempotency-Key is remembered. Stripe keeps 24."""

log = structlog.get_logger()


def reconcile(engine: Engine, waker: Waker, *, max_crashes: int) -> None:
    """One sweep; does nothing while another process sweeps."""
    with engine.begin() as guard:
        if not try_advisory_lock(guard, RECONCILE_LOCK):
            return
        for lease in expired_leases(guard):
            log.warning("lease.expired", job=lease.job_id, step=lease.step, attempt=lease.token, worker=lease.worker)
            try:
                with engine.begin() as conn:
                    lifecycle.expire_step(conn, lease, max_crashes=max_crashes)
            except LeaseLost:
                continue  # it ended by itself meanwhile
        for job_id in stale_jobs(guard):
            with engine.begin() as conn:
                lifecycle.settle_job(conn, job_id)
        with engine.begin() as conn:
            forget_passed_etas(conn)
        with engine.begin() as conn:
            forget_keys(conn, older_than_h=KEYS_KEPT_H)
        ready = ready_by_queue(guard)
    for queue, count in ready.items():
        waker.wake(queue, count=count)
