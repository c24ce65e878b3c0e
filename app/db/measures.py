"""What /metrics shows of the ledger, counted there at each scrape, so that it is right however many processes serve the API.

Counters never fall: what a deleted job had counted is added to the table `tallies` when it goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import ColumnElement, Integer, Select, and_, cast, func, literal, select, union_all
from sqlalchemy.dialects.postgresql import ARRAY, Insert
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.types import Double

from app.db.engine import Connection
from app.db.estimates import AbsoluteError, Error, absolute_errors, is_judged, past_errors, ratio
from app.db.leases import is_free
from app.db.tables import attempts, datasets, jobs, objects, steps, tallies, webhook_deliveries, webhooks

SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 21600.0)
"""Upper ends of the buckets of a step's seconds."""

RATIOS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)
"""Upper ends of the buckets of actual over estimated seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counted:
    """A histogram: how many observations fell into each bucket, the last one being open, and their sum."""

    numbers: tuple[int, ...]
    total: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """Steps of one queue that wait for a worker."""

    ready: int
    oldest_s: float
    """Seconds since the one that waits longest became ready, as far as the ledger tells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measures:
    """Everything that is shown."""

    jobs: Mapping[str, int]
    queues: Mapping[str, Queue]
    running_steps: int
    oldest_running_s: float
    expired_leases: int
    busy_workers: int
    objects: int
    stored_bytes: int
    uploaded_bytes: int
    errors: Mapping[str, Error]
    absolute_errors: Mapping[str, AbsoluteError]
    """By step, and of whole jobs."""
    attempts: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    """By step, outcome and code of the error ("" without one)."""
    step_seconds: Mapping[str, Counted] = field(default_factory=dict)
    estimate_ratios: Mapping[str, Counted] = field(default_factory=dict)
    deliveries: Mapping[str, int] = field(default_factory=dict)
    """Deliveries of webhooks that are kept, by status."""
    disabled_webhooks: int = 0
    """Webhooks that the service disabled."""
    delivery_tries: Mapping[str, int] = field(default_factory=dict)
    """By outcome."""


def measure(conn: Connection) -> Measures:
    """Count it all; the caller's engine must see every project."""
    by_status = select(jobs.c.status, func.count()).group_by(jobs.c.status)
    held = select(
        func.count(),
        func.coalesce(func.max(_age(steps.c.started_at)), 0.0),
        func.count().filter(steps.c.lease_until < func.now()),
        func.count(steps.c.worker.distinct()),
    ).where(steps.c.status == "running")
    running, oldest_s, expired, workers = conn.execute(held).one()
    stored = select(func.count(), _sum(objects.c.size_bytes)).where(objects.c.stored_at.is_not(None))
    count, size = conn.execute(stored).one()
    delivered = select(webhook_deliveries.c.status, func.count()).group_by(webhook_deliveries.c.status)
    disabled = select(func.count()).select_from(webhooks).where(webhooks.c.disabled_reason.is_not(None))
    return Measures(
        jobs={row[0]: row[1] for row in conn.execute(by_status)},
        queues={row[0]: Queue(ready=row[1], oldest_s=float(row[2])) for row in conn.execute(_ready())},
        running_steps=running,
        oldest_running_s=float(oldest_s),
        expired_leases=expired,
        busy_workers=workers,
        objects=count,
        stored_bytes=int(size),
        uploaded_bytes=int(conn.execute(select(_sum(datasets.c.size_bytes))).scalar_one()),
        errors=past_errors(conn),
        deliveries={row[0]: row[1] for row in conn.execute(delivered)},
        disabled_webhooks=conn.execute(disabled).scalar_one(),
        absolute_errors=absolute_errors(conn),
        **_counters(conn),
    )


Tally = tuple[str, str, str, str, int, int, float]
"""A row of `tallies`."""


def tallies_of(conn: Connection, job_id: str) -> list[Tally]:
    """What a locked job that is to be deleted counts, for `keep_tallies`."""
    return [tuple(row) for counts in _counts(jobs.c.id == job_id) for row in conn.execute(counts)]


def keep_tallies(conn: Connection, counted: Iterable[Tally]) -> None:
    """Add what deleted jobs had counted. Others wait for the rows until the caller commits: the last thing before that."""
    sums: dict[tuple[str, str, str, str, int], tuple[int, float]] = {}
    for name, step, outcome, code, bucket, number, total in counted:
        numbers, totals = sums.get((name, step, outcome, code, bucket), (0, 0.0))
        sums[name, step, outcome, code, bucket] = numbers + number, totals + total
    columns = [column.name for column in tallies.c]
    # Everybody takes them in one order, so that of two none waits for the other.
    rows = [dict(zip(columns, (*key, *sums[key]), strict=True)) for key in sorted(sums)]
    if rows:
        _add(conn, upsert(tallies).values(rows))


def count_try(conn: Connection, outcome: Literal["delivered", "refused", "unanswered"]) -> None:
    """Count a try of a delivery. Others wait for the row until the caller commits: the last thing before that."""
    values = {
        "name": "delivery_tries",
        "step": "",
        "outcome": outcome,
        "code": "",
        "bucket": 0,
        "number": 1,
        "total": 0,
    }
    _add(conn, upsert(tallies).values(values))


def _add(conn: Connection, new: Insert) -> None:
    sums = {"number": tallies.c.number + new.excluded.number, "total": tallies.c.total + new.excluded.total}
    conn.execute(new.on_conflict_do_update(index_elements=list(tallies.primary_key), set_=sums))


def _ready() -> Select[Any]:
    # A step becomes ready with its job, or when the last of those before it ends.
    others = steps.alias("others")
    before = select(func.max(others.c.finished_at)).where(others.c.job_id == steps.c.job_id, others.c.status == "done")
    since = func.greatest(steps.c.created_at, before.scalar_subquery())
    return select(steps.c.queue, func.count(), func.max(_age(since))).where(is_free()).group_by(steps.c.queue)


def _counts(which: ColumnElement[bool]) -> list[Select[Any]]:
    """Queries that give rows of `tallies` for some jobs."""
    nothing, none = literal(""), literal(0)
    code = func.coalesce(attempts.c.error["code"].astext, "")
    tried = (
        select(literal("attempts"), steps.c.step, attempts.c.outcome, code, none, func.count(), literal(0.0))
        .select_from(attempts)
        .join(steps, steps.c.id == attempts.c.step_id)
        .join(jobs, jobs.c.id == attempts.c.job_id)
        .where(which, attempts.c.outcome != "running")
        .group_by(steps.c.step, attempts.c.outcome, code)
    )
    found = [tried]
    judged = {"step_seconds": and_(steps.c.status == "done", steps.c.reused.is_(None)), "estimate_ratio": is_judged()}
    for name, edges, value in (("step_seconds", SECONDS, steps.c.seconds), ("estimate_ratio", RATIOS, ratio())):
        bucket = func.width_bucket(cast(value, Double), cast(list(edges), ARRAY(Double)), type_=Integer)
        found.append(
            select(literal(name), steps.c.step, nothing, nothing, bucket, func.count(), func.sum(value))
            .select_from(steps)
            .join(jobs, jobs.c.id == steps.c.job_id)
            .where(which, judged[name], steps.c.seconds.is_not(None))
            .group_by(steps.c.step, bucket)
        )
    return found


def _counters(conn: Connection) -> dict[str, Any]:
    kept: Select[Any] = select(tallies)
    rows = conn.execute(union_all(kept, *_counts(jobs.c.id.is_not(None)))).all()
    tried: dict[tuple[str, str, str], int] = {}
    delivery_tries: dict[str, int] = {}
    series: dict[str, dict[str, Counted]] = {"step_seconds": {}, "estimate_ratio": {}}
    for name, step, outcome, code, bucket, number, total in rows:
        if name == "attempts":
            tried[step, outcome, code] = tried.get((step, outcome, code), 0) + number
            continue
        if name == "delivery_tries":
            delivery_tries[outcome] = number
            continue
        width = len(SECONDS if name == "step_seconds" else RATIOS) + 1
        before = series[name].get(step, Counted(numbers=(0,) * width, total=0.0))
        numbers = tuple(n + (number if at == bucket else 0) for at, n in enumerate(before.numbers))
        series[name][step] = Counted(numbers=numbers, total=before.total + float(total))
    return {
        "attempts": tried,
        "delivery_tries": delivery_tries,
        "step_seconds": series["step_seconds"],
        "estimate_ratios": series["estimate_ratio"],
    }


def _sum(column: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.coalesce(func.sum(column), 0)


def _age(at: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.extract("epoch", func.now() - at)
