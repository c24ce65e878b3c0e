"""How far a step is whose parts take unlike times: each part counts for what it is expected to cost. Knows no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from p2d.pipeline import Progress

SCALE = 10_000
"""Of progress that is told: a hundredth of a per cent."""


@dataclass(slots=True)
class Course:
    """Tells progress part by part. It never falls, and reaches its end only when `end` says so."""

    progress: Progress
    total: float
    """What all parts are expected to cost, in any unit."""
    _passed: float = 0.0
    _told: int = 0

    @contextmanager
    def part(self, cost: float) -> Iterator[Callable[[float], None]]:
        """Within the block, a function that is told which share of this part is done; after it, all of it is."""
        passed = self._passed
        yield lambda share: self._tell(passed + cost * min(max(share, 0.0), 1.0))
        self._passed = passed + cost
        self._tell(self._passed)

    def end(self) -> None:
        """All is done."""
        self.progress(SCALE, SCALE, {})

    def _tell(self, passed: float) -> None:
        self._told = max(self._told, min(int(SCALE * passed / self.total), SCALE - 1))
        self.progress(self._told, SCALE, {})
