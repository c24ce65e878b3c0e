"""The only door to torch: `python -m workers.child` runs one step after another and keeps the base model warm.

Reads RunStep lines on stdin, answers on the pipe that was its stdout. Has no credential of database, broker or store:
its parent (workers.attempt) fetches and publishes the files. Dies when the parent dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, NoReturn

from p2d.config import config_from_json
from p2d.errors import Cancelled, EngineError, P2DError
from p2d.pipeline import ModelCache, StepCall
from workers.wire import (
    CancelStep,
    Checkpointed,
    CheckpointKept,
    Message,
    Progressed,
    Ready,
    RunStep,
    StepDone,
    StepFailed,
    decode,
    encode,
)

PROGRESS_EVERY_S = 0.1
"""Fewest seconds between two progress lines; the last batch is always told."""

CANCEL_LOOK_S = 0.1
"""Seconds between two looks for a cancel while a checkpoint is being stored."""

WARM_S = 300.0
"""Seconds without a step for which the base model is kept. A guess: steps of one job follow each other at once."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Run until stdin ends: `python -m workers.child MODULE:FUNCTION PARENT_PID`."""
    engine, parent = sys.argv[1], int(sys.argv[2])
    die_with(parent)
    pipe_in, pipe_out = _take_pipes()
    module, function = engine.split(":")
    Child(getattr(import_module(module), function), pipe_in, pipe_out).serve()


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies; a step that holds the GIL could not notice it itself."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above; elsewhere than on Linux the end of stdin tells us
        os._exit(1)


class Child:
    """Takes messages from the parent in one thread and runs steps in the main thread."""

    def __init__(self, run_step: Callable[..., None], pipe_in: BinaryIO, pipe_out: BinaryIO) -> None:
        self._run_step = run_step
        self._in, self._out = pipe_in, pipe_out
        self._models = ModelCache()
        self._steps: queue.SimpleQueue[RunStep] = queue.SimpleQueue()
        self._kept = threading.Event()
        self._cancelled = threading.Event()
        self._told_at = 0.0

    def serve(self) -> NoReturn:
        """Run steps for ever; the reader thread ends the process with stdin."""
        threading.Thread(target=self._read, daemon=True).start()
        self._tell(Ready())
        while True:
            self._tell(self._run(self._next()))
            _give_back()

    def _next(self) -> RunStep:
        try:
            return self._steps.get(timeout=WARM_S)
        except queue.Empty:
            self._models.drop()
            _give_back()
            return self._steps.get()

    def _read(self) -> None:
        for line in self._in:
            message = decode(line)
            if isinstance(message, RunStep):
                self._cancelled.clear()  # here, so that a cancel right behind it is not wiped away
                self._steps.put(message)
            elif isinstance(message, CancelStep):
                self._cancelled.set()
            elif isinstance(message, CheckpointKept):
                self._kept.set()
        os._exit(0)

    def _run(self, message: RunStep) -> Message:
        try:
            self._run_step(
                _call(message), progress=self._progress, models=self._models, on_checkpoint=self._on_checkpoint
            )
        except P2DError as error:
            return StepFailed(error=error.to_json())
        except Exception as error:  # noqa: BLE001 - the door: whatever the engine throws becomes a named error
            return StepFailed(error=_named(error, message.step).to_json())
        return StepDone()

    def _progress(self, done: int, total: int, metrics: Mapping[str, float], /) -> None:
        self._heed_cancel()
        now = time.monotonic()
        if done >= total or now - self._told_at >= PROGRESS_EVERY_S:
            self._told_at = now
            values = {name: float(value) for name, value in metrics.items()}
            self._tell(Progressed(done=done, total=total, metrics=values))

    def _on_checkpoint(self, folder: Path) -> None:
        """Hand a checkpoint over and wait until it is stored, so that the engine may then replace the folder."""
        self._heed_cancel()
        self._kept.clear()
        self._tell(Checkpointed(folder=str(folder)))
        while not self._kept.wait(CANCEL_LOOK_S):
            self._heed_cancel()

    def _heed_cancel(self) -> None:
        if self._cancelled.is_set():
            raise Cancelled("The job was cancelled.")

    def _tell(self, message: Message) -> None:
        self._out.write(encode(message))
        self._out.flush()


def _give_back() -> None:
    """Return what a step has freed to the system and to the device: both allocators would keep it for this process alone."""
    gc.collect()  # tracebacks and autograd leave circles behind
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)


def _call(message: RunStep) -> StepCall:
    return StepCall(
        step=message.step,
        shard=message.shard,
        shards=message.shards,
        config=config_from_json(message.config),
        model_dir=Path(message.model_dir),
        inputs=Path(message.inputs),
        out=Path(message.out),
        checkpoint=Path(message.checkpoint) if message.checkpoint else None,
        device=message.device,
        shard_rows=message.shard_rows,
    )


def _named(error: Exception, step: str) -> P2DError:
    # The message may quote a row: only the type and the places in the code leave this process.
    places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    kind = type(error).__name__
    print(f"{kind} in step {step}\n  " + "\n  ".join(places), file=sys.stderr, flush=True)  # noqa: T201
    return EngineError(f"The step {step!r} failed with {kind}.", step=step, exception=kind, place=places[-1])


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep stdin and stdout for the wire alone: whatever the engine prints goes to stderr, what it reads is empty."""
    pipe_in, pipe_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return pipe_in, pipe_out


if __name__ == "__main__":
    main()
