"""How many requests at once may fetch, put together and check files: these last minutes, and must leave threads to all others.

Each holds one of the 40 threads on which AnyIO runs everything that a process answers (`app.core.quotas.IN_FLIGHT`), the door
and all `def` routes too. What is checked, app.core.ingest says.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator

from app.core.keys import Caller
from app.dataset_errors import IntakeFull

SEATS = 16
"""Requests that work at once. A guess, as the three below: each is a process that reads, so more would hardly be faster."""

PROJECT_SEATS = 12
"""Most of them for one project, as far as keys tell projects apart: the others find a seat."""

WAITING = 8
"""Requests that wait for a seat; with those that have one they leave 16 of the 40 threads free."""

WAIT_S = 20.0
"""How long one waits."""


class Intake:
    """The seats of a process; threads share it."""

    def __init__(self) -> None:
        self._left = threading.Condition()
        self._seated: Counter[str] = Counter()
        self._waiting = 0

    @contextlib.contextmanager
    def seat(self, caller: Caller) -> Iterator[None]:
        """Hold a seat while the block runs. Raises IntakeFull, at once where as many wait already as may."""
        project_id = caller.project_id
        most = SEATS if caller.key_id is None else PROJECT_SEATS

        def free() -> bool:
            return self._seated.total() < SEATS and self._seated[project_id] < most

        with self._left:
            if not free():
                self._wait(free)
            self._seated[project_id] += 1
        try:
            yield
        finally:
            with self._left:
                self._seated[project_id] -= 1
                self._left.notify_all()

    def _wait(self, free: Callable[[], bool]) -> None:
        if self._waiting >= WAITING:
            raise IntakeFull()
        self._waiting += 1
        try:
            if not self._left.wait_for(free, WAIT_S):
                raise IntakeFull()
        finally:
            self._waiting -= 1
