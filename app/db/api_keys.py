"""Rows about API keys: whose, for what, until when. The secret is in no row, only its HMAC. A key's row is never deleted."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from sqlalchemy import ColumnElement, bindparam, case, func, insert, select, update

from app.db.engine import Connection
from app.db.tables import api_keys as keys
from app.db.tables import projects

Scope = Literal["read", "write", "admin"]
State = Literal["active", "expired", "revoked"]

USED_EVERY = timedelta(minutes=1)
"""Time between two writes of `used_at`: a row written by every request would be a queue of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """One key, without its secret."""

    id: str
    project_id: str
    project: str
    """Name of the project."""
    name: str
    scope: Scope
    state: State
    """By PostgreSQL's clock, as it was read."""
    secret_hmac: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    used_at: datetime | None


_STATE = case(
    (keys.c.revoked_at.is_not(None), "revoked"),
    (keys.c.expires_at <= func.now(), "expired"),
    else_="active",
).label("state")

_QUERY = select(keys, projects.c.name.label("project"), _STATE).join(projects, projects.c.id == keys.c.project_id)


def insert_key(
    conn: Connection,
    *,
    id: str,
    project_id: str,
    scope: Scope,
    name: str,
    secret_hmac: str,
    expires_days: float | None,
) -> ApiKey:
    """Record a key; it works once the caller has committed."""
    expires_at = None if expires_days is None else _after_days(expires_days)
    conn.execute(
        insert(keys).values(
            id=id, project_id=project_id, scope=scope, name=name, secret_hmac=secret_hmac, expires_at=expires_at
        )
    )
    key = get_key(conn, id)
    assert key is not None
    return key


_BY_ID = _QUERY.where(keys.c.id == bindparam("key_id"))
_BY_ID_LOCKED = _BY_ID.with_for_update(of=keys)


def get_key(conn: Connection, key_id: str, *, lock: bool = False) -> ApiKey | None:
    """The key in whatever state, or None; with `lock`, locked until the caller's transaction ends."""
    row = conn.execute(_BY_ID_LOCKED if lock else _BY_ID, {"key_id": key_id}).first()
    return ApiKey(**row._mapping) if row else None


_ANY = select(select(keys.c.id).exists())


def any_key(conn: Connection) -> bool:
    """Whether a key was ever made."""
    return bool(conn.execute(_ANY).scalar_one())


def note_use(conn: Connection, key: ApiKey) -> None:
    """Write that a key was used, unless that was written a moment ago."""
    if key.used_at is None or datetime.now(UTC) - key.used_at > USED_EVERY:
        conn.execute(update(keys).where(keys.c.id == key.id).values(used_at=func.now()))


def still_opens(conn: Connection, key_id: str) -> bool:
    """Whether a key that was good is neither revoked nor expired by now."""
    return conn.execute(select(keys.c.id).where(keys.c.id == key_id, _STATE == "active")).first() is not None


def list_keys(conn: Connection, *, limit: int | None = None, before: str | None = None) -> list[ApiKey]:
    """Newest first, in every state; `before` is the id of the last one of the page before."""
    query = _QUERY.order_by(keys.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(keys.c.id < before)
    return [ApiKey(**row._mapping) for row in conn.execute(query)]


def revoke_key(conn: Connection, key_id: str) -> ApiKey | None:
    """Let a key open nothing any more, and return it, or None if there is none. The first time counts."""
    conn.execute(update(keys).where(keys.c.id == key_id, keys.c.revoked_at.is_(None)).values(revoked_at=func.now()))
    return get_key(conn, key_id)


def _after_days(days: float) -> ColumnElement[datetime]:
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, days * 86400)
