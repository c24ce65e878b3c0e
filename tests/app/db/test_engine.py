"""Whatever way PostgreSQL takes a connection away, the code that waits for a database that is away waits for it again."""

from __future__ import annotations

import psycopg
import pytest
from sqlalchemy import text

from app.db.engine import DatabaseUnavailable, Engine, make_engine
from tests.rig import wait_for


def sleep_in_a_transaction(engine: Engine, watcher: psycopg.Connection, *, last: str | None) -> None:
    """Idle until PostgreSQL has ended the connection, as a process does that is stopped half-way; then go on."""
    alive = "select count(*) from pg_stat_activity where pid = %s"
    with engine.begin() as conn:
        conn.execute(text("set local idle_in_transaction_session_timeout = 10"))
        pid = conn.execute(text("select pg_backend_pid()")).scalar_one()
        wait_for(lambda: watcher.execute(alive, (pid,)).fetchone() == (0,), "the end of the connection")
        if last is not None:
            conn.execute(text(last))


@pytest.mark.parametrize("last", ["select 1", None], ids=["a statement", "the commit"])
def test_who_slept_too_long_in_a_transaction_finds_the_database_away_and_is_well_the_next_time(
    database_url: str, last: str | None
) -> None:
    engine = make_engine(database_url)

    with psycopg.connect(database_url, autocommit=True) as watcher:
        with pytest.raises(DatabaseUnavailable):
            sleep_in_a_transaction(engine, watcher, last=last)
        with engine.begin() as conn:
            assert conn.execute(text("select 1")).scalar_one() == 1
    engine.dispose()
