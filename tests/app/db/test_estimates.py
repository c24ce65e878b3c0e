"""What is learnt from finished jobs costs no more the more of them there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.core import lifecycle
from app.core.lifecycle import StepFacts
from app.db.engine import Connection
from app.db.estimates import RECENT, absolute_errors, past_errors
from app.settings import Settings
from tests.app.db.test_leases import begin
from tests.rig import Rig, make_rig

JOBS = 5000


@pytest.fixture
def rig(settings: Settings, tmp_path: Path) -> Iterator[Rig]:
    """A ledger without workers: these tests play them."""
    rig = make_rig(settings, tmp_path)
    yield rig
    rig.stop()


def copy(conn: Connection, table: str, **changed: str) -> None:
    """Insert JOBS copies of a table's rows, `n` being their number."""
    query = "select column_name from information_schema.columns where table_name = %s"
    columns = {str(row[0]): f"x.{row[0]}" for row in conn.exec_driver_sql(query, (table,))} | changed
    names, values = ", ".join(columns), ", ".join(columns.values())
    conn.exec_driver_sql(f"insert into {table} ({names}) select {values} from {table} x, generate_series(1, {JOBS}) n")


def read(conn: Connection) -> int:
    """Steps that the transaction has read."""
    query = "select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables where relname = 'steps'"
    return int(conn.exec_driver_sql(query).scalar_one())


def test_of_all_that_ever_ran_the_newest_alone_are_read(rig: Rig) -> None:
    rig.submit(kind="identify_heads")
    for estimate_s in ({"heads": 10.0, "package": 0.1}, {}, {}):
        lease = begin(rig)
        with rig.db.begin() as conn:
            lifecycle.finish_step(conn, lease, [], StepFacts(estimate_s=estimate_s))
    with rig.db.begin() as conn:
        conn.exec_driver_sql("update steps set seconds = 20")
        copy(conn, "jobs", id="x.id || n")
        copy(conn, "steps", id="x.id || n", job_id="x.job_id || n", finished_at="now() - n * interval '1 min'")
        conn.exec_driver_sql("update steps set seconds = 10 where finished_at < now() - interval '1000 min'")
        conn.exec_driver_sql("analyze")

    with rig.db.begin() as conn:
        found = past_errors(conn)
        seen = read(conn)

    assert (found["heads"].runs, found["heads"].p10, found["heads"].p90) == (RECENT, 2.0, 2.0)
    assert seen <= RECENT * len(lifecycle.STAGES)
    with rig.db.begin() as conn:
        assert absolute_errors(conn)["heads"].runs == RECENT
