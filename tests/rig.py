"""A ledger with real servers and the stub engine, and the laws that must hold after any fault: `Rig.check`.

Workers are threads of the test (`in_process`) where the law is about jobs, and real processes (`worker`) where it is
about processes. Waits are for conditions, with a deadline; nothing sleeps and hopes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from app.blobs import BlobStore
from app.core import lifecycle, moves
from app.core.garbage import ObjectBook
from app.core.submit import JobRequest, submit
from app.core.wake import Waker
from app.db.artifacts import Artifact, list_artifacts
from app.db.attempts import Attempt, list_attempts
from app.db.datasets import insert_dataset
from app.db.engine import Engine, for_project, make_engine
from app.db.events import Event, list_events
from app.db.jobs import FINAL, Job, get_job
from app.db.projects import DEFAULT_PROJECT
from app.db.steps import Step, list_steps
from app.service import environment
from app.settings import Settings
from benchmarks.service import write_stub_model
from p2d.config import DataConfig, HeadsConfig, JobConfig, Kind, Limits
from p2d.model_info import read_model_info
from p2d.pipeline import spec_of
from p2d.rows import Row, content_hash, write_rows
from workers.loop import Worker

ROOT = Path(__file__).resolve().parents[1]

PATIENCE_S = 120.0
"""Longest wait for a condition. A law broken shows as a timeout, so it may be long."""

FAST = {
    "lease_s": 3.0,
    "heartbeat_s": 0.2,
    "reconcile_s": 0.3,
    "poll_s": 0.3,
    "cancel_grace_s": 1.0,
    "shard_rows": 20,
    "engine": "tests.stub_engine:run_step",
}
"""The service's time constants, as short as a busy machine allows: a heartbeat may come late, but not for a whole lease."""

T = TypeVar("T")
_queues = itertools.count()


def wait_for(condition: Callable[[], T], what: str) -> T:
    """The first true value of the condition."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)
    return value


@dataclass(kw_only=True)
class Rig:
    """One test's ledger, store, stub engine and workers."""

    settings: Settings
    stub: Path
    db: Engine
    store: BlobStore
    waker: Waker
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    # --- jobs -------------------------------------------------------------------------------------------------------

    def submit(
        self,
        *,
        kind: Kind = "adapt",
        rows: int = 60,
        max_seconds: int | None = None,
        max_gpu_seconds: int | None = None,
        deadline: str | None = None,
        head_map: str | None = None,
        selection: str | None = None,
        project: str = DEFAULT_PROJECT,
        priority: int = 0,
        config: JobConfig | None = None,
    ) -> str:
        """A queued job over made-up rows; nobody is woken. Without a whole config it computes all anew: faults need steps."""
        data = [Row(f"What is {i} + {i}?", str(2 * i), i + 1) for i in range(rows)]
        path = self.settings.work_dir / "dataset.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, data)
        blob = self.store.put_file(path)
        config = config or JobConfig(
            kind=kind,
            heads=HeadsConfig(proxy_rows=8, head_map=head_map),
            data=DataConfig(selection=selection),
            limits=Limits(max_seconds=max_seconds, max_gpu_seconds=max_gpu_seconds, deadline=deadline),
            reuse="never",
        )
        with for_project(self.db, project).begin() as conn:
            dataset = insert_dataset(
                conn,
                name="sums",
                format="jsonl",
                rows=rows,
                size_bytes=blob.size_bytes,
                content_hash=content_hash(data),
                sha256=blob.sha256,
                stored_bytes=blob.size_bytes,
                report={},
            )
            model = read_model_info(self.settings.models_dir / "stub")
            request = JobRequest(config=config, model=model, dataset=dataset, priority=priority)
            return submit(conn, request, shard_rows=self.settings.shard_rows, queue=self.settings.worker_queue).id

    def cancel(self, job_id: str) -> Job:
        """Ask the job to stop, as the API does."""
        with self.db.begin() as conn:
            return moves.request_cancel(conn, job_id)

    def pause(self, job_id: str) -> Job:
        """Ask the job to stand still."""
        with self.db.begin() as conn:
            return moves.request_pause(conn, job_id)

    def resume(self, job_id: str) -> Job:
        """Let the job go on."""
        with self.db.begin() as conn:
            return moves.request_resume(conn, job_id)

    def retry(self, job_id: str) -> Job:
        """Queue an ended job again."""
        with self.db.begin() as conn:
            return moves.request_retry(conn, job_id)

    def paused(self, job_id: str) -> Job:
        """Wait until the job stands still, and make sure that nobody works on it or could."""
        wait_for(lambda: self.job(job_id).status == "paused", f"the pause of {job_id}")
        assert not {step.status for step in self.steps(job_id)} & {"ready", "running"}, "a paused job can be claimed"
        assert all(attempt.outcome != "running" for attempt in self.attempts(job_id)), "an attempt outlives the pause"
        return self.job(job_id)

    def job(self, job_id: str) -> Job:
        """The job as it is now."""
        with self.db.begin() as conn:
            job = get_job(conn, job_id)
        assert job is not None
        return job

    def steps(self, job_id: str) -> list[Step]:
        """Its steps, in order."""
        with self.db.begin() as conn:
            return list_steps(conn, job_id)

    def attempts(self, job_id: str) -> list[Attempt]:
        """Its attempts, oldest first."""
        with self.db.begin() as conn:
            return list_attempts(conn, job_id)

    def artifacts(self, job_id: str) -> dict[str, Artifact]:
        """Its files by name."""
        with self.db.begin() as conn:
            return {artifact.name: artifact for artifact in list_artifacts(conn, job_id)}

    def events(self, job_id: str) -> list[Event]:
        """All its events."""
        with self.db.begin() as conn:
            return list_events(conn, job_id, limit=100_000)

    def ended(self, job_id: str) -> Job:
        """Wait for the job's end."""
        wait_for(lambda: self.job(job_id).is_final, f"the end of {job_id}")
        return self.job(job_id)

    # --- the stub engine --------------------------------------------------------------------------------------------

    def steer(self, what: str, step: str, text: str = "") -> None:
        """Tell the stub to `hold`, `deaf`, `crash` or `fail` at a step."""
        (self.stub / f"{what}-{step}").write_text(text)

    def let_go(self, step: str) -> None:
        """End `hold` and `deaf`."""
        for what in ("hold", "deaf", "reached"):
            (self.stub / f"{what}-{step}").unlink(missing_ok=True)

    def reached(self, step: str) -> int:
        """Wait until a child holds at the step; its process id."""
        path = self.stub / f"reached-{step}"
        return int(wait_for(lambda: path.read_text() if path.exists() else "", f"a child at {step}"))

    def runs(self) -> list[str]:
        """`STEP SHARD PID fresh|resumed` of everything that any child started."""
        path = self.stub / "runs"
        return path.read_text().splitlines() if path.exists() else []

    # --- workers ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def in_process(self, count: int = 1) -> Iterator[list[Worker]]:
        """Workers as threads of this process; their children are processes all the same."""
        workers = [Worker(self.settings) for _ in range(count)]
        for worker in workers:
            worker.start()
        try:
            yield workers
        finally:
            for worker in workers:
                worker.stop()
            for worker in workers:
                assert worker.join(30), "a worker did not stop"

    def worker(self) -> subprocess.Popen[bytes]:
        """A worker as in production: a process of Celery's, in a session of its own."""
        env = environment(self.settings) | {"STUB_DIR": str(self.stub), "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, "-m", "workers.celery_app"], env=env, start_new_session=True)
        self.processes.append(process)
        return process

    def stop(self) -> None:
        """Kill every process that is left and close everything."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
        self.waker.close()
        self.db.dispose()

    # --- the laws ---------------------------------------------------------------------------------------------------

    def check(self, job_id: str, *, like: str | None = None) -> None:
        """Every law about a job that has ended; with `like`, its results are those of that other job, bit for bit."""
        self.check_ledger(job_id)
        job = self.job(job_id)
        if job.status == "succeeded":
            assert job.progress == 1.0
            self._check_complete(job, self.steps(job_id))
        self._check_store(job_id)
        if like is not None:
            assert self._results(job_id) == self._results(like), "the fault changed the result"

    def check_ledger(self, job_id: str) -> None:
        """The laws about rows: events, steps and attempts of a job that has ended agree."""
        job, steps, attempts = self.job(job_id), self.steps(job_id), self.attempts(job_id)
        assert job.is_final
        self._check_events(job)
        assert {step.status for step in steps} <= {"done", "failed", "cancelled"}, "a step outlives its job"
        assert all(attempt.outcome != "running" for attempt in attempts), "an attempt outlives its job"
        for step in steps:
            mine = [attempt for attempt in attempts if attempt.step_id == step.id]
            assert [attempt.token for attempt in mine] == list(range(1, len(mine) + 1)), "a claim left no record"
            done = [attempt for attempt in mine if attempt.outcome == "done"]
            assert len(done) == (step.status == "done"), f"{step.step} ended {len(done)} times"
        assert (job.status == "succeeded") == all(step.status == "done" for step in steps)
        assert (job.status == "failed") == (job.error is not None)

    def _check_events(self, job: Job) -> None:
        events = self.events(job.id)
        assert [event.seq for event in events] == list(range(1, len(events) + 1)), "events have a gap"
        path = [event.data["status"] for event in events if event.type == "job.status"]
        ends = [event.data["status"] for event in events if event.type == "end"]
        assert ends == [status for status in path if status in FINAL], "one `end` for each ending"
        assert len(ends) == job.retries + 1
        assert events[-1].type == "end"
        assert events[-1].data == {"status": job.status}
        assert path[0] == "queued"
        assert path[-1] == job.status
        assert all(b in lifecycle.NEXT[a] for a, b in itertools.pairwise(path)), f"illegal path {path}"
        progress = [event.data["progress"] for event in events if event.type == "job.progress"]
        assert progress == sorted(progress), "progress fell"
        assert all((value == 1.0) <= (job.status == "succeeded") for value in progress)
        stages = [lifecycle.STAGES.index(event.data["stage"]) for event in events if event.type == "job.stage"]
        assert stages == sorted(set(stages)), "a stage came twice"

    def _check_complete(self, job: Job, steps: list[Step]) -> None:
        names = set(self.artifacts(job.id))
        for spec in {step.step: spec_of(step.step) for step in steps}.values():
            for pattern in spec.writes:
                assert any(Path(name).match(pattern) for name in names), f"{pattern} is missing"

    def _check_store(self, job_id: str) -> None:
        for artifact in self.artifacts(job_id).values():
            path = self.settings.work_dir / "fetched"
            assert self.store.fetch(artifact.sha256, path).size_bytes == artifact.size_bytes
        root = Path(self.settings.url("store_url").removeprefix("file://"))
        for path in root.rglob("*"):
            if path.is_file():
                assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name, "a torn object"

    def _results(self, job_id: str) -> dict[str, str]:
        # What depends on the clock or on failed attempts is left out.
        return {
            name: artifact.sha256
            for name, artifact in self.artifacts(job_id).items()
            if not name.startswith(("accounting-", "report"))
        }


def make_rig(settings: Settings, tmp_path: Path) -> Rig:
    """A rig on these servers, with fast time constants, a queue and a stub folder of its own, and the stub's model."""
    queue = f"rig{next(_queues)}"
    settings = settings.model_copy(update={**FAST, "worker_queue": queue})
    stub = tmp_path / "stub"
    stub.mkdir()
    write_stub_model(settings.models_dir / "stub")
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    db = make_engine(settings.url("database_url"))
    return Rig(
        settings=settings,
        stub=stub,
        db=db,
        store=BlobStore.open(settings.url("store_url"), ObjectBook(db)),
        waker=Waker(settings.url("broker_url")),
    )
