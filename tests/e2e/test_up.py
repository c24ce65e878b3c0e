"""`p2d up` as a process: it answers, and whatever ends it, nothing of it stays."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from app.embedded import remove

DEADLINE_S = 150.0
"""Longest wait for the end of a service: far beyond what it takes, for its worker may need 25 s and the machine be busy."""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "home"
    remove(tmp_path / "home")


@contextmanager
def up(home: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the address it printed."""
    command = [sys.executable, "-P", "-m", "app.cli", "up", "--port", "0"]
    env = os.environ | {"P2D_HOME": str(home)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            address = re.search(r"http://\S+", process.stdout.readline())
            assert address is not None
            yield process, address[0]
        finally:
            process.kill()


def children_of(home: Path) -> list[psutil.Process]:
    records = json.loads((home / "run" / "run.json").read_text())
    return [psutil.Process(record["pid"]) for record in records]


def postgres_of(home: Path) -> psutil.Process | None:
    """The server of the database; None between its end and the start of the next."""
    with suppress(psutil.NoSuchProcess):
        return next((part for part in children_of(home) if "postgres" in part.name()), None)
    return None


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_the_service_in_order_and_leaves_nothing(home: Path, how: signal.Signals) -> None:
    with up(home) as (process, address):
        assert httpx.get(f"{address}/readyz").json()["status"] == "ok"
        parts = children_of(home)
        assert len(parts) == 4

        process.send_signal(how)

        assert process.wait(timeout=DEADLINE_S) == 0
        assert all(gone(part) for part in parts)
        assert json.loads((home / "run" / "run.json").read_text()) == []


def test_after_a_kill_the_next_one_stops_the_leftovers_and_serves(home: Path) -> None:
    with up(home) as (process, _):
        left = children_of(home)
        process.kill()
        process.wait()
    assert any(not gone(part) for part in left)

    with up(home) as (process, address):
        assert httpx.get(f"{address}/readyz").is_success
        assert all(gone(part) for part in left)
        process.terminate()
        process.wait(timeout=DEADLINE_S)


def test_a_database_that_dies_is_started_again_under_the_same_service(home: Path) -> None:
    with up(home) as (process, address):
        postgres = postgres_of(home)
        assert postgres is not None
        postgres.kill()

        wait_for(lambda: postgres_of(home) not in (None, postgres))
        wait_for(lambda: httpx.get(f"{address}/readyz").is_success)

        assert httpx.get(f"{address}/jobs").json()["data"] == []
        assert process.poll() is None
        process.terminate()
        process.wait(timeout=DEADLINE_S)


def test_a_server_that_cannot_be_started_again_ends_the_service_with_its_name(home: Path) -> None:
    with up(home) as (process, _):
        parts = children_of(home)
        postgres = postgres_of(home)
        assert postgres is not None
        command = postgres.cmdline()
        Path(command[command.index("-D") + 1], "PG_VERSION").write_text("1")  # which this server does not read
        postgres.kill()

        wait_for(lambda: process.poll() is not None)

        assert process.returncode == 1
        assert all(gone(part) for part in parts)


def test_the_first_key_is_made_beside_a_running_service_and_locks_it(home: Path) -> None:
    with up(home) as (process, address):
        assert httpx.get(f"{address}/jobs").status_code == 200
        command = [sys.executable, "-P", "-m", "app.cli", "keys", "create", "--scope", "read"]
        env = os.environ | {"P2D_HOME": str(home)}

        made = subprocess.run(command, env=env, capture_output=True, text=True, check=True)

        key = made.stdout.strip()
        assert httpx.get(f"{address}/jobs").status_code == 401
        assert httpx.get(f"{address}/jobs", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_S)
