"""What a worker notes of one attempt, for the user who owns the job: the newest lines, and how many were before them.

Each is a word and a few facts that the worker made itself: numbers, names of files and steps, codes of errors. Nothing that the
child prints, and no text of an error, which may quote a row, comes in here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from app.db.attempts import keep_log
from app.db.engine import Connection
from app.db.leases import Lease

MOST_LINES = 200
"""Lines that are kept: some 30 kB. Older ones are dropped and counted."""

Level = Literal["info", "warning", "error"]
Fact = str | int | float | bool | None


class Notes:
    """The lines of one attempt."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease
        self._lines: deque[dict[str, object]] = deque(maxlen=MOST_LINES)
        self._noted = 0

    def note(self, event: str, *, level: Level = "info", **facts: Fact) -> None:
        """Add a line."""
        self._add(event, level, facts)

    def progress(self, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Add a line about how far the step is."""
        self._add("step.progress", "info", {**metrics, "done": done, "total": total})

    def _add(self, event: str, level: Level, facts: Mapping[str, Fact]) -> None:
        at = datetime.now(UTC).isoformat()
        finite = {name: value for name, value in facts.items() if not isinstance(value, float) or math.isfinite(value)}
        self._lines.append({"at": at, "level": level, "event": event, "facts": finite})  # JSONB has no NaN
        self._noted += 1

    def keep(self, conn: Connection) -> None:
        """Write all lines into the ledger. No fence: the row is this attempt's own."""
        dropped = self._noted - len(self._lines)
        keep_log(conn, self._lease.step_id, self._lease.token, list(self._lines), dropped)
