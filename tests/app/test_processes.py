"""The supervisor: nothing it started outlives it, and it touches nothing that it did not start."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from app.errors import ProcessFailed
from app.processes import Child, Supervisor, stop_leftovers

SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
ROOT = Path(__file__).resolve().parents[2]


def wait_for(condition: Callable[[], bool], deadline_s: float = 20.0) -> None:
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def spawn_noting(supervisor: Supervisor, name: str) -> Child:
    """Start a process that writes its name into the file `order` when it is told to stop."""
    note = "import pathlib, signal, sys, time\ndef stop(*_):\n pathlib.Path(sys.argv[2]).open('a').write(sys.argv[1]); sys.exit()\n"
    note += "signal.signal(signal.SIGTERM, stop); print('up', flush=True); time.sleep(600)"
    child = supervisor.spawn(name, [sys.executable, "-c", note, name, str(supervisor.home / "order")])
    wait_for(lambda: child.log.read_text() == "up\n")
    return child


@pytest.fixture
def abandoned(tmp_path: Path) -> Iterator[psutil.Process]:
    """A process whose supervisor was killed with SIGKILL."""
    script = (
        "import os, pathlib, signal, sys; from app.processes import Supervisor\n"
        f"with Supervisor(pathlib.Path({str(tmp_path)!r})) as s:\n"
        f"    print(s.spawn('sleeper', {SLEEPER!r}).process.pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    process = psutil.Process(int(killed.stdout))
    yield process
    if process.is_running():
        process.kill()


def test_everything_stops_when_the_block_ends_last_started_first(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        children = [spawn_noting(supervisor, name) for name in ("a", "b")]

    assert (tmp_path / "order").read_text() == "ba"
    assert all(child.process.returncode == 0 for child in children)


def test_a_server_that_was_started_again_still_stops_after_those_that_lean_on_it(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        for name in ("server", "worker"):
            spawn_noting(supervisor, name)
        supervisor.child("server").process.kill()
        wait_for(lambda: bool(supervisor.ended()))
        supervisor.stop_one("server")
        spawn_noting(supervisor, "server")
        records = json.loads((tmp_path / "run" / "run.json").read_text())

    assert (tmp_path / "order").read_text() == "workerserver"
    # Whoever clears up after a killed supervisor goes by it.
    assert [record["name"] for record in records] == ["server", "worker"]


def test_everything_stops_when_the_block_fails(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    with contextlib.suppress(KeyboardInterrupt), supervisor:
        child = supervisor.spawn("sleeper", SLEEPER)
        raise KeyboardInterrupt

    assert child.process.returncode is not None
    assert supervisor.ended() == []


def test_a_second_one_on_the_same_home_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with (
        Supervisor(tmp_path),
        pytest.raises(ProcessFailed, match=f"pid {psutil.Process().pid}"),
        Supervisor(tmp_path),
    ):
        pass


def test_the_next_one_stops_what_a_killed_one_left(tmp_path: Path, abandoned: psutil.Process) -> None:
    assert abandoned.is_running()

    with Supervisor(tmp_path):
        assert not abandoned.is_running() or abandoned.status() == psutil.STATUS_ZOMBIE


def test_a_stranger_with_the_recorded_pid_is_left_alone(tmp_path: Path, abandoned: psutil.Process) -> None:
    records = json.loads((tmp_path / "run" / "run.json").read_text())
    records[0]["create_time"] -= 100  # the process of that time is gone, its number was given anew
    (tmp_path / "run" / "run.json").write_text(json.dumps(records))

    assert stop_leftovers(tmp_path / "run") == []
    assert abandoned.is_running()


def test_a_child_that_ends_is_reported_at_once_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Supervisor(tmp_path) as supervisor:
        child = supervisor.spawn("server", [sys.executable, "-c", "print('no such port'); raise SystemExit(3)"])

        with pytest.raises(ProcessFailed, match=r"server ended with code 3:\nno such port"):
            supervisor.wait_until(child, lambda: False)


def test_a_child_that_ignores_its_signal_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.processes.STOP_S", 0.3)
    deaf = "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    deaf += f"print(subprocess.Popen({SLEEPER!r}, stdout=subprocess.DEVNULL).pid, flush=True); time.sleep(600)"
    with Supervisor(tmp_path) as supervisor:
        child = supervisor.spawn("deaf", [sys.executable, "-c", deaf])
        wait_for(lambda: child.log.read_text().endswith("\n"))
        grandchild = psutil.Process(int(child.log.read_text()))

    assert child.process.returncode == -signal.SIGKILL
    wait_for(lambda: not grandchild.is_running() or grandchild.status() == psutil.STATUS_ZOMBIE)
