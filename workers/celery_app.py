"""The worker's process: a Celery worker (pool solo) whose one task sets an event, around a `workers.loop.Worker`.

    python -m workers.celery_app          # settings from P2D_ variables; `p2d worker` does the same

Celery carries wake-ups and handles signals, nothing else. The loop starts before Celery has found its broker and goes on
without it: a worker polls. TERM and INT: claim nothing more, stop the child, give the step back, be gone in 25 s.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from types import FrameType
from typing import Any

import structlog
from celery import signals
from celery.platforms import SecurityWarning

from app.core.wake import TASK, celery_app
from app.logs import configure_logs
from app.settings import Settings
from workers.loop import Worker

EXIT_S = 25.0
"""Longest time from TERM to the end of the process: orchestrators kill after 30 s."""

CELERY_S = 2.0
"""Seconds that Celery gets to end by itself after the step was given back."""

log = structlog.get_logger()


def run_worker(settings: Settings) -> None:
    """Work until told to stop; returns, or ends the process, after everything was given back."""
    configure_logs()
    # It warns root of pickled messages; this one takes JSON alone.
    warnings.simplefilter("ignore", SecurityWarning)
    worker = Worker(settings)
    app = celery_app(settings.url("broker_url"), queue=settings.worker_queue)

    @app.task(name=TASK, ignore_result=True)  # type: ignore[untyped-decorator]
    def wake(queue: str) -> None:
        worker.wake()

    def leave() -> None:
        worker.stop()
        threading.Thread(target=_leave, args=(worker,), daemon=True).start()

    def on_signal(number: int, frame: FrameType | None) -> None:
        leave()

    # Named and kept alive here: Celery holds its receivers weakly.
    def on_shutdown(**_: Any) -> None:
        leave()

    threading.excepthook = _crash
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, on_signal)  # until Celery puts its own in place, after it has found its broker
    signals.worker_shutting_down.connect(on_shutdown)
    worker.start()
    try:
        app.worker_main(
            [
                "--quiet",
                "worker",
                "--pool=solo",
                "--loglevel=WARNING",
                "--without-gossip",
                "--without-mingle",
                "--without-heartbeat",
                f"--hostname={worker.id}@%h",
            ]
        )
    finally:
        worker.stop()
        worker.join(EXIT_S)


def _crash(death: threading.ExceptHookArgs) -> None:
    """A thread that dies of a bug takes the process along: a worker that only looks alive is worse than a dead one."""
    error = death.exc_value or death.exc_type()
    log.critical("worker.broken", thread=death.thread.name if death.thread else None, exc_info=error)
    os._exit(1)


def _leave(worker: Worker) -> None:
    """End the process once the step is given back, even if Celery hangs on a broker that is away."""
    worker.join(EXIT_S)
    threading.Event().wait(CELERY_S)
    os._exit(0)


if __name__ == "__main__":
    run_worker(Settings())
