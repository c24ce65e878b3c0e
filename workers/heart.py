"""The heartbeat of one attempt: a thread that renews the lease and remembers what the job wants. Stops nothing itself.

It keeps beating while the database is away: only PostgreSQL may say that a lease is lost, and every write is fenced.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Literal, Self

import structlog

from app.core import lifecycle
from app.db.engine import DatabaseUnavailable, Engine
from app.db.leases import Lease, Pulse
from app.errors import LeaseLost

Order = Literal["lost", "cancel", "limit", "pause"]

log = structlog.get_logger()


class Heart:
    """Beats inside a `with` block."""

    def __init__(self, engine: Engine, lease: Lease, *, lease_s: float, heartbeat_s: float) -> None:
        self._engine, self._lease = engine, lease
        self._lease_s, self._heartbeat_s = lease_s, heartbeat_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heart", daemon=True)
        self.order: Order | None = None
        """Why the attempt must stop, once it must."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def heed(self, pulse: Pulse) -> None:
        """Take over what another write of this attempt has heard."""
        if pulse.cancel_requested:
            self.order = self.order or "cancel"
        elif pulse.limit_reached:
            self.order = self.order or "limit"
        elif pulse.pause_requested:
            self.order = self.order or "pause"

    def lose(self) -> None:
        """Note that the lease is gone; nothing outranks this."""
        self.order = "lost"

    def _beat(self) -> None:
        while not self._stopped.wait(self._heartbeat_s):
            try:
                with self._engine.begin() as conn:
                    pulse = lifecycle.renew(conn, self._lease, lease_s=self._lease_s)
                self.heed(pulse)
                with self._engine.begin() as conn:  # apart: it waits for the job's lock, which a lease must not
                    lifecycle.look_ahead(conn, self._lease)
            except LeaseLost:
                # After the attempt's own last write the lease is rightly gone.
                if not self._stopped.is_set():
                    self.lose()
                return
            except DatabaseUnavailable as error:
                log.warning("heartbeat.failed", job=self._lease.job_id, error=type(error).__name__)
