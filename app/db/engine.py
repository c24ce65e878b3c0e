"""Opening PostgreSQL. The types `Connection` and `Engine` are re-exported so that only app.db imports SQLAlchemy.

Functions of app.db take a Connection first and never commit: the caller opens the transaction (`with engine.begin()`).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

__all__ = ["Connection", "DatabaseUnavailable", "Engine", "Json", "PoolTimeout", "make_engine", "ping"]

DatabaseUnavailable = OperationalError
"""What any statement raises when PostgreSQL cannot be reached or gave up on it; safe to try again later."""

Json = dict[str, Any]
"""A JSON object as PostgreSQL stores it; its shape is the business of whoever wrote it."""


def make_engine(
    database_url: str, *, pool_size: int = 10, pool_wait_s: float = 5, statement_timeout_s: float = 15
) -> Engine:
    """An engine on psycopg 3 for `postgresql://...` with UTC, timeouts and keepalives set. Opens no connection yet."""
    url = make_url(database_url)
    if url.drivername in {"postgresql", "postgres"}:
        url = url.set(drivername="postgresql+psycopg")
    timeout_ms = int(statement_timeout_s * 1000)
    options = f"-c timezone=UTC -c statement_timeout={timeout_ms} -c idle_in_transaction_session_timeout=30000"
    return create_engine(
        url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=pool_wait_s,
        pool_pre_ping=True,
        pool_recycle=1800,
        connect_args={
            "connect_timeout": 3,
            "keepalives_idle": 20,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "application_name": "p2d",
            "options": options,
        },
    )


def ping(engine: Engine) -> None:
    """Raise DatabaseUnavailable unless PostgreSQL answers."""
    with engine.connect() as conn:
        conn.execute(text("select 1"))
