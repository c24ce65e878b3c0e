"""Telling workers that there is something to claim: a Celery message `{queue}`, best effort, never more than a hint.

The row in PostgreSQL is the outbox. A wake-up that is lost costs an idle worker's next poll; a forged one finds nothing.
"""

from __future__ import annotations

import threading
from collections import Counter

import structlog
from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import OperationalError

TASK = "p2d.wake"
"""Name of the one task that workers know."""

MAX_WAKES = 8
"""Most messages sent at once: further workers are woken by those that find more than they can take."""

CLOSE_S = 3.0
"""How long a closing process still waits for its last wake-ups: a broker that is away answers after 2 s."""

log = structlog.get_logger()


def celery_app(broker_url: str, *, queue: str) -> Celery:
    """The Celery application of API and workers: JSON only, no results, no remote control, early acknowledgement."""
    app = Celery("p2d", broker=broker_url, set_as_current=False)
    app.conf.update(
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=False,
        task_queues=[Queue(f"p2d.{queue}")],  # type: ignore[no-untyped-call]
        task_default_queue=f"p2d.{queue}",
        task_create_missing_queues=True,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_pool="solo",
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_connection_timeout=2,
        broker_transport_options={
            "socket_timeout": 2,
            "socket_connect_timeout": 2,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "visibility_timeout": 24 * 3600,
        },
    )
    return app


class Waker:
    """Sends wake-ups from a thread of its own: nobody waits for a broker. One per process; safe to share between threads."""

    def __init__(self, broker_url: str) -> None:
        self._celery = celery_app(broker_url, queue="default")
        # What piles up while a broker is away is sent late or never: it was a hint.
        self._celery.conf.broker_transport_options |= {"max_retries": 1, "interval_start": 0, "interval_step": 0.05}
        self._changed = threading.Condition()
        self._wanted: Counter[str] = Counter()
        self._closing = False
        self._thread: threading.Thread | None = None

    def wake(self, queue: str, *, count: int = 1) -> None:
        """Ask up to `count` workers of the queue to look for work, in a moment. Never raises, never waits."""
        with self._changed:
            self._wanted[queue] = min(self._wanted[queue] + count, MAX_WAKES)
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._send_all, name="waker", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Send what is still wanted, and give the connections back."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
        self._celery.close()

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closing)
                if not self._wanted:
                    return
                wanted, self._wanted = self._wanted, Counter()
            for queue, count in wanted.items():
                self._send(queue, count)

    def _send(self, queue: str, count: int) -> None:
        try:
            for _ in range(count):
                self._celery.send_task(
                    TASK, kwargs={"queue": queue}, queue=f"p2d.{queue}", retry=False, ignore_result=True, expires=3600
                )
        except (OperationalError, OSError) as error:
            log.warning("wake.failed", queue=queue, error=type(error).__name__)
