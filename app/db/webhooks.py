"""Rows about webhooks: where a project wants to be told of what. What is sent to them is app.db.deliveries'.

Who changes a webhook and its deliveries locks the webhook first: one order, so no deadlock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import ARRAY, Text, any_, bindparam, delete, func, insert, or_, select, update

from app.db.engine import Connection
from app.db.tables import webhooks
from app.webhook_errors import WebhookNotFound

Reason = Literal["gone", "failing"]
Heard = Literal["all", "named"]
"""Of which jobs a webhook is told: all of its project, or those that name it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Webhook:
    """One webhook, without its secret, which is in no row."""

    id: str
    project_id: str
    url: str
    events: list[str]
    jobs: Heard
    description: str
    enabled: bool
    disabled_reason: Reason | None
    """Why the service disabled it; None where a user did, or it is enabled."""
    secret_version: int
    pepper_mark: str
    rotated_at: datetime | None
    failing_since: datetime | None
    created_at: datetime


def insert_webhook(
    conn: Connection,
    *,
    id: str,
    url: str,
    events: Sequence[str],
    jobs: Heard,
    description: str,
    enabled: bool,
    pepper_mark: str,
) -> Webhook:
    """Record a webhook."""
    values = {"url": url, "events": list(events), "jobs": jobs, "description": description, "enabled": enabled}
    query = insert(webhooks).values(id=id, pepper_mark=pepper_mark, **values).returning(webhooks)
    return Webhook(**conn.execute(query).one()._mapping)


def get_webhook(conn: Connection, webhook_id: str, *, lock: bool = False) -> Webhook | None:
    """The webhook, or None; with `lock`, locked until the caller's transaction ends."""
    query = select(webhooks).where(webhooks.c.id == webhook_id)
    row = conn.execute(query.with_for_update(key_share=True) if lock else query).first()
    return Webhook(**row._mapping) if row else None


def find_webhook(conn: Connection, webhook_id: str, *, lock: bool = False) -> Webhook:
    """`get_webhook`. Raises WebhookNotFound."""
    webhook = get_webhook(conn, webhook_id, lock=lock)
    if webhook is None:
        raise WebhookNotFound(id=webhook_id)
    return webhook


def list_webhooks(conn: Connection, *, limit: int, before: str | None = None) -> list[Webhook]:
    """Newest first; `before` is the id of the last one of the page before."""
    query = select(webhooks).order_by(webhooks.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(webhooks.c.id < before)
    return [Webhook(**row._mapping) for row in conn.execute(query)]


def update_webhook(conn: Connection, webhook_id: str, **values: Any) -> Webhook:
    """Write columns of a locked webhook and return it as it then is."""
    query = update(webhooks).where(webhooks.c.id == webhook_id).values(**values).returning(webhooks)
    return Webhook(**conn.execute(query).one()._mapping)


def rotate_secret(conn: Connection, webhook_id: str, *, pepper_mark: str) -> Webhook:
    """Count to the next secret of a locked webhook."""
    version = webhooks.c.secret_version + 1
    return update_webhook(conn, webhook_id, secret_version=version, rotated_at=func.now(), pepper_mark=pepper_mark)


def delete_webhook(conn: Connection, webhook_id: str) -> Webhook | None:
    """Remove a webhook with all its deliveries, and return it, or None if there is none."""
    row = conn.execute(delete(webhooks).where(webhooks.c.id == webhook_id).returning(webhooks)).first()
    return Webhook(**row._mapping) if row else None


_LISTENERS = (
    select(webhooks.c.id)
    .where(
        webhooks.c.project_id == bindparam("project_id"),
        webhooks.c.enabled,
        bindparam("type", type_=Text) == any_(webhooks.c.events),
        or_(webhooks.c.jobs == "all", webhooks.c.id == any_(bindparam("named", type_=ARRAY(Text)))),
    )
    # KEY SHARE: a delivery that is written in this transaction must not find its webhook deleted meanwhile.
    .with_for_update(read=True, key_share=True)
)


def listeners(conn: Connection, project_id: str, type: str, *, named: Sequence[str]) -> list[str]:
    """Ids of the project's webhooks that are told of such events; none of them goes until the transaction ends.

    Args: named: ids that the job names; of others only those that are told of all jobs.
    """
    values = {"project_id": project_id, "type": type, "named": list(named)}
    return list(conn.execute(_LISTENERS, values).scalars())


def unknown_webhooks(conn: Connection, ids: Sequence[str]) -> list[str]:
    """Those of the ids that are no webhook of the caller's project."""
    if not ids:
        return []
    there = set(conn.scalars(select(webhooks.c.id).where(webhooks.c.id.in_(ids))))
    return [one for one in ids if one not in there]


def note_failure(conn: Connection, webhook_id: str, *, failing_d: float) -> bool:
    """Note on a locked webhook that a try failed; True once none has succeeded for so many days."""
    now = func.now()
    too_long = webhooks.c.failing_since < now - func.make_interval(0, 0, 0, 0, 0, 0, failing_d * 86400)
    query = (
        update(webhooks)
        .where(webhooks.c.id == webhook_id)
        .values(failing_since=func.coalesce(webhooks.c.failing_since, now))
        .returning(too_long)
    )
    return bool(conn.execute(query).scalar_one())
