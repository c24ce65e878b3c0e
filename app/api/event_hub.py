"""Wake all open event streams of this process from one look at the database, every quarter of a second.

No LISTEN/NOTIFY (it serialises commits) and no connection held per stream. What is read and sent is `events.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

import structlog
from fastapi.concurrency import run_in_threadpool

from app.access_errors import TooManyProjectStreams
from app.core.keys import Caller
from app.db.engine import DatabaseUnavailable, Engine, PoolTimeout
from app.db.events import last_seqs
from app.errors import TooManyStreams

log = structlog.get_logger()


class EventHub:
    """Knows the number of the newest event of every watched job."""

    def __init__(self, engine: Engine, *, poll_s: float, max_streams: int, project_streams: int) -> None:
        self._engine, self._poll_s = engine, poll_s
        self._max_streams, self._project_streams = max_streams, project_streams
        self._watched: Counter[str] = Counter()
        self._of_project: Counter[str] = Counter()
        self._seqs: dict[str, int] = {}
        self._changed = asyncio.Condition()
        self.closing = False

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            await asyncio.sleep(self._poll_s)
            if self._watched:
                await self._look(list(self._watched))

    async def close(self) -> None:
        """Let every stream end; its client comes back with Last-Event-ID."""
        self.closing = True
        async with self._changed:
            self._changed.notify_all()

    @contextlib.asynccontextmanager
    async def watch(self, job_id: str, caller: Caller) -> AsyncIterator[None]:
        """Have the job looked at while the block runs. Raises TooManyProjectStreams, TooManyStreams."""
        project_id = caller.project_id
        if caller.key_id is not None and self._of_project[project_id] >= self._project_streams:
            raise TooManyProjectStreams(limit=self._project_streams)
        if self._watched.total() >= self._max_streams:
            raise TooManyStreams()
        self._watched[job_id] += 1
        self._of_project[project_id] += 1
        try:
            yield
        finally:
            for counter, name in ((self._watched, job_id), (self._of_project, project_id)):
                counter[name] -= 1
                if not counter[name]:
                    del counter[name]
            if job_id not in self._watched:
                self._seqs.pop(job_id, None)

    async def wait(self, job_id: str, after: int, timeout_s: float) -> bool:
        """Wait for an event numbered above `after`; False if there was none in time or the service stops."""
        async with self._changed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: self.closing or self._seqs.get(job_id, 0) > after)
        return self._seqs.get(job_id, 0) > after

    async def _look(self, job_ids: list[str]) -> None:
        try:
            seqs = await run_in_threadpool(self._read, job_ids)
        except (DatabaseUnavailable, PoolTimeout) as error:
            log.warning("events.poll_failed", error=type(error).__name__)
            return
        async with self._changed:
            self._seqs = {job_id: seq for job_id, seq in seqs.items() if job_id in self._watched}
            self._changed.notify_all()

    def _read(self, job_ids: list[str]) -> dict[str, int]:
        with self._engine.connect() as conn:
            return last_seqs(conn, job_ids)
