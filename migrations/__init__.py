"""Schema of the ledger over time: `upgrade` brings a database to the newest revision. Never run at import or by the API.

Revisions are `versions/NNNN_{pre,post}_what.py`: `pre` runs before the code that needs it goes out, `post` after.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

MIGRATION_LOCK = 0x703264_01
"""Advisory lock key: one migration at a time, however many processes start at once."""


def upgrade(engine: Engine) -> None:
    """Bring the database to the newest revision; waits while another process does it, then finds nothing to do."""
    with engine.begin() as conn:
        # The lock is held by the transaction, so a process that dies gives it back.
        conn.execute(text("set local statement_timeout = 0"))
        conn.execute(text("select pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        if current_revision(conn) != head_revision():
            command.upgrade(alembic_config(conn), "head")


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
