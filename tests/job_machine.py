"""Users, workers, time and the collector as rules of hypothesis, on up to two jobs of a real ledger beside a model of each.

After every rule the ledger must be what tests/job_model.py says and keep tests/job_laws.py. Time is moved in the database.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from sqlalchemy import delete, update

from app.core import lifecycle, moves, reuse
from app.core.garbage import collect, drop_checkpoints
from app.core.lifecycle import StepFacts
from app.core.submit import JobRequest, submit
from app.db.artifacts import NewArtifact
from app.db.datasets import Dataset
from app.db.engine import Connection
from app.db.jobs import FINAL, find_job, update_job
from app.db.leases import Lease, claim
from app.db.steps import list_steps, set_priority
from app.db.tables import head_maps, jobs, steps
from app.errors import HeadMapNotFound, JobAlreadyFinal, JobInUse, LeaseLost, MoveNotAllowed
from p2d.config import DataConfig, HeadsConfig, JobConfig, Kind, Limits, Reuse
from p2d.errors import Diverged
from p2d.model_info import ModelInfo
from p2d.step_fingerprints import REUSABLE
from tests.job_laws import REFERENCES, Seen, check_job, check_steps, facts_of, look, outputs_of
from tests.job_model import FITTING, MAX_CRASHES, POSSIBLE, WAYS, WORKED_ON, ModelJob, ModelStep, Refused, claimable
from tests.rig import Rig
from workers.reconcile import reconcile

KINDS: tuple[Kind, ...] = ("identify_heads", "identify_heads", "select_data")
REUSE: tuple[Reuse, ...] = ("auto", "auto", "never")


@dataclass(kw_only=True)
class Held:
    """A lease, and what its worker knows."""

    lease: Lease
    job: ModelJob
    step: ModelStep
    begun: bool = False
    """Its worker has begun, be it to hear that it must stop."""
    works: bool = False
    """It was not told to stop when it began."""

    @property
    def alive(self) -> bool:
        """Whether the step is this attempt's."""
        return self.step.status == "running" and len(self.step.attempts) == self.lease.token


class JobMachine(RuleBasedStateMachine):
    """Up to two jobs of one small service."""

    rig: ClassVar[Rig]
    dataset: ClassVar[Dataset]
    model_info: ClassVar[ModelInfo]
    files: ClassVar[dict[str, NewArtifact]]
    """What lies in the store since the last collection."""
    eye: ClassVar[Connection]
    """Looks on, one statement at a time."""
    covered: ClassVar[Counter[tuple[str, str]]]

    def __init__(self) -> None:
        super().__init__()
        self.jobs: dict[str, ModelJob] = {}
        self.head_maps: dict[str, str] = {}
        """Head map -> job."""
        self.held: list[Held] = []
        self.seen: dict[str, Seen] = {}
        self.silent = False
        """Nothing may have been told since the last look."""

    def teardown(self) -> None:
        with self.rig.db.begin() as conn:
            conn.execute(delete(jobs))

    # --- users ------------------------------------------------------------------------------------------------------

    @initialize(way=st.sampled_from(WAYS))
    def first(self, way: str) -> None:
        self.create("identify_heads", 0, "auto")
        for event in way.split():
            self.do(event)
            self.agrees()

    @precondition(lambda self: len(self.jobs) < 2)
    @rule(kind=st.sampled_from(KINDS), named=st.integers(0, 3), again=st.sampled_from(REUSE))
    def create(self, kind: Kind, named: int, again: Reuse) -> None:
        head_map = sorted(self.head_maps)[named] if named < len(self.head_maps) and kind == "select_data" else None
        config = JobConfig(
            kind=kind,
            heads=HeadsConfig(proxy_rows=8, head_map=head_map),
            data=DataConfig(),
            limits=Limits(max_seconds=86_400),
            reuse=again,
        )
        with self.rig.db.begin() as conn:
            request = JobRequest(config=config, model=self.model_info, dataset=self.dataset)
            job = submit(conn, request, shard_rows=self.dataset.rows // 2, queue=self.rig.settings.worker_queue)
            planned = list_steps(conn, job.id)
        ours = [ModelStep(name=step.step, shard=step.shard, after=tuple(step.after)) for step in planned]
        self.jobs[job.id] = ModelJob(steps=ours, reads=self.head_maps[head_map] if head_map else None)

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 1), move=st.sampled_from(["cancel", "pause", "pause", "resume", "retry", "delete"]))
    def ask(self, which: int, move: str) -> None:
        """What changes something, if there is a job for it."""
        fitting = [job_id for job_id, job in self.jobs.items() if job.status in FITTING[move]]
        if fitting:
            self.move(fitting[which % len(fitting)], move)

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 1))
    def insist(self, which: int) -> None:
        """All that must change nothing, be it refused or not."""
        job_id, job = self.pick(which, "patch")
        with self.rig.db.begin() as conn:
            find_job(conn, job_id, lock=True)
            set_priority(conn, job_id, which)
            update_job(conn, job_id, priority=which)
        for move, fitting in FITTING.items():
            if job.status not in fitting:
                self.move(job_id, move)
        self.silent = True
        self.agrees()

    def move(self, job_id: str, move: str) -> None:
        job = self.jobs[job_id]
        self.note(job, move)
        needed = any(other.reads == job_id and other.status not in FINAL for other in self.jobs.values())
        asked: dict[str, Callable[[], None]] = {
            "retry": lambda: job.retry(inputs_left=job.reads is None or job.reads in self.jobs),
            "delete": lambda: job.delete(needed=needed),
        }
        may = allowed(asked.get(move) or getattr(job, move))
        try:
            with self.rig.db.begin() as conn:
                (moves.delete if move == "delete" else getattr(moves, f"request_{move}"))(conn, job_id)
        except (MoveNotAllowed, JobAlreadyFinal, JobInUse, HeadMapNotFound):
            assert not may
            return
        assert may, "not refused"
        if move == "delete":
            del self.jobs[job_id]
            self.head_maps = {name: maker for name, maker in self.head_maps.items() if maker != job_id}

    # --- workers ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.claimable())
    @rule(begins=st.booleans())
    def claim(self, begins: bool) -> None:
        with self.rig.db.begin() as conn:
            lease = self.take(conn)
        assert lease is not None
        held = self.hold(lease)
        self.note(held.job, "claim")
        held.job.claim(held.step)
        if begins:
            self.agrees()
            self.begin(len(self.live("begin")) - 1)

    @precondition(lambda self: self.claimable())
    @rule()
    def cancel_during_a_claim(self) -> None:
        """The claim locks the step and not the job: the cancel passes by it, and the job may have ended when it commits."""
        with self.rig.db.begin() as claiming:
            lease = self.take(claiming)
            assert lease is not None
            held = self.hold(lease)
            self.note(held.job, "claim")
            with self.rig.db.begin() as conn:
                moves.request_cancel(conn, lease.job_id)
        held.job.cancel(claiming=held.step)
        held.job.claim(held.step)

    @precondition(lambda self: self.live("begin"))
    @rule(which=st.integers(0, 3))
    def begin(self, which: int) -> None:
        held = self.pick_held(which, "begin")
        held.begun = True
        with self.rig.db.begin() as conn:
            if held.job.status in FINAL:
                with pytest.raises(LeaseLost):
                    lifecycle.begin_step(conn, held.lease)
                return
            job = lifecycle.begin_step(conn, held.lease)
        held.works = job.cancel_requested_at is None and job.pause_requested_at is None
        held.job.begin()

    @precondition(lambda self: self.live("beat"))
    @rule(which=st.integers(0, 3))
    def beat(self, which: int) -> None:
        held = self.pick_held(which, "beat")
        with self.rig.db.begin() as conn:
            pulse = lifecycle.renew(conn, held.lease, lease_s=3600)
        asked = held.job.cancel_asked, held.job.pause_asked, None
        assert (pulse.cancel_requested, pulse.pause_requested, pulse.limit_reached) == asked

    @precondition(lambda self: self.live("progress"))
    @rule(which=st.integers(0, 3), done=st.integers(0, 4), keeps=st.booleans())
    def report(self, which: int, done: int, keeps: bool) -> None:
        held = self.pick_held(which, "progress")
        with self.rig.db.begin() as conn:
            lifecycle.record_progress(conn, held.lease, done, 4, {"loss": 1.0})
        if keeps:
            self.note(held.job, "checkpoint")
            file = self.put(held, "state.json")
            with self.rig.db.begin() as conn:
                lifecycle.record_checkpoint(conn, held.lease, {file.name: file.sha256})
            held.step.checkpoint = True

    @precondition(lambda self: self.live("finish"))
    @rule(which=st.integers(0, 3))
    def finish(self, which: int) -> None:
        held = self.pick_held(which, "finish")
        files = [self.put(held, name) for name in outputs_of(held.step)]
        with self.rig.db.begin() as conn:
            job = find_job(conn, held.lease.job_id)
            taken, facts = facts_of(conn, job, held.lease)
            done = {(step.name, step.shard) for other in self.jobs.values() for step in other.having("done")}
            assert (taken != []) == (held.step.output is not None and (held.step.name, held.step.shard) in done)
            job = lifecycle.finish_step(conn, held.lease, taken or files, facts)
            if facts.resolved is not None:
                reuse.note_fingerprints(conn, job, engine="any")
            made = conn.execute(head_maps.select().where(head_maps.c.job_id == held.lease.job_id)).first()
        held.job.finish(held.step)
        if held.step.name == "validate" and held.step.status == "done" and job.config["reuse"] == "auto":
            for step in held.job.steps:
                step.output = f"{step.name} {step.shard}" if step.name in REUSABLE else None
        if made is not None:
            self.head_maps[made.id] = held.lease.job_id

    @precondition(lambda self: self.claimable())
    @rule(count=st.integers(1, 4))
    def work_on(self, count: int) -> None:
        """What happens most of the time, so that jobs get somewhere."""
        for _ in range(count):
            if self.claimable():
                self.claim(True)
                self.agrees()
                self.finish(len(self.live("finish")) - 1)
                self.agrees()

    @precondition(lambda self: self.live("lose"))
    @rule(which=st.integers(0, 3), how=st.sampled_from(["fail", "lose", "lose", "release", "release", "stop", "stop"]))
    def end(self, which: int, how: str) -> None:
        if not self.live(how):
            return
        held = self.pick_held(which, how)
        with self.rig.db.begin() as conn:
            if how == "fail":
                lifecycle.fail_step(conn, held.lease, Diverged("no"))
            elif how == "lose":
                lifecycle.lose_step(conn, held.lease, max_crashes=MAX_CRASHES)
            elif how == "release":
                lifecycle.release_step(conn, held.lease)
            else:
                lifecycle.cancel_step(conn, held.lease)
        getattr(held.job, how)(held.step)

    @precondition(lambda self: any(not held.alive for held in self.held))
    @rule(which=st.integers(0, 3), some=st.integers(0, 2))
    def write_late(self, which: int, some: int) -> None:
        late = [held for held in self.held if not held.alive]
        lease = late[which % len(late)].lease
        if lease.job_id in self.jobs:
            self.note(self.jobs[lease.job_id], "stale")
        file = NewArtifact(name="late.json", media_type="application/json", sha256="0" * 64, size_bytes=1)
        writes: list[Callable[[Connection], Any]] = [
            lambda conn: lifecycle.begin_step(conn, lease),
            lambda conn: lifecycle.renew(conn, lease, lease_s=3600),
            lambda conn: lifecycle.record_progress(conn, lease, 4, 4, {}),
            lambda conn: lifecycle.record_checkpoint(conn, lease, {}),
            lambda conn: lifecycle.finish_step(conn, lease, [file], StepFacts()),
            lambda conn: lifecycle.fail_step(conn, lease, Diverged("no")),
            lambda conn: lifecycle.lose_step(conn, lease, max_crashes=1),
            lambda conn: lifecycle.release_step(conn, lease),
            lambda conn: lifecycle.cancel_step(conn, lease),
            lambda conn: lifecycle.expire_step(conn, lease, max_crashes=1),
        ]
        with self.rig.db.begin() as conn:
            for write in writes[some::3]:
                with pytest.raises(LeaseLost):
                    write(conn)
        self.silent = True

    # --- time and sweeps --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.live("expire"))
    @rule(which=st.integers(0, 3), what=st.sampled_from(["lease", "lease", "limit"]))
    def time_passes(self, which: int, what: str) -> None:
        held = self.pick_held(which, "expire")
        if what == "limit" and held.job.started and held.job.status in WORKED_ON:
            self.over_time(held)
            return
        past = {"lease_until": "2000-01-01T00:00:00Z"}
        with self.rig.db.begin() as conn:
            conn.execute(update(steps).where(steps.c.id == held.lease.step_id).values(past))
        sweep(self.rig)
        held.job.lose(held.step)

    def over_time(self, held: Held) -> None:
        self.note(held.job, "over_time")
        mine = jobs.c.id == held.lease.job_id
        with self.rig.db.begin() as conn:
            was = find_job(conn, held.lease.job_id).started_at
            conn.execute(update(jobs).where(mine).values(started_at="2000-01-01T00:00:00Z"))
        sweep(self.rig)
        if not held.job.cancel_asked:
            held.job.end_failed()
        else:  # nothing more than it was asked already; with its time back, so that its beats stay simple
            with self.rig.db.begin() as conn:
                conn.execute(update(jobs).where(mine).values(started_at=was))

    @rule(what=st.sampled_from(["reconcile", "collect"]))
    def sweep(self, what: str) -> None:
        for job in self.jobs.values():
            self.note(job, what)
        if what == "collect":
            self.collect()
            return
        sweep(self.rig)
        if not self.claimable():
            with self.rig.db.begin() as conn:
                assert self.take(conn) is None

    def collect(self) -> None:
        drop_checkpoints(self.rig.db, kept_d=0)
        collect(self.rig.db, self.rig.store, kept_h=0)
        self.files.clear()
        for job in self.jobs.values():
            if job.status in FINAL:
                for step in job.steps:
                    step.checkpoint = False
        needed = set(self.eye.exec_driver_sql(REFERENCES).scalars())
        root = Path(self.rig.settings.url("store_url").removeprefix("file://"))
        left = {path.name for path in root.rglob("*") if path.is_file()}
        assert left == needed, "the collector took too much, or left something"

    # --- the laws ---------------------------------------------------------------------------------------------------

    @invariant()
    def agrees(self) -> None:
        now = {seen.id: seen for seen in look(self.eye)}
        assert list(now) == list(self.jobs)
        for job_id, model in self.jobs.items():
            was = self.seen.get(job_id)
            check_job(now[job_id], was, model)
            check_steps(now[job_id], model)
            assert was is None or not self.silent or was.seq == now[job_id].seq, "something was told of nothing"
        self.seen, self.silent = now, False
        computed = [step.output for job in self.jobs.values() for step in job.having("running") if step.output]
        assert len(computed) == len(set(computed)), "the same is computed twice at a time"

    # --- one event at a time ----------------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """Of the first job."""
        return next(iter(self.jobs.values())).status

    def can(self, event: str) -> bool:
        """Whether this may happen to the first job or its workers now."""
        if not self.jobs:
            return False
        if event == "stale":
            return any(not held.alive for held in self.held)
        if event == "over_time":
            return any(held.job.started for held in self.live(event))
        if event == "claim":
            return bool(self.claimable())
        return event in (*FITTING, "patch", "reconcile", "collect") or bool(self.live(event))

    def do(self, event: str) -> None:
        """Let this happen to the first job or worker to which it can."""
        ways: dict[str, Callable[[], None]] = {
            **dict.fromkeys(FITTING, lambda: self.move(next(iter(self.jobs)), event)),
            **dict.fromkeys(("reconcile", "collect"), lambda: self.sweep(event)),
            **dict.fromkeys(("begin", "beat", "finish"), lambda: getattr(self, event)(0)),
            **dict.fromkeys(("fail", "lose", "release", "stop"), lambda: self.end(0, event)),
            **dict.fromkeys(("progress", "checkpoint"), lambda: self.report(0, 2, event == "checkpoint")),
            "patch": lambda: self.insist(0),
            "claim": lambda: self.claim(False),
            "cancel_during_a_claim": self.cancel_during_a_claim,
            "expire": lambda: self.time_passes(0, "lease"),
            "over_time": lambda: self.time_passes(0, "limit"),
            "stale": lambda: self.write_late(0, 0),
        }
        ways[event]()

    # --- inside -----------------------------------------------------------------------------------------------------

    def note(self, job: ModelJob, event: str) -> None:
        assert job.status in POSSIBLE[event], (job.status, event)
        self.covered[job.status, event] += 1

    def pick(self, which: int, event: str) -> tuple[str, ModelJob]:
        job_id = list(self.jobs)[which % len(self.jobs)]
        self.note(self.jobs[job_id], event)
        return job_id, self.jobs[job_id]

    def pick_held(self, which: int, event: str) -> Held:
        able = self.live(event)
        held = able[which % len(able)]
        self.note(held.job, event)
        return held

    def live(self, event: str) -> list[Held]:
        """Leases whose holder might do this now."""
        alive = [held for held in self.held if held.alive and held.job.status in POSSIBLE[event]]
        if event == "begin":
            return [held for held in alive if not held.begun]
        if event in ("release", "stop"):
            return [held for held in alive if held.begun]
        if event in ("progress", "checkpoint", "finish", "fail"):
            return [held for held in alive if held.works]
        return alive

    def claimable(self) -> list[ModelStep]:
        return claimable(self.jobs.values())

    def take(self, conn: Connection) -> Lease | None:
        lease = claim(conn, queue=self.rig.settings.worker_queue, worker="w", lease_s=3600)
        assert (lease is not None) == bool(self.claimable())
        return lease

    def hold(self, lease: Lease) -> Held:
        job = self.jobs[lease.job_id]
        step = next(step for step in job.steps if (step.name, step.shard) == (lease.step, lease.shard))
        assert any(step is one for one in self.claimable()), f"{step} was claimed"
        self.held.append(Held(lease=lease, job=job, step=step))
        return self.held[-1]

    def put(self, held: Held, name: str) -> NewArtifact:
        text = f"{held.step.name} {held.step.shard} {name}"
        if text not in self.files:
            path = self.rig.settings.work_dir / "made"
            path.write_text(text)
            blob = self.rig.store.put_file(path)
            self.files[text] = NewArtifact(
                name=name, media_type="application/json", sha256=blob.sha256, size_bytes=blob.size_bytes
            )
        return self.files[text]


class Deaf:
    """Wakes nobody."""

    def wake(self, queue: str, *, count: int = 1) -> None: ...


def sweep(rig: Rig) -> None:
    """What some worker does from time to time."""
    reconcile(rig.db, Deaf(), max_crashes=MAX_CRASHES)  # type: ignore[arg-type]


def allowed(move: Callable[[], None]) -> bool:
    """Whether the model lets a user do this; then it has."""
    try:
        move()
    except Refused:
        return False
    return True
