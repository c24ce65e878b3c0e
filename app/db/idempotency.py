"""One request per Idempotency-Key: the key's row is written in the transaction of the work it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from psycopg.errors import LockNotAvailable
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import OperationalError

from app.db.engine import Connection, Json
from app.db.tables import idempotency_keys as keys
from app.errors import IdempotencyInFlight


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredAnswer:
    """What the first request with a key was answered; compare `request_hash` before replaying it."""

    request_hash: str
    status_code: int
    headers: Json
    body: Json


def take_key(conn: Connection, *, route: str, key: str, request_hash: str, wait_s: float = 5) -> StoredAnswer | None:
    """Take the key for this transaction (None: go ahead), or return the answer that it already has.

    A twin that holds the key in an open transaction is waited for up to `wait_s`, then IdempotencyInFlight. After that
    the transaction is broken: let it roll back.
    """
    conn.execute(text(f"set local lock_timeout = {int(wait_s * 1000)}"))
    try:
        taken = conn.execute(
            insert(keys)
            .values(route=route, key=key, request_hash=request_hash)
            .on_conflict_do_nothing()
            .returning(keys.c.key)
        ).first()
    except OperationalError as error:
        if isinstance(error.orig, LockNotAvailable):
            raise IdempotencyInFlight() from error
        raise
    conn.execute(text("set local lock_timeout = 0"))
    if taken is not None:
        return None
    # READ COMMITTED: this new statement sees the row that the twin has just committed.
    row = conn.execute(select(keys).where(keys.c.route == route, keys.c.key == key)).one()
    return StoredAnswer(
        request_hash=row.request_hash, status_code=row.status_code, headers=row.headers or {}, body=row.body or {}
    )


def find_answer(conn: Connection, *, route: str, key: str) -> StoredAnswer | None:
    """The answer that a finished request with this key got, or None; takes and waits for nothing."""
    row = conn.execute(
        select(keys).where(keys.c.route == route, keys.c.key == key, keys.c.status_code.is_not(None))
    ).first()
    if row is None:
        return None
    return StoredAnswer(
        request_hash=row.request_hash, status_code=row.status_code, headers=row.headers or {}, body=row.body or {}
    )


def store_answer(conn: Connection, *, route: str, key: str, status_code: int, headers: Json, body: Json) -> None:
    """Keep the answer of the request that took the key, in the same transaction."""
    conn.execute(
        update(keys)
        .where(keys.c.route == route, keys.c.key == key)
        .values(status_code=status_code, headers=headers, body=body)
    )


def forget_keys(conn: Connection, *, older_than_h: int) -> int:
    """Delete keys of that age; returns how many. A client that retries later than that makes a new thing."""
    old = keys.c.created_at < func.now() - func.make_interval(0, 0, 0, 0, older_than_h)
    return conn.execute(delete(keys).where(old)).rowcount
