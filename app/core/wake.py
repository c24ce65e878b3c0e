"""Telling workers that there is something to claim: a Celery message `{queue}`, best effort, never more than a hint.

The row in PostgreSQL is the outbox. A wake-up that is lost costs an idle worker's next poll; a forged one finds nothing.
"""

from __future__ import annotations

import structlog
from celery import Celery
from kombu.entity import Queue
from kombu.exceptions import OperationalError

TASK = "p2d.wake"
"""Name of the one task that workers know."""

MAX_WAKES = 8
"""Most messages sent at once: further workers are woken by those that find more than they can take."""

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
    """Sends wake-ups. One per process; safe to share between threads."""

    def __init__(self, broker_url: str) -> None:
        self._celery = celery_app(broker_url, queue="default")
        # A producer must not keep a request waiting for a broker that is away.
        self._celery.conf.broker_transport_options |= {"max_retries": 1, "interval_start": 0, "interval_step": 0.05}

    def wake(self, queue: str, *, count: int = 1) -> None:
        """Ask up to `count` workers of the queue to look for work. Never raises; a broker that is away costs about 2 s."""
        try:
            for _ in range(min(count, MAX_WAKES)):
                self._celery.send_task(
                    TASK, kwargs={"queue": queue}, queue=f"p2d.{queue}", retry=False, ignore_result=True, expires=3600
                )
        except (OperationalError, OSError) as error:
            log.warning("wake.failed", queue=queue, error=type(error).__name__)

    def close(self) -> None:
        """Give the connections back."""
        self._celery.close()
