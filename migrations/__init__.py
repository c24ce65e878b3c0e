"""Schema of the ledger over time: `upgrade` brings a database to the newest revision. Never run at import or by the API.

Revisions are `versions/NNNN_{pre,post}_what.py`: `pre` runs before the code that needs it goes out, `post` after.
"""

from __future__ import annotations

import time
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import OperationalError

from app.access_errors import TablesInUse

MIGRATION_LOCK = 0x703264_01
"""Advisory lock key: one migration at a time, however many processes start at once."""


LOCK_WAIT_S = 2.0
"""Longest wait for a table that somebody uses. Whoever asks for the table meanwhile waits as well: far below the timeout of
a statement."""

PAUSE_S = 3.0
"""Seconds between two tries, in which those who waited are served. A guess."""

PATIENCE_S = 300.0
"""Seconds after which no further try is made. A guess: longer than any transaction of ours."""

LOCK_NOT_AVAILABLE = "55P03"
"""PostgreSQL's state of a lock that was waited for in vain."""


def upgrade(engine: Engine) -> None:
    """Bring the database to the newest revision; waits while another process does it, then finds nothing to do.

    A table that somebody uses is waited for in short tries, so that the service goes on meanwhile. Raises TablesInUse.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not _upgraded(engine):
        if time.monotonic() > deadline:
            raise TablesInUse(seconds=PATIENCE_S)
        time.sleep(PAUSE_S)


def _upgraded(engine: Engine) -> bool:
    """Run every revision that is missing; False, and nothing has changed, if a table was in use for too long."""
    try:
        with engine.begin() as conn:
            # The lock is held by the transaction, so a process that dies gives it back.
            conn.execute(text("set local statement_timeout = 0"))
            conn.execute(text("select pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            if current_revision(conn) != head_revision():
                # Not before: another process may take its time over a migration.
                conn.execute(text(f"set local lock_timeout = {int(LOCK_WAIT_S * 1000)}"))
                command.upgrade(alembic_config(conn), "head")
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
            raise
        return False
    return True


def current_revision(conn: Connection) -> str | None:
    """The revision that the database is at; None for an empty one."""
    return MigrationContext.configure(conn).get_current_revision()


def head_revision() -> str | None:
    """The newest revision that this code knows."""
    return ScriptDirectory.from_config(alembic_config()).get_current_head()


def alembic_config(conn: Connection | None = None) -> Config:
    """Alembic's configuration without an ini file; `conn` is the connection that env.py runs the revisions on."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = conn
    return config
