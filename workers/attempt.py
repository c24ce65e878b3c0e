"""One attempt at one step, from claim to the last write: begin, fetch, run in the child, publish, and every way it can end.

| what happens                          | what the ledger gets            |
|---------------------------------------|---------------------------------|
| an earlier job did the very same step | its files, finish_step; no child|
| the child is done                     | files, then finish_step         |
| the child reports an error            | fail_step: the job fails        |
| the child dies, stalls, or we crash   | lose_step: tried again, counted |
| the user cancels                      | cancel_step, child stopped      |
| one of the job's limits is reached    | overrun_step, child stopped     |
| the user pauses                       | release_step, child stopped     |
| the worker is told to go              | release_step, child stopped     |
| somebody else has the step by now     | nothing at all, child stopped   |

Processes are engine_process's business, files transfer's, and what any of it means for the job lifecycle's.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import structlog

from app.blobs import BlobStore
from app.core import lifecycle, reuse
from app.core.bases import base_files
from app.core.wake import Waker
from app.db.artifacts import NewArtifact
from app.db.engine import Connection, DatabaseUnavailable, Engine
from app.db.jobs import Job
from app.db.leases import Lease, ready_by_queue
from app.errors import BlobCorrupt, BlobMissing, LeaseLost, ObjectCollected, Stalled, StoreUnavailable
from app.settings import Settings
from p2d.errors import ModelError, P2DError
from p2d.model_info import find_model, model_digest
from p2d.pipeline import spec_of
from workers.bases import bring
from workers.engine_process import ChildDied, EngineProcess
from workers.heart import Heart, Order
from workers.notes import Notes
from workers.transfer import (
    Inputs,
    WorkFolder,
    all_stored,
    facts_again,
    fetch_inputs,
    inputs_of,
    put_checkpoint,
    put_outputs,
    read_facts,
)
from workers.wire import Checkpointed, CheckpointKept, Progressed, RunStep, StepDone, StepFailed

TICK_S = 0.2
"""Seconds between two looks at what the heart has heard, while the child says nothing."""

PROGRESS_EVERY_S = 1.0
"""Fewest seconds between two progress writes of one attempt."""

NOTE_EVERY_S = 10.0
"""Fewest seconds between two lines about progress; the lines so far are kept with each."""

STORE_PATIENCE_S = 1800.0
"""Seconds that an attempt waits for a store or database that is away before it gives up. A guess: longer than a failover."""

T = TypeVar("T")

log = structlog.get_logger()


class Interrupted(Exception):
    """The attempt must stop: the lease is lost, the job is cancelled, over its time or to pause, or the worker goes away."""

    def __init__(self, why: Order | None) -> None:
        super().__init__(why or "release")
        self.why = why


@dataclass(frozen=True, kw_only=True, slots=True)
class Workshop:
    """What every attempt of a worker uses."""

    db: Engine
    store: BlobStore
    waker: Waker
    settings: Settings
    process: EngineProcess
    stopping: threading.Event
    """Set when the worker has been told to go."""
    folder: Path
    """Work folders of this worker; emptied after each attempt."""


def run_attempt(shop: Workshop, lease: Lease) -> None:
    """Work on a claimed step until the ledger has heard how it ended. Never raises."""
    bound = log.bind(job=lease.job_id, step=lease.step, shard=lease.shard, attempt=lease.token)
    folder = WorkFolder(root=shop.folder / f"{lease.job_id}-{lease.attempt}")
    heart = Heart(shop.db, lease, lease_s=shop.settings.lease_s, heartbeat_s=shop.settings.heartbeat_s)
    started = time.monotonic()
    outcome = "unknown"
    attempt = Attempt(shop, lease, heart, folder)
    try:
        with heart:
            outcome = attempt.run()
    except LeaseLost:
        outcome = "lease_lost"
    except Exception as error:  # noqa: BLE001 - the door: a bug of ours is a crash of the step, not of the worker
        outcome = "broken"
        bound.exception("attempt.broken", error=type(error).__name__)
        _charge(shop, lease)
    finally:
        if outcome in {"lease_lost", "broken"}:
            shop.process.kill()
        shutil.rmtree(folder.root, ignore_errors=True)
        attempt.end(outcome, time.monotonic() - started)
        bound.info("attempt.ended", outcome=outcome, seconds=round(time.monotonic() - started, 3))


class Attempt:
    """The state of one attempt."""

    def __init__(self, shop: Workshop, lease: Lease, heart: Heart, folder: WorkFolder) -> None:
        self._shop, self._lease, self._heart, self._folder = shop, lease, heart, folder
        self._told_at = self._noted_at = 0.0
        self.notes = Notes(lease)
        self._done = False
        """Whether the child has ended the step well: then a pause is late, and the result is kept."""

    def run(self) -> str:
        """Do the step; returns the outcome for the log. Raises LeaseLost."""
        self.notes.note("attempt.began", worker=self._lease.worker, resumes=bool(self._lease.checkpoint))
        job = self._write(self._begin)
        if job.cancel_requested_at is not None:
            self._heart.order = "cancel"
        elif job.pause_requested_at is not None:
            self._heart.order = "pause"
        try:
            self._look()
            inputs = self._write(lambda conn: inputs_of(conn, job, self._lease))
            if (ended := self._reuse(job, inputs)) is not None:
                return ended
            self._fetch(inputs)
            error = self._work(job)
            if error is not None:
                self.notes.note("step.failed", level="error", code=str(error.get("code")))
                self._write(lambda conn: lifecycle.fail_step_with(conn, self._lease, error))
                return "failed"
            return self._publish(job, inputs)
        except Interrupted as stop:
            return self._stop(job, stop.why)
        except ChildDied as death:
            log.warning("child.died", job=job.id, step=self._lease.step, returncode=death.returncode)
            self.notes.note("process.died", level="error", returncode=death.returncode)
            return self._lose(None)
        except Stalled as stalled:
            self._shop.process.kill()
            self.notes.note("process.stalled", level="error", code=stalled.code)
            return self._lose(stalled)
        except P2DError as error:
            if isinstance(error, LeaseLost):
                raise
            failure = error
            self.notes.note("step.failed", level="error", code=failure.code)
            self._write(lambda conn: lifecycle.fail_step(conn, self._lease, failure))
            return "failed"

    def _begin(self, conn: Connection) -> Job:
        job = lifecycle.begin_step(conn, self._lease)
        self.notes.keep(conn)  # so that an attempt whose worker dies has a line
        return job

    def _reuse(self, job: Job, inputs: Inputs) -> str | None:
        """End the step with the outputs of an equal one, if there was one and all that it made is still in the store."""
        engine = self._shop.settings.engine
        fingerprint = reuse.wanted_fingerprint(job, self._lease, inputs.stored, engine=engine)
        if fingerprint is None:
            return None
        earlier = self._write(lambda conn: reuse.find_earlier(conn, job.project_id, fingerprint))
        if earlier is None or not self._patiently(lambda: all_stored(self._shop.store, earlier.files)):
            return None
        try:
            facts = self._patiently(lambda: facts_again(self._shop.store, earlier, self._folder))
            ended = self._ended(*self._register(earlier.files, facts))
        except (ObjectCollected, BlobMissing, BlobCorrupt):  # just now: it is computed after all
            return None
        self.notes.note("cache.hit", files=len(earlier.files))
        return "reused" if ended == "done" else ended

    def _fetch(self, inputs: Inputs) -> None:
        self._folder.make()
        started = time.monotonic()
        self._patiently(lambda: fetch_inputs(self._shop.store, inputs, self._lease, self._folder))
        self.notes.note("inputs.fetched", files=len(inputs.stored), seconds=_since(started))

    def _work(self, job: Job) -> dict[str, object] | None:
        """Run the step in the child. Returns the error that it ended with, if any."""
        settings, process = self._shop.settings, self._shop.process
        model_dir = settings.models_dir / job.base_model
        spec = spec_of(self._lease.step)
        if spec.needs_model or spec.needs_tokenizer:
            model_dir = self._model_of(job)
        self._look()
        fresh = process.ensure()
        self.notes.note("process.started" if fresh else "process.warm", device=settings.device)
        process.send(
            RunStep(
                step=self._lease.step,
                shard=self._lease.shard,
                shards=self._lease.shards,
                config=job.config,
                model_dir=str(model_dir),
                inputs=str(self._folder.inputs),
                out=str(self._folder.out),
                checkpoint=str(self._folder.checkpoint) if self._lease.checkpoint else None,
                device=settings.device,
                shard_rows=settings.shard_rows,
            )
        )
        heard_at = time.monotonic()
        while True:
            message = process.receive(TICK_S)
            if isinstance(message, StepDone):
                self._done = True
                return None
            self._look()
            if message is None:
                silent_s = time.monotonic() - heard_at
                if silent_s > settings.stall_s:
                    raise Stalled(step=self._lease.step, seconds=silent_s)
                continue
            if isinstance(message, StepFailed):
                return dict(message.error)
            if isinstance(message, Progressed):
                self._tell(message)
            elif isinstance(message, Checkpointed):
                self._keep(Path(message.folder))
                process.send(CheckpointKept())
            # Only now: while we were busy, as with a store that was away, the child may have waited for us.
            heard_at = time.monotonic()

    def _model_of(self, job: Job) -> Path:
        """The model's folder on this machine. Raises ModelNotFound, or ModelError if it is not what the job was made with."""
        shop = self._shop
        if job.base_artifact_id is not None:
            files, started = self._write(lambda conn: base_files(conn, job)), time.monotonic()
            place = shop.settings.work_dir / "bases" / job.base_model
            self._patiently(lambda: bring(shop.store, files, place, job.model_digest))
            self.notes.note("base.ready", files=len(files), seconds=_since(started))
            return place
        model_dir = find_model(shop.settings.models_dir, job.base_model)
        if model_digest(model_dir) != job.model_digest:
            raise ModelError(f"The model {job.base_model!r} on the worker is not the one that the job was made with.")
        return model_dir

    def _tell(self, message: Progressed) -> None:
        now = time.monotonic()
        if now - self._told_at < PROGRESS_EVERY_S:
            return
        self._told_at = now
        try:
            with self._shop.db.begin() as conn:
                pulse = lifecycle.record_progress(conn, self._lease, message.done, message.total, message.metrics)
                self._note_progress(conn, message, now)
        except DatabaseUnavailable:
            return  # the next one will tell more
        self._heart.heed(pulse)

    def _note_progress(self, conn: Connection, message: Progressed, now: float) -> None:
        if now - self._noted_at >= NOTE_EVERY_S:
            self._noted_at = now
            self.notes.progress(message.done, message.total, message.metrics)
            self.notes.keep(conn)

    def _keep(self, checkpoint: Path) -> None:
        def keep() -> int:
            files = put_checkpoint(self._shop.store, checkpoint)
            self._write(lambda conn: lifecycle.record_checkpoint(conn, self._lease, files, name=checkpoint.name))
            return len(files)

        started = time.monotonic()
        files = self._patiently(keep)
        self.notes.note("checkpoint.stored", name=checkpoint.name, files=files, seconds=_since(started))

    def _publish(self, job: Job, inputs: Inputs) -> str:
        def publish() -> tuple[Job, dict[str, int]]:
            files = put_outputs(self._shop.store, self._lease, self._folder.out)
            facts = read_facts(self._lease, self._folder.out)
            self._note_outputs(files, facts)
            device = next(iter(facts.accounting.values()))["device"]  # where it was in fact computed
            engine = self._shop.settings.engine
            fingerprint = reuse.fingerprint_of(job, self._lease, inputs.stored, device=device, engine=engine)
            return self._register(files, replace(facts, fingerprint=fingerprint))

        return self._ended(*self._patiently(publish))  # together: an object that was collected meanwhile is put again

    def _note_outputs(self, files: Sequence[NewArtifact], facts: lifecycle.StepFacts) -> None:
        self.notes.note("outputs.stored", files=len(files), bytes=sum(file.size_bytes for file in files))
        for cost in facts.accounting.values():
            known = ("device", "load_s", "work_s", "tokens", "rows", "peak_memory_bytes")
            self.notes.note("step.cost", **{name: cost[name] for name in known if name in cost})

    def _register(self, files: Sequence[NewArtifact], facts: lifecycle.StepFacts) -> tuple[Job, dict[str, int]]:
        def register(conn: Connection) -> tuple[Job, dict[str, int]]:
            job = lifecycle.finish_step(conn, self._lease, files, facts)
            if facts.resolved is not None:
                reuse.note_fingerprints(conn, job, engine=self._shop.settings.engine)
            return job, ready_by_queue(conn)

        return self._write(register)

    def _ended(self, job: Job, ready: Mapping[str, int]) -> str:
        if not job.is_final and (others := ready.get(job.queue, 0) - 1) > 0:
            self._shop.waker.wake(job.queue, count=others)  # this worker takes one of them itself
        return "cancelled" if job.cancel_requested_at else "done"

    def _stop(self, job: Job, why: Order | None) -> str:
        self.notes.note("attempt.stops", level="warning", why=why or "worker leaves")
        if why == "lost":
            raise LeaseLost(step_id=self._lease.step_id, token=self._lease.token)
        self._done |= self._shop.process.stop_step(self._shop.settings.cancel_grace_s)
        if why == "pause" and self._done:
            try:
                return self._publish(job, self._write(lambda conn: inputs_of(conn, job, self._lease)))
            except Interrupted as stop:
                return self._stop(job, stop.why)
        if why == "cancel":
            self._write(lambda conn: lifecycle.cancel_step(conn, self._lease))
            return "cancelled"
        if why == "limit":
            self._write(lambda conn: lifecycle.overrun_step(conn, self._lease))
            return "limit"
        job = self._write(lambda conn: lifecycle.release_step(conn, self._lease))
        if why == "pause":
            return "paused"  # and if the job was told to go on meanwhile, this worker claims the step again
        self._shop.waker.wake(job.queue)
        return "released"

    def _lose(self, reason: P2DError | None) -> str:
        most = self._shop.settings.max_crashes
        self._write(lambda conn: lifecycle.lose_step(conn, self._lease, max_crashes=most, reason=reason))
        return "lost"

    def end(self, outcome: str, seconds: float) -> None:
        """Keep the notes, whatever happened; a ledger that is away costs only them."""
        self.notes.note("attempt.ended", outcome=outcome, seconds=round(seconds, 3))
        with contextlib.suppress(DatabaseUnavailable), self._shop.db.begin() as conn:
            self.notes.keep(conn)

    def _look(self) -> None:
        """Raise Interrupted if the attempt must stop."""
        order = self._heart.order
        if order is not None and not (order == "pause" and self._done):
            raise Interrupted(order)
        if self._shop.stopping.is_set():
            raise Interrupted(None)

    def _patiently(self, action: Callable[[], T]) -> T:
        """Repeat a harmless-to-repeat action while store or database are away, as long as the attempt may go on."""
        deadline = time.monotonic() + STORE_PATIENCE_S
        pause_s = 0.2
        while True:
            self._look()
            try:
                return action()
            except (StoreUnavailable, DatabaseUnavailable) as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("attempt.waits", job=self._lease.job_id, error=type(error).__name__)
                self._shop.stopping.wait(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
                pause_s = min(pause_s * 2, 10.0)

    def _write(self, action: Callable[[Connection], T]) -> T:
        """One transaction, repeated while the database is away. A commit whose answer got lost shows up as LeaseLost."""
        return _write(self._shop, action)


def _since(started: float) -> float:
    return round(time.monotonic() - started, 3)


def _write(shop: Workshop, action: Callable[[Connection], T]) -> T:
    pause_s = 0.2
    deadline = time.monotonic() + STORE_PATIENCE_S
    while True:
        try:
            with shop.db.begin() as conn:
                return action(conn)
        except DatabaseUnavailable:
            if shop.stopping.is_set() or time.monotonic() > deadline:
                raise
            shop.stopping.wait(pause_s)
            pause_s = min(pause_s * 2, 5.0)


def _charge(shop: Workshop, lease: Lease) -> None:
    try:
        most = shop.settings.max_crashes
        _write(shop, lambda conn: lifecycle.lose_step(conn, lease, max_crashes=most))
    except (LeaseLost, DatabaseUnavailable):
        pass  # the lease runs out by itself
