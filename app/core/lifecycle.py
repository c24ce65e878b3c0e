"""What may happen to a job while it is worked on: every change that a worker or time brings is a function here.

    queued ──> running ──> succeeded          pausing: asked to pause, steps still run; may also end as if running
     │  ^       │  ├─────> failed             a paused job has no running and no ready step
     │  └paused<┴> pausing                    what users ask for is in app.core.moves
     └──────────┴> cancelling ──> cancelled   a retry queues a failed or cancelled job again

Each function takes a Connection, locks the job first and never commits. Those of a worker take its Lease and raise
LeaseLost, having changed nothing, once a later attempt, a cancel or the end of the job took the step away: that fence is
why a step that ran twice publishes once. SQL is in app.db; processes and files are in workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from app.core.foresight import estimate_json, share_done, time_left
from app.core.webhooks import tell_webhooks
from app.db import attempts, jobs, leases, steps
from app.db.artifacts import Artifact, NewArtifact, expire_artifacts, insert_artifacts
from app.db.engine import Connection, Json
from app.db.estimates import past_errors
from app.db.events import append_event
from app.db.head_maps import insert_head_map
from app.db.jobs import Job, Stage, Status
from app.db.leases import Lease, Pulse
from app.db.selections import insert_selection
from app.db.steps import NewStep
from app.errors import LeaseLost, LimitReached, WorkerLost
from p2d.config import config_from_json, config_json, top_count
from p2d.errors import P2DError
from p2d.pipeline import spec_of
from p2d.plans import RowCounts
from p2d.resolution import settled

STAGES: tuple[Stage, ...] = get_args(Stage)

NEXT: Mapping[Status, frozenset[Status]] = {
    "queued": frozenset({"running", "pausing", "paused", "cancelling", "cancelled", "failed"}),
    "running": frozenset({"pausing", "paused", "cancelling", "succeeded", "failed"}),
    "pausing": frozenset({"paused", "queued", "running", "cancelling", "succeeded", "failed"}),
    "paused": frozenset({"queued", "cancelled"}),
    "cancelling": frozenset({"cancelled"}),
    "cancelled": frozenset({"queued"}),
    "succeeded": frozenset(),
    "failed": frozenset({"queued"}),
}
"""The state table: which status may follow which. Out of a final one leads only a retry."""

LOOK_EVERY_S = 5.0
"""Fewest seconds between an event about progress and one that says nothing but when the job will have ended."""

PROGRESS_EVERY_S = 1.0
"""At most one `job.progress` event of a job in this time."""

UNFINISHED_PROGRESS = 0.999
"""Most that a job shows before it has succeeded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """What a head map says of the heads of a model, without their scores but for the best."""

    heads: int
    """Query heads of the model."""
    best: Sequence[tuple[int, int, float]]
    """(layer, head, score) of the first few, best first; empty where none is ranked before another."""
    rank_correlation: float | None
    """Of the two half-proxies, over all heads; None likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFacts:
    """What the ledger keeps of a finished step besides its files."""

    accounting: Json = field(default_factory=dict)
    resolved: Json | None = None
    """`validate`: the config without the "auto"s that rows and model decide, and the reasons."""
    learning_rate: float | None = None
    """`train`: the rate that was used; what else the run decides is known by then, so that the resolved config has no "auto"."""
    estimate_s: Mapping[str, float] = field(default_factory=dict)
    """`validate`: estimated seconds per step, all shards together."""
    train: RowCounts | None = None
    """`validate`: the training rows."""
    warnings: tuple[str, ...] = ()
    ranking: Ranking | None = None
    """`heads`: what its head map says."""
    rows: int = 0
    """`select`: training rows."""
    kept: int = 0
    """`select`: rows that were kept."""
    fingerprint: str | None = None
    """Of a step whose outputs a later job may take."""
    reused: Json | None = None
    """Of a step that took an earlier job's outputs: the job that computed them and its seconds (`app.core.reuse`)."""


def open_job(conn: Connection, job: Job, planned: Sequence[NewStep]) -> None:
    """Give a job that was just inserted its steps and its first event."""
    steps.open_steps(conn, job, planned)
    tell_webhooks(conn, job)


# --- what a worker reports -------------------------------------------------------------------------------------------


def begin_step(conn: Connection, lease: Lease) -> Job:
    """The first thing after a claim: the job runs, its stage moves on. Raises LeaseLost.

    A job that was asked to pause in the moment of the claim stays as it is: the worker gives the step back.
    """
    job = _hold(conn, lease)
    if job.pause_requested_at is not None:
        return job
    if job.status == "queued":
        job = jobs.start_job(conn, job.id)
        _tell_status(conn, job)
    stage: Stage = spec_of(lease.step).stage  # type: ignore[assignment]  # a test compares the two lists
    if job.stage is None or STAGES.index(stage) > STAGES.index(job.stage):
        job = jobs.update_job(conn, job.id, stage=stage)
        append_event(conn, job.id, "job.stage", {"stage": stage})
    _tell_attempt(conn, lease, "running")
    return job


def renew(conn: Connection, lease: Lease, *, lease_s: float) -> Pulse:
    """Show a sign of life and hear whether to stop. Raises LeaseLost."""
    return leases.heartbeat(conn, lease, lease_s=lease_s)


def look_ahead(conn: Connection, lease: Lease) -> None:
    """Tell anew when the job will have ended, though its step says nothing: silence is late too. Raises LeaseLost."""
    _tell_progress(conn, _hold(conn, lease), lease, every_s=LOOK_EVERY_S)


def record_progress(conn: Connection, lease: Lease, done: int, total: int, metrics: Mapping[str, float]) -> Pulse:
    """Note how far a step is; hear whether to stop. Raises LeaseLost."""
    job = _hold(conn, lease)
    leases.set_step_progress(conn, lease, min(done / total, 1.0) if total > 0 else 0.0)
    _tell_progress(conn, job, lease, every_s=PROGRESS_EVERY_S)
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSONB has no NaN
    if finite:
        where = {"step": lease.step, "shard": lease.shard, "attempt": lease.token, "done": done, "total": total}
        append_event(conn, job.id, "metric", {**where, "values": finite})
    return leases.pulse(conn, job.id)


def record_checkpoint(conn: Connection, lease: Lease, files: Mapping[str, str], *, name: str = "") -> None:
    """Note the stored files (`name -> sha256`) that the next attempt of this step goes on from. Raises LeaseLost."""
    _hold(conn, lease)
    leases.set_checkpoint(conn, lease, {"name": name, "attempt": lease.token, "files": dict(files)})
    where = {"step": lease.step, "shard": lease.shard, "attempt": lease.token}
    append_event(conn, lease.job_id, "checkpoint", {**where, "name": name, "files": len(files)})


def finish_step(conn: Connection, lease: Lease, files: Sequence[NewArtifact], facts: StepFacts) -> Job:
    """Register a step's files and its end in one go: successors become ready, and after the last step the job succeeds.

    Raises LeaseLost. A job that was asked to stop registers nothing any more.
    """
    job = _hold(conn, lease)
    if job.cancel_requested_at is not None:
        return _cancel_held(conn, job, lease)
    leases.leave(conn, lease, "done", facts=facts.accounting, fingerprint=facts.fingerprint, reused=facts.reused)
    attempts.close_attempt(conn, lease.step_id, lease.token, "done")
    _tell_attempt(conn, lease, "done")
    if facts.reused is not None:
        _tell_reuse(conn, lease, facts.fingerprint, facts.reused)
    for artifact in insert_artifacts(conn, job.id, lease.step_id, files):
        shown = {"id": artifact.id, "name": artifact.name, "sha256": artifact.sha256, "size_bytes": artifact.size_bytes}
        append_event(conn, job.id, "artifact", shown)
        _register(conn, job, lease, artifact, facts)
    job = _apply_plan(conn, job, facts)
    if job.pause_requested_at is None:
        steps.unblock_steps(conn, job.id)
    if steps.count_unfinished(conn, job.id) == 0:
        jobs.update_job(conn, job.id, progress=1.0)
        append_event(conn, job.id, "job.progress", {"progress": 1.0, "stage": job.stage, "eta_at": None})
        return end_job(conn, job, "succeeded")
    _tell_progress(conn, job, lease, every_s=0.0)
    return _paused_if_still(conn, job)


def fail_step(conn: Connection, lease: Lease, error: P2DError) -> Job:
    """End the job with an error that trying again would only repeat. Raises LeaseLost."""
    return fail_step_with(conn, lease, error.to_json())


def fail_step_with(conn: Connection, lease: Lease, error: Json) -> Job:
    """`fail_step` for an error that arrived as JSON from the child."""
    job = _hold(conn, lease)
    if job.cancel_requested_at is not None:
        return _cancel_held(conn, job, lease)
    leases.leave(conn, lease, "failed")
    attempts.close_attempt(conn, lease.step_id, lease.token, "failed", error)
    _tell_attempt(conn, lease, "failed")
    return _fail(conn, job, error)


def overrun_step(conn: Connection, lease: Lease) -> Job:
    """End the job because it has reached one of its limits. Raises LeaseLost."""
    over = _limit_reached(conn, _hold(conn, lease))
    assert over is not None, "no clock goes back"
    return fail_step(conn, lease, over)


def lose_step(conn: Connection, lease: Lease, *, max_crashes: int, reason: P2DError | None = None) -> Job:
    """Charge a crash: the step is tried again, or after `max_crashes` the job fails. Raises LeaseLost.

    Args:    reason: what the job fails with in the end; `job.worker_lost` without one.
    """
    job = _hold(conn, lease)
    if job.cancel_requested_at is not None:
        return _cancel_held(conn, job, lease)
    crashes = leases.leave(conn, lease, _waiting(job), charge_crash=1)
    attempts.close_attempt(conn, lease.step_id, lease.token, "lost", reason.to_json() if reason else None)
    _tell_attempt(conn, lease, "lost")
    if crashes < max_crashes:
        return _paused_if_still(conn, job)
    leases.leave(conn, lease, "failed")
    return _fail(conn, job, (reason or WorkerLost(step=lease.step, crashes=crashes)).to_json())


def release_step(conn: Connection, lease: Lease) -> Job:
    """Give a step back because the worker goes away or the job is to pause; nothing is charged. Raises LeaseLost."""
    job = _hold(conn, lease)
    if job.cancel_requested_at is not None:
        return _cancel_held(conn, job, lease)
    leases.leave(conn, lease, _waiting(job))
    attempts.close_attempt(conn, lease.step_id, lease.token, "released")
    _tell_attempt(conn, lease, "released")
    return _paused_if_still(conn, job)


def cancel_step(conn: Connection, lease: Lease) -> Job:
    """Say that a step has stopped as asked; the last one to stop cancels the job. Raises LeaseLost."""
    return _cancel_held(conn, _hold(conn, lease), lease)


# --- what time brings ------------------------------------------------------------------------------------------------


def expire_step(conn: Connection, lease: Lease, *, max_crashes: int) -> None:
    """Take a step from a worker that has been silent for too long, unless it came back just now."""
    job = jobs.lock_job(conn, lease.job_id)
    leases.fence(conn, lease)
    if not leases.is_expired(conn, lease):
        return
    assert job is not None, "a step without a job"
    if not job.is_final:
        lose_step(conn, lease, max_crashes=max_crashes)
        return
    # Claimed in the very moment in which the job ended: nobody worked on it.
    leases.leave(conn, lease, "cancelled")
    attempts.close_attempt(conn, lease.step_id, lease.token, "cancelled")


def settle_job(conn: Connection, job_id: str) -> None:
    """End a job that no worker will end: asked to stop with nobody on it, or out of time."""
    job = jobs.lock_job(conn, job_id)
    if job is None or job.is_final:
        return
    if job.cancel_requested_at is not None:
        if steps.count_running(conn, job_id) == 0:
            steps.stop_waiting_steps(conn, job_id)
            end_job(conn, job, "cancelled")
    elif (over := _limit_reached(conn, job)) is not None:
        _fail(conn, job, over.to_json())


# --- inside ----------------------------------------------------------------------------------------------------------


def _hold(conn: Connection, lease: Lease) -> Job:
    """Lock job and step, in this order, and make sure that the step is still this attempt's."""
    job = jobs.lock_job(conn, lease.job_id)
    if job is None or job.is_final:
        raise LeaseLost(step_id=lease.step_id, token=lease.token)
    leases.fence(conn, lease)
    return job


def _limit_reached(conn: Connection, job: Job) -> LimitReached | None:
    limit = leases.pulse(conn, job.id).limit_reached
    if limit is None:
        return None
    if limit == "deadline":
        assert job.deadline_at is not None
        return LimitReached(limit=limit, value=job.deadline_at.isoformat())
    return LimitReached(limit=limit, value=getattr(job, limit))


def _waiting(job: Job) -> Literal["ready", "blocked"]:
    """What a step becomes that is given back: a job that pauses leaves nothing to claim."""
    return "ready" if job.pause_requested_at is None else "blocked"


def _paused_if_still(conn: Connection, job: Job) -> Job:
    """A job that was asked to pause is paused once nobody works on it any more."""
    if job.pause_requested_at is None or steps.count_running(conn, job.id) > 0:
        return job
    return set_status(conn, job, "paused")


# --- for app.core.moves ----------------------------------------------------------------------------------------------


def set_status(conn: Connection, job: Job, status: Status, error: Json | None = None) -> Job:
    """Move a locked job along NEXT, say so in its log, and tell the webhooks of its project."""
    assert status in NEXT[job.status], f"{job.status} -> {status}"
    if status in jobs.FINAL:
        job = jobs.finish_job(conn, job.id, status, error=error)
    elif status == "paused":
        job = jobs.pause_job(conn, job.id)
    else:
        job = jobs.update_job(conn, job.id, status=status)
    _tell_status(conn, job)
    return job


def end_job(conn: Connection, job: Job, status: Status, error: Json | None = None) -> Job:
    """Give a locked job its final status, and its log the event `end`."""
    if status == "cancelled" and job.status == "running":
        job = set_status(conn, job, "cancelling")
    job = set_status(conn, job, status, error)
    if job.artifact_ttl is not None:
        expire_artifacts(conn, job.id, job.artifact_ttl)
    append_event(conn, job.id, "end", {"status": status})
    return job


def _fail(conn: Connection, job: Job, error: Json) -> Job:
    """End the job now; whoever still works on another shard of it loses the lease and stops."""
    steps.stop_waiting_steps(conn, job.id)
    steps.revoke_running_steps(conn, job.id)
    attempts.close_attempts_of_job(conn, job.id, "cancelled")
    return end_job(conn, job, "failed", error)


def _cancel_held(conn: Connection, job: Job, lease: Lease) -> Job:
    leases.leave(conn, lease, "cancelled")
    attempts.close_attempt(conn, lease.step_id, lease.token, "cancelled")
    _tell_attempt(conn, lease, "cancelled")
    steps.stop_waiting_steps(conn, job.id)
    if steps.count_running(conn, job.id) == 0:
        return end_job(conn, job, "cancelled")
    return job


def _register(conn: Connection, job: Job, lease: Lease, artifact: Artifact, facts: StepFacts) -> None:
    """Make a head map or selection known under an id of its own, so that a later job can name it, and tell of it."""
    config = (job.resolved or {}).get("config", job.config)
    if (lease.step, artifact.name) == ("heads", "head_map.json"):
        head_map_id = insert_head_map(
            conn,
            project_id=job.project_id,
            job_id=job.id,
            artifact_id=artifact.id,
            base_model=job.base_model,
            model_digest=job.model_digest,
            dataset_id=job.dataset_id,
            scorer=config["heads"]["scorer"],
        )
        _tell_ranking(conn, job, head_map_id, config["heads"], facts.ranking)
    elif (lease.step, artifact.name) == ("select", "selection.jsonl"):
        selection_id = insert_selection(
            conn,
            project_id=job.project_id,
            job_id=job.id,
            artifact_id=artifact.id,
            base_model=job.base_model,
            model_digest=job.model_digest,
            dataset_id=job.dataset_id,
            validation_dataset_id=job.validation_dataset_id,
            scorer=config["data"]["scorer"],
            rows=facts.rows,
            kept=facts.kept,
        )
        scored = {"selection": selection_id, "scorer": config["data"]["scorer"], "rows": facts.rows, "kept": facts.kept}
        append_event(conn, job.id, "examples.scored", scored)


def _settled(resolved: Json, facts: StepFacts) -> Json:
    config, reasons = settled(
        config_from_json(resolved["config"]),
        resolved["reasons"],
        kept=facts.kept or None,
        rows=facts.rows,
        learning_rate=facts.learning_rate,
    )
    return {**resolved, "config": config_json(config), "reasons": reasons}


def _apply_plan(conn: Connection, job: Job, facts: StepFacts) -> Job:
    for warning in facts.warnings:
        append_event(conn, job.id, "warning", {"message": warning})
    if facts.resolved is not None:
        job = jobs.update_job(conn, job.id, resolved=facts.resolved)
    if job.resolved is not None and (facts.kept or facts.learning_rate is not None):
        resolved = _settled(job.resolved, facts)
        if resolved != job.resolved:
            job = jobs.update_job(conn, job.id, resolved=resolved)
    if facts.estimate_s:
        steps.set_weights(conn, job.id, facts.estimate_s)
        estimate = estimate_json(facts.estimate_s, past_errors(conn), facts.train)
        job = jobs.update_job(conn, job.id, estimate=estimate)
        append_event(conn, job.id, "estimate", estimate)
    return job


def _tell_status(conn: Connection, job: Job) -> None:
    append_event(conn, job.id, "job.status", {"status": job.status} | ({"error": job.error} if job.error else {}))
    tell_webhooks(conn, job)


def _tell_reuse(conn: Connection, lease: Lease, fingerprint: str | None, reused: Json) -> None:
    where = {"step": lease.step, "shard": lease.shard, "shards": lease.shards}
    saved = {"job_id": reused["job_id"], "seconds_saved": reused["seconds"]}
    append_event(conn, lease.job_id, "cache.hit", {**where, "fingerprint": fingerprint, **saved})


def _tell_ranking(conn: Connection, job: Job, head_map_id: str, heads: Json, ranking: Ranking | None) -> None:
    data: Json = {"head_map": head_map_id, "scorer": heads["scorer"]}
    if ranking is not None:
        best = [{"layer": layer, "head": head, "score": score} for layer, head, score in ranking.best]
        kept = top_count(heads["ratio"], ranking.heads)
        data |= {"heads": ranking.heads, "kept": kept, "best": best, "rank_correlation": ranking.rank_correlation}
    append_event(conn, job.id, "heads.ranked", data)


def _tell_attempt(conn: Connection, lease: Lease, outcome: attempts.Outcome) -> None:
    data = {
        "step": lease.step,
        "shard": lease.shard,
        "shards": lease.shards,
        "attempt": lease.token,
        "outcome": outcome,
    }
    append_event(conn, lease.job_id, "attempt", data)


def _tell_progress(conn: Connection, job: Job, lease: Lease, *, every_s: float) -> None:
    work = steps.work_of(conn, job.id)
    left = time_left(work, job.estimate) if job.estimate else None
    left_s = None if left is None else (left.p10, left.p50, left.p90)
    if not jobs.note_progress(conn, job.id, min(share_done(work, job.estimate), UNFINISHED_PROGRESS), left_s, every_s):
        return
    now = jobs.get_job(conn, job.id)
    assert now is not None
    shown = {"progress": now.progress, "stage": now.stage, "step": lease.step, "shard": lease.shard}
    for name in ("eta_at", "eta_p10_at", "eta_p90_at"):
        at = getattr(now, name)
        shown[name] = at.isoformat() if at else None
    append_event(conn, job.id, "job.progress", shown)
