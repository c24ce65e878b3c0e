"""A worker: waits for a wake-up or polls, claims one step at a time, and beside it sweeps the ledger and sends to webhooks.
Never imports torch.

Knows no Celery: `wake` may be called by anything, any number of times, and only makes the next look come sooner.
"""

from __future__ import annotations

import fcntl
import random
import shutil
import threading
import time
from pathlib import Path
from typing import IO

import structlog

from app.access_errors import NotMigrated
from app.blobs import BlobStore
from app.core.garbage import ObjectBook, sweep_garbage
from app.core.uploads import sweep_uploads
from app.core.wake import Waker
from app.db.engine import DatabaseUnavailable, SchemaBehind, make_engine
from app.db.ids import new_id
from app.db.leases import Lease, claim
from app.errors import StoreUnavailable
from app.settings import Settings
from workers.attempt import Workshop, run_attempt
from workers.bases import drop_unused
from workers.engine_process import EngineProcess
from workers.postman import Postman
from workers.reconcile import reconcile

log = structlog.get_logger()


class Worker:
    """One worker process: a loop thread, a sweeping thread, and those that send to webhooks."""

    def __init__(self, settings: Settings) -> None:
        self.id = new_id("wrk")  # new at each start, so nobody is mistaken for a predecessor
        self._settings = settings
        self._db = make_engine(settings.url("database_url"), pool_size=6)
        self._waker = Waker(settings.url("broker_url"))
        self._woken = threading.Event()
        self._stopping = threading.Event()
        self._process = EngineProcess(settings.engine)
        self._folder, self._lock = _own_folder(settings.work_dir / "steps", self.id)
        self._shop = Workshop(
            db=self._db,
            store=BlobStore.open(settings.url("store_url"), ObjectBook(self._db)),
            waker=self._waker,
            settings=settings,
            process=self._process,
            stopping=self._stopping,
            folder=self._folder,
        )
        self._postman = Postman(self._db, settings, self._stopping)
        self._warm: str | None = None
        self._closing, self._closed = threading.Lock(), False
        self._loop = threading.Thread(target=self._run, name="loop", daemon=True)
        self._sweeper = threading.Thread(target=self._sweep, name="sweeper", daemon=True)

    def start(self) -> None:
        """Start working."""
        log.info("worker.started", worker=self.id, queue=self._settings.worker_queue)
        self._loop.start()
        self._sweeper.start()
        self._postman.start()

    def wake(self) -> None:
        """Look for work now instead of at the next poll."""
        self._woken.set()
        self._postman.wake()

    def stop(self) -> None:
        """Claim nothing more, stop the child and give its step back. Returns at once; see `join`."""
        self._stopping.set()
        self.wake()

    def join(self, timeout_s: float) -> bool:
        """Wait until everything has been given back; False if it took longer. May be called by several threads."""
        deadline = time.monotonic() + timeout_s
        for thread in (self._loop, self._sweeper):
            if thread.ident is not None:
                thread.join(max(deadline - time.monotonic(), 0.0))
        self._postman.join(deadline)
        with self._closing:
            if not self._loop.is_alive() and not self._closed:
                self._closed = True
                self._close()
        return self._closed

    def _close(self) -> None:
        self._process.kill()
        self._waker.close()
        self._db.dispose()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.with_suffix(".lock").unlink(missing_ok=True)
        self._lock.close()
        log.info("worker.stopped", worker=self.id)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._woken.clear()  # before the look: a wake-up during it must not get lost
            lease = self._claim()
            if lease is None:
                self._woken.wait(self._settings.poll_s * random.uniform(0.8, 1.0))  # noqa: S311 - jitter
                continue
            run_attempt(self._shop, lease)
            self._postman.wake()  # the job may have ended
            if lease.model_digest is not None:
                self._warm = lease.model_digest

    def _claim(self) -> Lease | None:
        warm = self._warm if self._process.pid is not None else None
        try:
            with self._db.begin() as conn:
                return claim(
                    conn,
                    queue=self._settings.worker_queue,
                    worker=self.id,
                    lease_s=self._settings.lease_s,
                    warm=warm,
                )
        except DatabaseUnavailable as error:
            hint = {"hint": NotMigrated.hint} if isinstance(error, SchemaBehind) else {}
            log.warning("claim.failed", error=type(error).__name__, **hint)
            return None

    def _sweep(self) -> None:
        collected_at = time.monotonic()
        while not self._stopping.wait(self._settings.reconcile_s * random.uniform(0.8, 1.0)):  # noqa: S311 - jitter
            try:
                reconcile(self._db, self._waker, max_crashes=self._settings.max_crashes)
                sweep_uploads(self._db, self._shop.store)
                drop_unused(self._settings.work_dir / "bases")
                if time.monotonic() - collected_at > self._settings.garbage_s:
                    collected_at = time.monotonic()
                    sweep_garbage(self._db, self._shop.store, self._settings)
            except (DatabaseUnavailable, StoreUnavailable) as error:
                log.warning("reconcile.failed", error=type(error).__name__)


def _own_folder(parent: Path, worker_id: str) -> tuple[Path, IO[bytes]]:
    """A work folder for this worker, locked as long as it lives; folders whose worker was killed are removed."""
    parent.mkdir(parents=True, exist_ok=True)
    for other in parent.glob("*.lock"):
        with other.open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(other.with_suffix(""), ignore_errors=True)
            other.unlink(missing_ok=True)
    path = parent / f"{worker_id}.lock"
    # Named `.lock` only once it is locked, so that nobody takes it for a dead worker's.
    temporary = path.with_suffix(".new")
    lock = temporary.open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    temporary.rename(path)
    folder = parent / worker_id
    folder.mkdir()
    return folder, lock
