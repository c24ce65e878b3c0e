"""What stands before a new job: waiting and running steps of a queue, and who works there. The owner's view, of all projects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Double, and_, case, column, func, or_, select
from sqlalchemy.dialects.postgresql import JSONB

from app.db.engine import Connection
from app.db.estimates import RECENT
from app.db.ids import first_id
from app.db.tables import attempts, jobs, steps

SEEN_S = 3600.0
"""Seconds for which a worker counts as there after it last took a step."""

Seconds = Mapping[str, float]
"""By step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A queue as a job of one project and priority would find it."""

    own: Seconds
    """Of the project's waiting steps whose jobs come first: those of its priority or a higher one."""
    others: tuple[Seconds, ...]
    """Of all waiting steps of each other project."""
    running: tuple[tuple[str, float], ...]
    """(step, seconds left) of those that a worker holds."""
    workers: int
    """Seen in the last SEEN_S seconds; those that have idled for longer are not known."""


def line_of(conn: Connection, *, project_id: str, queue: str, priority: int) -> Line:
    """Look at a queue; needs the owner's connection."""
    seconds = _recorded(conn)
    planned = jobs.c.estimate.is_not(None)
    mine = steps.c.project_id == project_id
    waiting = (
        select(steps.c.project_id, steps.c.step, planned, func.sum(steps.c.weight), func.count())
        .join_from(steps, jobs)
        .where(steps.c.queue == queue, steps.c.status.in_(["ready", "blocked"]))
        .where(jobs.c.status.in_(["queued", "running"]), or_(~mine, steps.c.priority >= priority))
        .group_by(steps.c.project_id, steps.c.step, planned)
    )
    by_project: dict[str, dict[str, float]] = {}
    for project, step, is_planned, weight, count in conn.execute(waiting):
        # A job that has not validated has no plan: its steps will take what such steps took.
        found = weight if is_planned or step not in seconds else seconds[step] * count
        of_steps = by_project.setdefault(project, {})
        of_steps[step] = of_steps.get(step, 0.0) + float(found)
    left = case((steps.c.progress < 1, steps.c.weight * (1 - steps.c.progress)), else_=0.0)
    held = conn.execute(select(steps.c.step, left).where(steps.c.queue == queue, steps.c.status == "running")).all()
    own = by_project.pop(project_id, {})
    return Line(
        own=own,
        others=tuple(by_project.values()),
        running=tuple((step, float(s)) for step, s in held),
        workers=_workers(conn, queue),
    )


def _recorded(conn: Connection) -> Seconds:
    """Median seconds of the newest finished steps (shards) of each name."""
    newness = func.row_number().over(partition_by=steps.c.step, order_by=steps.c.finished_at.desc())
    done = and_(steps.c.status == "done", steps.c.reused.is_(None), steps.c.seconds.is_not(None))
    recent = select(steps.c.step, steps.c.seconds, newness.label("newness")).where(done).subquery()
    median = func.percentile_cont(0.5).within_group(recent.c.seconds)
    query = select(recent.c.step, median).where(recent.c.newness <= RECENT).group_by(recent.c.step)
    return {step: float(seconds) for step, seconds in conn.execute(query)}


def _workers(conn: Connection, queue: str) -> int:
    # Ids sort by time, so the newest attempts are the end of the primary key.
    lately = attempts.c.id >= first_id("att", ago_s=SEEN_S)
    query = select(func.count(attempts.c.worker.distinct())).join_from(attempts, steps).where(steps.c.queue == queue)
    return int(conn.execute(query.where(or_(lately, _holds()))).scalar_one())


def _holds() -> ColumnElement[bool]:
    return and_(steps.c.status == "running", attempts.c.token == steps.c.token)


@dataclass(frozen=True, kw_only=True, slots=True)
class Equipment:
    """What the workers of the newest finished steps had, the smallest of them."""

    device: str
    """Of the newest one: `cpu`, `cuda`, `cuda:0` ..."""
    host_bytes: int
    device_bytes: int
    """0 on a CPU."""
    precision: str | None
    """In which the newest job computed."""


def equipment(conn: Connection, *, queue: str) -> Equipment | None:
    """What is known of the machines behind a queue; None before any step has said so. Needs the owner's connection."""
    accounting = func.jsonb_each(steps.c.facts).table_valued("key", column("value", JSONB), joins_implicitly=True)
    value = accounting.c.value
    host, device = (value[name].astext.cast(Double) for name in ("host_memory_bytes", "device_memory_bytes"))
    precision = jobs.c.resolved["config"]["training"]["precision"].astext
    recent = (
        select(
            value["device"].astext.label("device"),
            host.label("host"),
            func.coalesce(device, 0).label("memory"),
            precision.label("as"),
        )
        .join_from(steps, jobs)
        .where(steps.c.queue == queue, steps.c.status == "done", func.jsonb_typeof(steps.c.facts) == "object")
        .where(host > 0, steps.c.model_digest.is_not(None))
        .order_by(steps.c.finished_at.desc())
        .limit(RECENT)
    )
    rows: list[Any] = list(conn.execute(recent))
    if not rows:
        return None
    newest = rows[0]
    like = [row for row in rows if (row.memory > 0) == (newest.memory > 0)]
    return Equipment(
        device=newest.device,
        host_bytes=int(min(row.host for row in like)),
        device_bytes=int(min(row.memory for row in like)),
        precision=newest[3],
    )
