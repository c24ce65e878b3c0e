"""The migrations build exactly the tables that the code uses, however many processes run them at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, PrimaryKeyConstraint, UniqueConstraint

import migrations
from app.access_errors import TablesInUse
from app.db.engine import make_engine
from app.db.ids import ID_PATTERN, new_id
from app.db.tables import metadata
from migrations import alembic_config, current_revision, head_revision, upgrade
from tests.rig import wait_for


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


def behind(url: str, name: str) -> Engine:
    """A database that lacks a revision which changes the table of jobs."""
    engine = make_engine(empty_database(url, name))
    upgrade(engine)
    with engine.begin() as conn:
        command.downgrade(alembic_config(conn), "0026")
    return engine


def somebody_waits(engine: Engine) -> bool:
    """Whether a transaction waits for another one's lock."""
    locked = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    with engine.begin() as conn:
        return bool(conn.exec_driver_sql(locked).scalar_one())


def test_a_migration_that_waits_for_a_table_lets_others_use_it_and_goes_on_once_it_is_free(database_url: str) -> None:
    engine = behind(database_url, "behind")

    with ThreadPoolExecutor(1) as pool, engine.connect() as slow:
        slow.exec_driver_sql("select count(*) from jobs")
        migrated = pool.submit(upgrade, engine)
        wait_for(lambda: somebody_waits(engine), "the migration to wait")
        with engine.connect() as other:
            other.exec_driver_sql("select count(*) from jobs")
        assert not migrated.done()

    migrated.result()
    with engine.connect() as conn:
        assert current_revision(conn) == head_revision()
    engine.dispose()


def test_a_migration_gives_up_by_name_where_a_table_stays_in_use(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = behind(database_url, "in_use")
    monkeypatch.setattr(migrations, "LOCK_WAIT_S", 0.1)
    monkeypatch.setattr(migrations, "PATIENCE_S", 0.0)

    with engine.connect() as slow:
        slow.exec_driver_sql("select count(*) from jobs")
        with pytest.raises(TablesInUse):
            upgrade(engine)

        assert current_revision(slow) == "0026"
    engine.dispose()


def test_ids_sort_by_the_time_they_were_made() -> None:
    ids = [new_id("job") for _ in range(1000)]

    assert len(set(ids)) == 1000
    assert all(ID_PATTERN.match(id) for id in ids)
    assert [id[:16] for id in ids] == sorted(id[:16] for id in ids)  # the random rest may tie within 250 ns
