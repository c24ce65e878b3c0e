"""Start, watch and stop processes as one: the supervisor under `p2d up`, `p2d demo` and the tests.

Answers for: one supervisor per home directory, output in log files, order of stopping, and stopping whatever a killed
predecessor left running (known again by pid and creation time). Does not know what the processes are.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Self

import psutil

from app.errors import ProcessFailed

START_S = 60.0
"""Longest wait for one process to answer. Servers take 0.1 s; a crash recovery of a large database takes longer."""

STOP_S = 30.0
"""Longest wait for one process after its stop signal, before it is killed. A worker may need 25 s for its child."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One started process as run.json keeps it: enough to know it again after the supervisor was killed."""

    name: str
    pid: int
    create_time: float
    stop_signal: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Child:
    """One running process of ours."""

    record: Record
    process: subprocess.Popen[bytes]
    log: Path


class Terminated(BaseException):
    """TERM or HUP arrived. Like KeyboardInterrupt: blocks are left in order, and nobody catches it by mistake."""


def raise_on_term() -> None:
    """From now on let TERM and HUP end this process the way Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Terminated(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)


class Supervisor:
    """As a context manager it stops everything it started, in reverse order of the first starts.

    A process that is started again under its name keeps its place: those that lean on it still stop before it.

    One at a time for one `home`, by a lock file. Raises ProcessFailed (`process.failed`) when another one holds it.
    """

    def __init__(self, home: Path) -> None:
        self.home = home.absolute()
        self.run = self.home / "run"
        self._children: list[Child] = []
        """In order of their places."""
        self._places: dict[str, int] = {}
        """By name: which it was when it was first started."""
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        # 0711 for root only: its PostgreSQL runs as another user, who must pass through.
        mode = 0o711 if os.geteuid() == 0 else 0o700
        self.home.mkdir(parents=True, exist_ok=True, mode=mode)
        self.run.mkdir(exist_ok=True, mode=mode)
        self._lock = take_lock(self.run)
        stop_leftovers(self.run)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def spawn(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        stdin: str = "",
        user: int | None = None,
    ) -> Child:
        """Start one process in a session of its own, so that Ctrl-C reaches only us; output in `run/<name>.log`."""
        log = self.run / f"{name}.log"
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        with log.open("wb") as output:
            process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if env is None else dict(env),
                cwd="/" if user is not None else self.run,
                start_new_session=True,
                user=user,
                group=user,
                extra_groups=None if user is None else [],
            )
        # The pid cannot be reused before we reap it, so the creation time is surely this process's.
        record = Record(
            name=name,
            pid=process.pid,
            create_time=psutil.Process(process.pid).create_time(),
            stop_signal=int(stop_signal),
        )
        child = Child(record=record, process=process, log=log)
        self._places.setdefault(name, len(self._places))
        self._children.append(child)
        self._children.sort(key=lambda one: self._places[one.record.name])
        self._write_records()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(stdin.encode())
        return child

    def child(self, name: str) -> Child:
        """The child of that name. Raises KeyError if there is none."""
        return {child.record.name: child for child in self._children}[name]

    def ended(self) -> list[Child]:
        """The children that are no longer running."""
        return [child for child in self._children if child.process.poll() is not None]

    def check(self) -> None:
        """Raise ProcessFailed, with the end of its log, if any child has ended."""
        for child in self.ended():
            raise ProcessFailed(f"{child.record.name} ended with code {child.process.returncode}:\n{_tail(child.log)}")

    def wait_until(self, child: Child, answers: Callable[[], bool], *, deadline_s: float = START_S) -> None:
        """Wait until `answers()` is true. Raises ProcessFailed as soon as any child ends, or at the deadline."""
        deadline = time.monotonic() + deadline_s
        while not answers():
            self.check()
            if time.monotonic() > deadline:
                name = child.record.name
                raise ProcessFailed(f"{name} did not answer within {deadline_s:.0f} s:\n{_tail(child.log)}")
            time.sleep(0.02)

    def stop_one(self, name: str) -> None:
        """Stop the children of that name."""
        for child in [child for child in self._children if child.record.name == name]:
            self._stop(child)

    def stop(self) -> None:
        """Stop every child, what first started last first, and give the home free. Safe to call twice."""
        while self._children:
            self._stop(self._children[-1])
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _stop(self, child: Child) -> None:
        if child.process.poll() is None:
            _stop_process(psutil.Process(child.record.pid), child.record)
        child.process.wait()
        self._children.remove(child)
        self._write_records()

    def _write_records(self) -> None:
        partial = self.run / "run.json.partial"
        partial.write_text(json.dumps([asdict(child.record) for child in self._children]), encoding="utf-8")
        partial.replace(self.run / "run.json")


def take_lock(run: Path) -> IO[str]:
    """Hold `run/lock` until the handle is closed or this process ends, however it ends.

    Raises: ProcessFailed, with the holder's pid, when another process holds it.
    """
    handle = (run / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.seek(0)
        owner = handle.read().strip()
        handle.close()
        raise ProcessFailed(f"Another p2d (pid {owner or 'unknown'}) already runs on {run.parent}.") from None
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def stop_leftovers(run: Path) -> list[str]:
    """Stop what a killed supervisor left running, and say what it was. The caller holds the lock."""
    try:
        records = [Record(**entry) for entry in json.loads((run / "run.json").read_text(encoding="utf-8"))]
    except (FileNotFoundError, ValueError, TypeError):  # never started, or killed while writing its first record
        return []
    stopped = []
    for record in reversed(records):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(record.pid)
            # Else the pid belongs to a stranger by now. psutil rounds to a clock tick (10 ms).
            if abs(process.create_time() - record.create_time) < 0.1:
                _stop_process(process, record)
                stopped.append(record.name)
    (run / "run.json").unlink()
    return stopped


def _stop_process(process: psutil.Process, record: Record) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        below = process.children(recursive=True)
        process.send_signal(record.stop_signal)
        try:
            process.wait(timeout=STOP_S)
        except psutil.TimeoutExpired:
            process.kill()
        for orphan in psutil.wait_procs(below, timeout=2)[1]:  # backends and the engine end with their parent
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.kill()


def _tail(log: Path, size_bytes: int = 2000) -> str:
    return log.read_bytes()[-size_bytes:].decode("utf-8", "replace").strip() or "(no output)"
