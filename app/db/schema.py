"""Whether the database has what this code knows of it. Migrating it is the business of `migrations`."""

from __future__ import annotations

from sqlalchemy import text

from app.db.engine import Connection
from app.db.tables import metadata

_FOUND = text(
    "select c.relname, a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid"
    " where c.relkind in ('r', 'p') and a.attnum > 0 and not a.attisdropped"
    " and pg_table_is_visible(c.oid) and c.relname = any(:tables)"
)


def lacking(conn: Connection) -> list[str]:
    """Tables, and columns of those that are there, which the code knows and the database lacks.

    Not the revision: in a rolling upgrade the database is ahead of the old code (`pre` runs first) and behind the new one
    in what only waits to be taken away (`post` runs last), and both serve.
    """
    rows = conn.execute(_FOUND, {"tables": list(metadata.tables)}).all()
    tables, columns = {row[0] for row in rows}, {(row[0], row[1]) for row in rows}
    missing = sorted(metadata.tables.keys() - tables)
    for table in metadata.sorted_tables:
        if table.name in tables:
            names = [column.name for column in table.columns]
            missing += [f"{table.name}.{name}" for name in names if (table.name, name) not in columns]
    return missing
