"""Rows about projects: who owns what. A project is made with its first key, by the operator."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert

from app.db.engine import Connection
from app.db.ids import new_id
from app.db.tables import DEFAULT_PROJECT, SPOKEN_FOR, projects

__all__ = ["DEFAULT_PROJECT", "find_project", "lock_project", "open_project"]


def open_project(conn: Connection, name: str) -> str:
    """The id of the project of that name, made if there is none."""
    conn.execute(insert(projects).values(id=new_id("prj"), name=name).on_conflict_do_nothing())
    return str(conn.execute(select(projects.c.id).where(projects.c.name == name)).scalar_one())


def lock_project(conn: Connection) -> None:
    """Wait for whoever did the same for the project that is spoken for, and hold others up, until the transaction ends."""
    conn.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(SPOKEN_FOR, 0))))


def find_project(conn: Connection, name: str) -> str | None:
    """The id of the project of that name, or None."""
    return conn.execute(select(projects.c.id).where(projects.c.name == name)).scalar_one_or_none()
