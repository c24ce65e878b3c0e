"""The hidden folder in which a job without the service works: what a killed run had finished is found again there.

    out/.p2d-work/  incoming/   inputs of the call that has just begun, until they prove those of before or its job is accepted
                    files/      inputs and outputs of all steps
                    state.json  fingerprint, attempts so far, and how long the running step has been at work
                    lock        held by the one run that works here

A step is done once state.json says so; one that was running is begun again, `train` from its checkpoint. Whole after a
kill of the process at any point, not after a power cut. What a fingerprint is made of is `p2d.jobs`' business.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from p2d.accounting import Attempt, attempts_of
from p2d.errors import OutInUse
from p2d.files import read_json, write_json
from p2d.pipeline import STEPS, PlannedStep

NAME = ".p2d-work"
"""Of the folder in `out`."""

SIGN_OF_LIFE_S = 1.0
"""Seconds between two notes of how long a step has been at work: a kill leaves no more than this out of the bill, once the
job is accepted."""


class WorkFolder:
    """The state of one job's work; open it with `work_folder`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.incoming, self.files = root / "incoming", root / "files"
        self._attempts: list[Attempt] = []
        self._fingerprint: str | None = None
        self._began = self._told = time.perf_counter()  # of the first step: reading files and libraries counts with it
        self._needless = False
        shutil.rmtree(self.incoming, ignore_errors=True)
        self.incoming.mkdir()

    @property
    def checkpoint(self) -> Path:
        """Where `train` leaves its checkpoints, being told to write to `files`."""
        return self.files / "checkpoint"

    @property
    def attempts(self) -> list[Attempt]:
        """All tries at steps of this job, those of killed runs included."""
        return list(self._attempts)

    def is_of(self, fingerprint: str) -> bool:
        """Whether the work that is here is of this fingerprint."""
        return self._state().get("fingerprint") == fingerprint and self.files.is_dir()

    def begin(self, fingerprint: str) -> None:
        """Go on with the work that is here if it is of this fingerprint, else start anew from what has come in."""
        if self.is_of(fingerprint):
            state = self._state()
            self._attempts = attempts_of(state)
            if running := state.get("running"):
                self._note(running["step"], running["shard"], "released", running["seconds"])
            shutil.rmtree(self.incoming)
        else:
            # The state goes first: without it, files half replaced are nobody's.
            self._state_path.unlink(missing_ok=True)
            shutil.rmtree(self.files, ignore_errors=True)
            self.incoming.rename(self.files)
        self._fingerprint = fingerprint
        self._write()

    def is_done(self, step: PlannedStep) -> bool:
        """Whether an earlier run has finished this step."""
        return any((a.step, a.shard, a.status) == (step.step, step.shard, "done") for a in self._attempts)

    def start(self, step: PlannedStep) -> None:
        """Note that a step is being worked on: since the one before it ended, or this run began."""
        self._told = time.perf_counter()
        self._write({"step": step.step, "shard": step.shard, "seconds": self._told - self._began})

    def tick(self, step: PlannedStep) -> None:
        """Note now and then that it still is."""
        now = time.perf_counter()
        # Before `begin` the state is another job's, or nobody's.
        if self._fingerprint is not None and now - self._told >= SIGN_OF_LIFE_S:
            self._told = now
            self._write({"step": step.step, "shard": step.shard, "seconds": now - self._began})

    def finish(self, step: PlannedStep, status: Literal["done", "failed"] = "done") -> None:
        """Note how a step ended, and what it took."""
        now = time.perf_counter()
        self._note(step.step, step.shard, status, now - self._began)
        self._began = now
        self._write()

    def discard(self) -> None:
        """Say that no later run can use this job's work; that of another job, which was not touched, stays."""
        self._needless = self._fingerprint is not None

    def leave(self) -> None:
        """Remove what no later run can use: everything, unless a model has worked for it."""
        shutil.rmtree(self.incoming, ignore_errors=True)
        state = self._state()
        worth = any(a.status == "done" and STEPS[a.step].needs_model for a in attempts_of(state or None))
        worth |= bool(state) and any(self.checkpoint.glob("step-*"))
        if self._needless or not worth:
            shutil.rmtree(self._root, ignore_errors=True)

    @property
    def _state_path(self) -> Path:
        return self._root / "state.json"

    def _state(self) -> dict[str, Any]:
        try:
            return dict(read_json(self._state_path))
        except (OSError, ValueError):
            return {}

    def _write(self, running: Mapping[str, Any] | None = None) -> None:
        steps = [asdict(attempt) for attempt in self._attempts]
        write_json(self._state_path, {"fingerprint": self._fingerprint, "steps": steps, "running": running})

    def _note(self, step: str, shard: int, status: Literal["done", "failed", "released"], seconds: float) -> None:
        number = 1 + sum((a.step, a.shard) == (step, shard) for a in self._attempts)
        self._attempts.append(Attempt(step=step, shard=shard, attempt=number, status=status, seconds=seconds))


@contextmanager
def work_folder(out: Path) -> Iterator[WorkFolder]:
    """The work folder in `out`, for one run at a time. Raises OutInUse (`run.out_in_use`)."""
    root = out / NAME
    with _locked(root):
        work = WorkFolder(root)
        try:
            yield work
        finally:
            work.leave()


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    while True:
        root.mkdir(exist_ok=True)
        try:
            descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the run before us is just removing the folder
            continue
        try:
            with suppress(OSError):  # a file system without locks: then two runs at once are the user's to avoid
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise OutInUse(f"Another run works in {str(root.parent)!r}.") from None
            if not _is_at(root / "lock", descriptor):
                continue
            yield
            return
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
