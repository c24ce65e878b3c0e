"""The migrations build exactly the tables that the code uses, however many processes run them at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import PrimaryKeyConstraint, UniqueConstraint

from app.db.engine import make_engine
from app.db.ids import ID_PATTERN, new_id
from app.db.tables import metadata
from migrations import current_revision, head_revision, upgrade


def empty_database(url: str, name: str) -> str:
    """A database without a table on the same server."""
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(f'DROP DATABASE IF EXISTS "{name}"'.encode())
        conn.execute(f'CREATE DATABASE "{name}" TEMPLATE template0'.encode())
    return url.rpartition("/")[0] + f"/{name}"


def test_the_migrations_build_what_the_code_declares(database_url: str) -> None:
    engine = make_engine(database_url)
    with engine.connect() as conn:
        assert current_revision(conn) == head_revision()
        assert compare_metadata(MigrationContext.configure(conn), metadata) == []
    engine.dispose()


def test_what_a_deleted_row_takes_with_it_is_found_by_an_index() -> None:
    for table in metadata.tables.values():
        unique = [one for one in table.constraints if isinstance(one, PrimaryKeyConstraint | UniqueConstraint)]
        columns = [*(one.columns for one in unique), *(one.columns for one in table.indexes)]
        first = {next(iter(some)).name for some in columns if some}
        followed = {key.parent.name for key in table.foreign_keys if key.ondelete is not None}

        assert followed <= first, table.name


def test_eight_processes_may_migrate_an_empty_database_at_once(database_url: str) -> None:
    engine = make_engine(empty_database(database_url, "unmigrated"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: upgrade(engine), range(8)))

    with engine.connect() as conn:
        assert current_revision(conn) == head_revision()
    engine.dispose()


def test_ids_sort_by_the_time_they_were_made() -> None:
    ids = [new_id("job") for _ in range(1000)]

    assert len(set(ids)) == 1000
    assert all(ID_PATTERN.match(id) for id in ids)
    assert [id[:16] for id in ids] == sorted(id[:16] for id in ids)  # the random rest may tie within 250 ns
