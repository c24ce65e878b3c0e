"""What must hold of a job in the ledger after anything that happened: that it is as the model says, and laws that need none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.core import reuse
from app.core.lifecycle import NEXT, StepFacts
from app.db.artifacts import NewArtifact, list_artifacts
from app.db.engine import Connection
from app.db.jobs import FINAL, Job, Status
from app.db.leases import Lease
from p2d.pipeline import STEPS
from tests.job_model import ModelJob, ModelStep

LOOK = """
select id, status, retries, progress, event_seq, cancel_requested_at is not null, pause_requested_at is not null,
       jsonb_build_array(error, finished_at),
       (select jsonb_agg(jsonb_build_array(seq, type, data -> 'status', data -> 'progress') order by seq)
        from events where job_id = jobs.id),
       (select jsonb_agg(to_jsonb(steps) || jsonb_build_object('attempts',
                   (select coalesce(jsonb_agg(jsonb_build_array(token, outcome) order by token), '[]')
                    from attempts where step_id = steps.id)) order by id)
        from steps where job_id = jobs.id),
       (select coalesce(jsonb_agg(name), '[]') from artifacts where job_id = jobs.id)
from jobs order by id
"""

REFERENCES = """
select sha256 from artifacts union select sha256 from datasets
union select value from steps, jsonb_each_text(checkpoint -> 'files') where jsonb_typeof(checkpoint) = 'object'
"""
"""Every object that must be in the store."""


@dataclass(frozen=True, slots=True)
class Seen:
    """All of a job that the laws speak of."""

    id: str
    status: Status
    retries: int
    progress: float
    seq: int
    cancel_asked: bool
    pause_asked: bool
    end: Any
    events: list[tuple[int, str, Any, Any]]
    """Number, type, status, progress."""
    steps: list[dict[str, Any]]
    files: list[str]


def look(conn: Connection) -> Iterator[Seen]:
    """Every job, oldest first, in one statement."""
    return (Seen(*row) for row in conn.exec_driver_sql(LOOK))


def outputs_of(step: ModelStep) -> list[str]:
    """Names of the files that the step owes."""
    return [pattern.replace("*", f"{step.shard:05d}") for pattern in STEPS[step.name].writes]


def check_job(job: Seen, was: Seen | None, model: ModelJob) -> None:
    """Status and log; `was` is the job as it was last seen."""
    assert [seq for seq, *_ in job.events] == list(range(1, job.seq + 1)), "events have a gap"
    path = [status for _, type, status, _ in job.events if type == "job.status"]
    assert path == model.path
    assert all(after in NEXT[before] for before, after in itertools.pairwise(path)), f"illegal path {path}"
    assert (job.status, job.retries) == (model.status, model.retries)
    assert (job.cancel_asked, job.pause_asked) == (model.cancel_asked, model.pause_asked)
    ends = [status for _, type, status, _ in job.events if type == "end"]
    assert ends == [status for status in path if status in FINAL], "one `end` for each ending"
    assert (job.events[-1][1] == "end") == (job.status in FINAL)
    told = [progress for _, type, _, progress in job.events if type == "job.progress"]
    assert told == sorted(told), "progress fell"
    assert (job.progress == 1.0) == (job.status == "succeeded")
    if was is not None:
        assert job.progress >= was.progress, "progress fell"
        if was.status in FINAL and was.retries == job.retries:
            assert (job.status, job.seq, job.end) == (was.status, was.seq, was.end), "an ended job has changed"


def check_steps(job: Seen, model: ModelJob) -> None:
    """Leases, attempts and files."""
    for step, ours in zip(job.steps, model.steps, strict=True):
        assert (step["status"], step["token"], step["crashes"]) == (ours.status, len(ours.attempts), ours.crashes), ours
        attempts = [[number + 1, outcome] for number, outcome in enumerate(ours.attempts)]
        assert step["attempts"] == attempts, "attempts, and what is charged for them, are not what happened"
        live = [token for token, outcome in step["attempts"] if outcome == "running"]
        assert live == ([step["token"]] if step["status"] == "running" else []), "not one that holds the step"
        assert (step["lease_until"] is not None) == (step["status"] == "running")
        assert (step["checkpoint"] is not None) == ours.checkpoint, ours
        assert (step["fingerprint"] is not None) >= (ours.output is not None), ours
    names = sorted(name for ours in model.steps if ours.status == "done" for name in outputs_of(ours))
    assert sorted(job.files) == names
    if job.status == "succeeded":
        wanted = {pattern for step in job.steps for pattern in STEPS[step["step"]].writes}
        assert all(any(Path(name).match(pattern) for name in names) for pattern in wanted), "a file is missing"


def facts_of(conn: Connection, job: Job, lease: Lease) -> tuple[list[NewArtifact], StepFacts]:
    """What a worker says of a step that it has finished; with files, if it found them and need not make them."""
    if lease.step == "validate":
        resolved = {"config": job.config, "device": "cpu"}
        return [], StepFacts(resolved=resolved, estimate_s={"heads": 9.0, "respond": 30.0})
    stored = {file.name: file.sha256 for file in list_artifacts(conn, job.id)}
    wanted = reuse.wanted_fingerprint(job, lease, stored, engine="any")
    earlier = reuse.find_earlier(conn, job.project_id, wanted) if wanted else None
    if earlier is not None:
        return earlier.files, earlier.facts
    return [], StepFacts(fingerprint=reuse.fingerprint_of(job, lease, stored, device="cpu", engine="any"))
