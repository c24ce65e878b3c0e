"""How long a new job would wait for a worker, and what the machines have: sums over all projects, as an estimate tells them.

The order is that of `app.db.leases.claim`: the project with the fewest running steps comes first, within it the higher priority,
then the older job. Arithmetic over what `app.db.waiting` counts; nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from app.core.foresight import Interval, stretched
from app.db.engine import Engine
from app.db.estimates import Error, past_errors
from app.db.waiting import SEEN_S, Equipment, Line, equipment, line_of
from p2d.wording import counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Outlook:
    """What awaits a job."""

    wait: Interval
    basis: str
    equipment: Equipment | None


class Lookout:
    """Looks at the whole queue for a project that may only see its own part; hands on sums alone."""

    def __init__(self, owner: Engine) -> None:
        self._owner = owner

    def outlook(self, *, project_id: str, queue: str, priority: int) -> Outlook:
        """What awaits a job of a project that were queued now."""
        with self._owner.connect() as conn:
            line = line_of(conn, project_id=project_id, queue=queue, priority=priority)
            errors, machines = past_errors(conn), equipment(conn, queue=queue)
        return Outlook(wait=wait_of(line, errors), basis=_basis(line), equipment=machines)


def wait_of(line: Line, errors: Mapping[str, Error]) -> Interval:
    """Seconds until a worker takes the first step of a job that stands at the end of a line.

    All of the project's own steps before it are done first, and by turns about as much of every other project's: of a project
    with less than that, all. The workers share it. A worker that is free is counted on where there is none at all.
    """
    workers = max(1, line.workers)
    first = min(line.running, key=lambda held: held[1], default=None)
    until_free = stretched(dict([first]), errors) if first and len(line.running) >= workers else _NOTHING
    own = stretched(line.own, errors)
    others = [stretched(one, errors) for one in line.others]
    return Interval(
        **{
            name: getattr(until_free, name)
            + _shared(getattr(own, name), (getattr(one, name) for one in others)) / workers
            for name in ("p10", "p50", "p90")
        }
    )


def _shared(own: float, others: Iterable[float]) -> float:
    return own + sum(min(own, one) for one in others)


_NOTHING = Interval(p10=0.0, p50=0.0, p90=0.0)


def _basis(line: Line) -> str:
    hours = f"{SEEN_S / 3600:.0f} h"
    workers = f"{counted(line.workers, 'worker', 'workers')} seen within {hours}"
    if line.workers == 0:
        workers = f"no worker seen within {hours}, so one that waits is counted on"
    waiting = f"{sum(line.own.values()):.0f} s of the project's own steps come first"
    others = f", {sum(sum(one.values()) for one in line.others):.0f} s of other projects' take turns with them"
    return f"{waiting}{others if line.others else ''}; {counted(len(line.running), 'step', 'steps')} running; {workers}"
