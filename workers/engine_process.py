"""The child process as its parent sees it: start, send, receive, ask, TERM, KILL. Knows no jobs and no leases."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from workers.wire import CancelStep, Message, RunStep, StepDone, StepFailed, decode, encode

TERM_SHARE = 0.5
"""Share of the grace that a child gets after TERM, before KILL."""

HELD_BACK = ("P2D_", "AWS_", "PG")
"""How variables begin that a child is not given: every setting of the service, secret or not, as each message says what it needs;
and what the clients of the store and of PostgreSQL read."""


class ChildDied(Exception):
    """The child ended by itself or was killed from outside."""

    def __init__(self, returncode: int | None) -> None:
        super().__init__(f"the child ended with {returncode}")
        self.returncode = returncode


class EngineProcess:
    """One child in a process group of its own, started when it is first needed and again after it died."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._process: subprocess.Popen[bytes] | None = None
        self._inbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._busy = False

    @property
    def pid(self) -> int | None:
        """Process id (and group) while a child lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def ensure(self) -> bool:
        """Start a child if none lives; True if it had to, so that nothing is warm."""
        if self.pid is not None:
            return False
        self.kill()  # whatever is left of its group
        self._inbox = queue.SimpleQueue()
        # Popen forks and executes at once: a fresh interpreter, so CUDA starts clean. No credentials go along.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "workers.child", self._engine, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            process_group=0,
        )
        assert self._process.stdout is not None
        threading.Thread(target=_pump, args=(self._process.stdout, self._inbox), daemon=True).start()
        return True

    def send(self, message: Message) -> None:
        """Send one message. Raises ChildDied."""
        process = self._process
        if process is None or process.stdin is None:
            raise ChildDied(None)
        try:
            process.stdin.write(encode(message))
            process.stdin.flush()
            self._busy = self._busy or isinstance(message, RunStep)
        except (BrokenPipeError, ValueError) as error:
            raise ChildDied(process.poll()) from error

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None after the timeout. Raises ChildDied once nothing more can come."""
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if message is None:
            self._inbox.put(None)
            raise ChildDied(self._reap())
        if isinstance(message, StepDone | StepFailed):
            self._busy = False
        return message

    def stop_step(self, grace_s: float) -> bool:
        """Ask the child to stop its step, if it runs one; after the grace TERM, then KILL the group.

        Returns True if the step was done before it heard; other messages are dropped. A child that stopped when asked
        stays warm.
        """
        deadline = time.monotonic() + grace_s
        message: Message | None = None
        try:
            if self._busy:
                self.send(CancelStep())
            while self._busy and (left_s := deadline - time.monotonic()) > 0:
                message = self.receive(left_s)
        except ChildDied:
            pass
        else:
            if not self._busy:
                return isinstance(message, StepDone)
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process is not None:
                self._process.wait(grace_s * TERM_SHARE)
        self.kill()
        return False

    def kill(self) -> None:
        """Kill the whole group now and wait for the child's end."""
        if self._process is None:
            return
        self._signal(signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._process = None
        self._busy = False

    def _reap(self) -> int | None:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(5)
        return None

    def _signal(self, number: signal.Signals) -> None:
        # The group outlives its leader as long as a grandchild lives, so this also reaches what a dead child left.
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


def _pump(pipe: IO[bytes], inbox: queue.SimpleQueue[Message | None]) -> None:
    """Read messages until the pipe ends; a line that is no message ends it too."""
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
        for line in pipe:
            inbox.put(decode(line))
    inbox.put(None)


def _environment() -> dict[str, str]:
    """The child imports from where the parent does, and knows no credential."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(HELD_BACK)}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return env
