"""Keyset pages of things that are listed by their id, which sorts by time."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Select, Table


def newest_first(
    query: Select[Any], table: Table, *, limit: int, before: str | None, **wanted: str | None
) -> Select[Any]:
    """The query's rows from the newest on; `before` is the id of the last one of the page before.

    Args: wanted: column -> value that it must have; None = any.
    """
    query = query.order_by(table.c.id.desc()).limit(limit)
    if before is not None:
        query = query.where(table.c.id < before)
    return query.where(*(table.c[column] == value for column, value in wanted.items() if value is not None))
