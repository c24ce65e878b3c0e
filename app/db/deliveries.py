"""Rows about deliveries: the outbox of webhooks. A row is written by the transaction of the change that it tells of.

A try is a lease, as a claim of a step is: whoever sends holds the row's token, and a late one changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, delete, func, insert, or_, select, text, update

from app.db.engine import Connection, Json
from app.db.ids import new_id
from app.db.tables import jobs, webhooks
from app.db.tables import webhook_deliveries as deliveries
from app.webhook_errors import DeliveryNotFound

DeliveryStatus = Literal["pending", "delivered", "failed"]

CLAIM_LOCK = 0x703264_04
"""Advisory lock key; see also migrations.MIGRATION_LOCK."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delivery:
    """One event on its way to one webhook."""

    id: str
    project_id: str
    webhook_id: str
    job_id: str | None
    type: str
    data: Json
    status: DeliveryStatus
    token: int
    attempts: int
    tries: int
    """Attempts since it was made or last asked for again."""
    lease_until: datetime | None
    next_try_at: datetime
    tried_at: datetime | None
    response_status: int | None
    error: str | None
    created_at: datetime
    finished_at: datetime | None


def insert_deliveries(
    conn: Connection, project_id: str, webhook_ids: Sequence[str], *, type: str, data: Json, job_id: str | None = None
) -> list[Delivery]:
    """Record one event for each of these webhooks, due at once."""
    shared = {"project_id": project_id, "job_id": job_id, "type": type, "data": data}
    rows = [{"id": new_id("whd"), "webhook_id": webhook_id, **shared} for webhook_id in webhook_ids]
    return [
        Delivery(**conn.execute(insert(deliveries).values(row).returning(deliveries)).one()._mapping) for row in rows
    ]


def claim_delivery(conn: Connection, *, pepper_mark: str, lease_s: float) -> Delivery | None:
    """Take the delivery that has been due for longest, or None; the try counts from here on.

    Only those of webhooks that are enabled and whose secret comes from this pepper. None of a webhook to which another is
    being sent, so that a receiver that hangs holds up its own deliveries and no others'.
    """
    # Claims take turns, or two in one moment would not see each other's and both go to the same webhook.
    conn.execute(text("select pg_advisory_xact_lock(:key)"), {"key": CLAIM_LOCK})
    free = or_(deliveries.c.lease_until.is_(None), deliveries.c.lease_until < func.now())
    other = deliveries.alias("other")
    held = select(other.c.id).where(
        other.c.webhook_id == deliveries.c.webhook_id, other.c.status == "pending", other.c.lease_until > func.now()
    )
    held = held.correlate(deliveries)
    due = (
        select(deliveries.c.id)
        .join(webhooks, webhooks.c.id == deliveries.c.webhook_id)
        .where(_due(), free, webhooks.c.enabled, webhooks.c.pepper_mark == pepper_mark, ~held.exists())
        .order_by(deliveries.c.next_try_at, deliveries.c.id)
        .limit(1)
        .with_for_update(of=deliveries, skip_locked=True)
    )
    taken = (
        update(deliveries)
        .where(deliveries.c.id == due.scalar_subquery(), deliveries.c.status == "pending", free)
        .values(
            token=deliveries.c.token + 1,
            attempts=deliveries.c.attempts + 1,
            tries=deliveries.c.tries + 1,
            tried_at=func.now(),
            lease_until=_in(lease_s),
        )
        .returning(deliveries)
    )
    row = conn.execute(taken).first()
    return Delivery(**row._mapping) if row else None


def any_unsignable(conn: Connection, *, pepper_mark: str | None) -> bool:
    """Whether something is due that whoever has this pepper cannot sign."""
    foreign = webhooks.c.id.is_not(None) if pepper_mark is None else webhooks.c.pepper_mark != pepper_mark
    query = select(deliveries.c.id).join(webhooks, webhooks.c.id == deliveries.c.webhook_id)
    return bool(conn.execute(select(query.where(_due(), webhooks.c.enabled, foreign).exists())).scalar_one())


def end_try(
    conn: Connection,
    delivery: Delivery,
    *,
    status: DeliveryStatus,
    response_status: int | None,
    error: str | None,
    next_in_s: float = 0.0,
) -> bool:
    """Write how a try went; False, and nothing written, if it is no longer this try's to say."""
    values: dict[str, Any] = {"status": status, "response_status": response_status, "error": error, "lease_until": None}
    values |= {"next_try_at": _in(next_in_s)} if status == "pending" else {"finished_at": func.now()}
    mine = (deliveries.c.id == delivery.id, deliveries.c.token == delivery.token, deliveries.c.status == "pending")
    return conn.execute(update(deliveries).where(*mine).values(values)).rowcount == 1


def fail_deliveries(conn: Connection, webhook_id: str, error: str) -> None:
    """Give up all that is still to be sent to a locked webhook; `error` is why, where no try has told."""
    why = func.coalesce(deliveries.c.error, error)
    values = {"status": "failed", "error": why, "lease_until": None, "finished_at": func.now()}
    pending = (deliveries.c.webhook_id == webhook_id, deliveries.c.status == "pending")
    conn.execute(update(deliveries).where(*pending).values(values))


def get_delivery(conn: Connection, delivery_id: str) -> Delivery | None:
    """The delivery, or None."""
    row = conn.execute(select(deliveries).where(deliveries.c.id == delivery_id)).first()
    return Delivery(**row._mapping) if row else None


def find_delivery(conn: Connection, webhook_id: str, delivery_id: str) -> Delivery:
    """A delivery of that webhook. Raises DeliveryNotFound."""
    delivery = get_delivery(conn, delivery_id)
    if delivery is None or delivery.webhook_id != webhook_id:
        raise DeliveryNotFound(id=delivery_id)
    return delivery


def requeue_delivery(conn: Connection, delivery_id: str) -> Delivery:
    """Make a delivery due now, whatever became of it, with all its tries before it; one that is being sent is not taken away."""
    values = {"status": "pending", "tries": 0, "next_try_at": func.now(), "finished_at": None}
    query = update(deliveries).where(deliveries.c.id == delivery_id).values(values).returning(deliveries)
    return Delivery(**conn.execute(query).one()._mapping)


def list_deliveries(
    conn: Connection, webhook_id: str, *, limit: int, before: str | None = None, status: str | None = None
) -> list[Delivery]:
    """Newest first; `before` is the id of the last one of the page before."""
    query = select(deliveries).where(deliveries.c.webhook_id == webhook_id).order_by(deliveries.c.id.desc())
    if before is not None:
        query = query.where(deliveries.c.id < before)
    if status is not None:
        query = query.where(deliveries.c.status == status)
    return [Delivery(**row._mapping) for row in conn.execute(query.limit(limit))]


def forget_deliveries(conn: Connection, *, kept_d: float) -> int:
    """Delete what ended that long ago or tells of a job that is gone, and what as long waits for a webhook that is disabled."""
    old = func.now() - func.make_interval(0, 0, 0, 0, 0, 0, kept_d * 86400)
    gone = and_(deliveries.c.job_id.is_not(None), ~select(jobs.c.id).where(jobs.c.id == deliveries.c.job_id).exists())
    ended = and_(deliveries.c.finished_at.is_not(None), or_(deliveries.c.finished_at < old, gone))
    disabled = select(webhooks.c.id).where(webhooks.c.id == deliveries.c.webhook_id, ~webhooks.c.enabled).exists()
    held = and_(deliveries.c.status == "pending", deliveries.c.created_at < old, disabled)
    return conn.execute(delete(deliveries).where(or_(ended, held))).rowcount


def _due() -> ColumnElement[bool]:
    return and_(deliveries.c.status == "pending", deliveries.c.next_try_at <= func.now())


def _in(seconds: float) -> ColumnElement[datetime]:
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
