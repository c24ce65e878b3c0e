"""Opening PostgreSQL. The types `Connection` and `Engine` are re-exported so that only app.db imports SQLAlchemy.

Functions of app.db take a Connection first and never commit: the caller opens the transaction (`with engine.begin()`).
"""

from __future__ import annotations

import math
import time
from typing import Any

from psycopg import Error as PsycopgError
from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event, make_url
from sqlalchemy.exc import InvalidatePoolError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

__all__ = [
    "Connection",
    "DatabaseUnavailable",
    "Engine",
    "Json",
    "PoolTimeout",
    "SchemaBehind",
    "for_project",
    "make_engine",
]

RESTED_S = 1.0
"""A connection that lay idle for so long is tried before it is used."""

NOBODY = ""
"""The project of a caller who is not known yet: no row is one of its."""

DatabaseUnavailable = OperationalError
"""What any statement raises when PostgreSQL cannot be reached, gave up on it or had closed its connection, as it does to a
process that slept in a transaction; safe to try again later."""


class SchemaBehind(OperationalError):
    """What a statement raises when the database lacks a table, a column or the role that this code knows; safe to try again
    once it has been migrated. Whoever waits for a database that is away waits for this too."""


MISSING = frozenset({"42P01", "42703"})
"""PostgreSQL's states of a table and of a column that are not there."""

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
    engine = create_engine(
        url,
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_timeout=pool_wait_s,
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
    event.listen(engine, "begin", _speak_for_project)
    event.listen(engine, "handle_error", _tell_later)
    _ping_rested(engine)
    return engine


def for_project(engine: Engine, project_id: str) -> Engine:
    """The same connections, for the API: every transaction sees and writes the rows of this project only.

    It takes on the role `p2d_api`, whom row-level security holds, so a statement that forgets the project still cannot
    reach another's rows. Without this an engine is the owner's: workers, migrations and the command line see all.
    """
    return engine.execution_options(p2d_project=project_id)


def _speak_for_project(conn: Connection) -> None:
    project_id = conn.get_execution_options().get("p2d_project")
    if project_id is not None:
        # `true`: until the transaction ends, as SET LOCAL; so the pool never hands on somebody's project.
        conn.exec_driver_sql(_SPEAK, (project_id,))


_SPEAK = "select set_config('role', 'p2d_api', true), set_config('p2d.project', %s, true)"


def _tell_later(context: ExceptionContext) -> None:
    found = context.original_exception
    if not isinstance(found, PsycopgError):
        return
    # The role is missing: then `set_config` calls its name a wrong value.
    no_role = found.sqlstate == "22023" and context.statement == _SPEAK
    if found.sqlstate in MISSING or no_role:
        raise SchemaBehind(context.statement, context.parameters, found) from found
    # psycopg has other classes too for a connection that PostgreSQL closed: InternalError for one idle in its transaction.
    if context.is_disconnect and not isinstance(context.sqlalchemy_exception, OperationalError):
        raise DatabaseUnavailable(context.statement, context.parameters, found, connection_invalidated=True) from found


def _ping_rested(engine: Engine) -> None:
    """Do as `pool_pre_ping` does, but only for connections that lay idle: the others were alive a moment ago."""

    def note(_: object, record: ConnectionPoolEntry) -> None:
        record.info["rests_since"] = time.monotonic()

    def ping(connection: Any, record: ConnectionPoolEntry, _: object) -> None:
        if time.monotonic() - record.info.get("rests_since", math.inf) > RESTED_S:
            try:
                engine.dialect.do_ping(connection)
            except PsycopgError as error:
                raise InvalidatePoolError() from error  # the pool opens another in its place

    event.listen(engine, "checkin", note)
    event.listen(engine, "checkout", ping)
