"""Row-level security as revisions write it: the role that the API takes in every transaction, and which rows it may see.

A table that the API reads needs `confine` or `share` in the revision that makes it; without either the API is refused it.
"""

from __future__ import annotations

from alembic import op
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from app.access_errors import RoleMissing

ROLE = "p2d_api"
"""The role without rights of its own that the API takes on in every transaction; the same in every database of a server."""

DEFAULT_PROJECT = "prj_00000000000000000000000000"
"""The project of a service without keys."""

OWN = "project_id = current_setting('p2d.project', true)"
"""Whether a row with a `project_id` is one of the project that the transaction speaks for; without one, none is."""

OWN_JOB = "exists (select from jobs where jobs.id = job_id)"
"""Whether a row with a `job_id` is of a job that the transaction may see."""

OWN_JOB_EACH = "exists (select from jobs where jobs.id = job_id offset 0)"
"""The same, where few rows of one job are read at a time: `offset 0` keeps PostgreSQL from gathering the ids of all the
project's jobs first: 200 events took 46 ms so, and 3 ms this way, in a project of 10,000 jobs (measured)."""


def make_role() -> None:
    """Make the role where the server has none, and let this user take it on. Raises RoleMissing."""
    conn = op.get_bind()
    # Another database of this server may make it in the same moment. If this user may not, an administrator may have.
    made = "do $$ begin create role {} nologin; exception when duplicate_object or unique_violation then null; end $$"
    _allowed(conn, made.format(ROLE))
    taken = f"set local role {ROLE}"
    if not _allowed(conn, taken):
        _allowed(conn, f"grant {ROLE} to current_user")
        if not _allowed(conn, taken):
            user = conn.execute(text("select current_user")).scalar_one()
            raise RoleMissing(role=ROLE, user=str(user))
    conn.execute(text("reset role"))


def _allowed(conn: Connection, statement: str) -> bool:
    try:
        with conn.begin_nested():
            conn.execute(text(statement))
    except DBAPIError:
        return False
    return True


def confine(table: str, rows: str, *, rights: str = "select, insert, update, delete") -> None:
    """Show the API only the rows of a table for which `rows` holds, and let it write no others."""
    op.execute(f"alter table {table} enable row level security")
    op.execute(f"create policy own on {table} to {ROLE} using ({rows}) with check ({rows})")
    op.execute(f"grant {rights} on {table} to {ROLE}")


def share(table: str, *, rights: str) -> None:
    """Let the API have all rows of a table that belongs to no project."""
    op.execute(f"grant {rights} on {table} to {ROLE}")


def release(table: str) -> None:
    """Undo `confine`."""
    op.execute(f"revoke all on {table} from {ROLE}")
    op.execute(f"drop policy own on {table}")
    op.execute(f"alter table {table} disable row level security")
