"""The audit log: who did what to which thing, and when. Entries are added in the transaction of the deed and never change."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from sqlalchemy import insert, select

from app.db.engine import Connection, Json
from app.db.ids import new_id
from app.db.tables import audit

Action = Literal[
    "key.create",
    "key.revoke",
    "dataset.create",
    "dataset.delete",
    "report.delete",
    "upload.delete",
    "job.create",
    "job.update",
    "job.cancel",
    "job.pause",
    "job.resume",
    "job.retry",
    "job.delete",
    "head_map.import",
    "head_map.delete",
    "selection.export",
    "selection.delete",
    "artifact.download",
    "artifact.expire",
    "artifact.delete",
    "webhook.create",
    "webhook.update",
    "webhook.rotate",
    "webhook.delete",
    "webhook.test",
    "webhook.redeliver",
    "webhook.disable",
    "comparison.create",
    "comparison.delete",
]

KEYLESS, OPERATOR, SERVICE = "loopback", "command line", "service"
"""Actors without a key: whoever is on this machine while there are no keys, whoever has the database, and nobody."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One deed."""

    id: str
    project_id: str
    actor: str
    action: Action
    object_id: str
    request_id: str | None
    facts: Json
    created_at: datetime


_INSERT = insert(audit).returning(audit)


def append_entry(
    conn: Connection,
    *,
    actor: str,
    action: Action,
    object_id: str,
    facts: Json,
    request_id: str | None = None,
    project_id: str | None = None,
) -> Entry:
    """Add an entry, for the project that the transaction speaks for where none is named. Never a secret, never row text."""
    values: Json = {"id": new_id("aud"), "actor": actor, "action": action, "object_id": object_id}
    values |= {"request_id": request_id, "facts": facts} | ({"project_id": project_id} if project_id else {})
    return Entry(**conn.execute(_INSERT, values).one()._mapping)


def list_entries(
    conn: Connection, *, limit: int, before: str | None = None, object_id: str | None = None
) -> list[Entry]:
    """Newest first, of one thing or of all; `before` is the id of the last one of the page before."""
    query = select(audit).order_by(audit.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(audit.c.id < before)
    if object_id is not None:
        query = query.where(audit.c.object_id == object_id)
    return [Entry(**row._mapping) for row in conn.execute(query)]
