"""What a user may ask of a job, by its status: cancel, pause, resume, retry, delete. What then happens is app.core.lifecycle's.

Each function takes a Connection, locks the job first and never commits. Repeating a move (but retry) is harmless: it
answers with the job as it is. A move that the status forbids raises MoveNotAllowed with those that it allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from app.core.lifecycle import end_job, set_status
from app.core.submit import find_inputs, hold_makers
from app.db import attempts, jobs, measures, steps
from app.db.artifacts import expire_artifacts, gone_names, list_artifacts
from app.db.engine import Connection
from app.db.jobs import Job, Status
from app.errors import JobAlreadyFinal, JobInUse, MoveNotAllowed
from app.result_errors import DeadlinePassed, ResultsGone

Move = Literal["pause", "resume", "cancel", "retry", "delete"]

MOVES: Mapping[Status, tuple[Move, ...]] = {
    "queued": ("pause", "cancel"),
    "running": ("pause", "cancel"),
    "pausing": ("resume", "cancel"),
    "paused": ("resume", "cancel"),
    "cancelling": (),
    "cancelled": ("retry", "delete"),
    "succeeded": ("delete",),
    "failed": ("retry", "delete"),
}
"""The moves that change something in each status."""


def request_cancel(conn: Connection, job_id: str) -> Job:
    """Ask a job to stop. Raises JobNotFound, JobAlreadyFinal."""
    job = jobs.find_job(conn, job_id, lock=True)
    if job.status == "cancelled":
        return job
    if job.is_final:
        raise JobAlreadyFinal(job_id=job_id, status=job.status, allowed=MOVES[job.status])
    job = jobs.note_cancel(conn, job_id)
    steps.stop_waiting_steps(conn, job_id)
    if steps.count_running(conn, job_id) == 0:
        return end_job(conn, job, "cancelled")
    return job if job.status == "cancelling" else set_status(conn, job, "cancelling")


def request_pause(conn: Connection, job_id: str) -> Job:
    """Ask a job to stand still: at once if nobody works on it, else when the last running step has stopped.

    Raises: JobNotFound, MoveNotAllowed.
    """
    job = jobs.find_job(conn, job_id, lock=True)
    if job.status in ("pausing", "paused"):
        return job
    _allow(job, "pause")
    job = jobs.note_pause(conn, job_id)
    steps.hold_waiting_steps(conn, job_id)
    return set_status(conn, job, "pausing" if steps.count_running(conn, job_id) else "paused")


def request_resume(conn: Connection, job_id: str) -> Job:
    """Let a job go on; one that still pauses forgets that it was asked to. Raises JobNotFound, MoveNotAllowed."""
    job = jobs.find_job(conn, job_id, lock=True)
    if job.status in ("queued", "running"):
        return job
    _allow(job, "resume")
    job = jobs.update_job(conn, job_id, pause_requested_at=None)
    steps.unblock_steps(conn, job_id)
    # A job whose clock stands still must be queued: the next claim starts the clock.
    runs = job.status == "pausing" and job.started_at is not None and job.paused_at is None
    return set_status(conn, job, "running" if runs else "queued")


def lock_to_retry(conn: Connection, job_id: str) -> Job:
    """The job, locked as `request_retry` does: to call before the project is locked. Raises JobNotFound."""
    hold_makers(conn, jobs.find_job(conn, job_id))
    return jobs.find_job(conn, job_id, lock=True)


def request_retry(conn: Connection, job_id: str) -> Job:
    """Queue a job again that failed or was cancelled: what is done stays done, the rest starts again, its time anew.

    Raises: JobNotFound, MoveNotAllowed, DeadlinePassed; DatasetNotFound, HeadMapNotFound, SelectionNotFound (of
            an export ArtifactNotFound or ArtifactExpired) for inputs deleted since; ResultsGone for files of finished steps.
    """
    job = lock_to_retry(conn, job_id)
    _allow(job, "retry")
    if job.deadline_at is not None and jobs.seconds_until(conn, job.deadline_at) < 0:
        raise DeadlinePassed(job_id=job_id, deadline=job.deadline_at.isoformat())
    find_inputs(conn, job)
    if gone := gone_names(conn, job_id):
        raise ResultsGone(job_id=job_id, names=gone)
    expire_artifacts(conn, job_id, None)  # until it ends again
    steps.restart_steps(conn, job_id)  # first: it waits for a claim that is under way, whose attempt is then seen
    attempts.close_attempts_of_job(conn, job_id, "cancelled")
    steps.unblock_steps(conn, job_id)
    return set_status(conn, jobs.reopen_job(conn, job_id), "queued")


def delete(conn: Connection, job_id: str) -> list[str]:
    """Remove a job that has ended, with its steps, events, artifacts, head map and selection.

    Returns the sha256 of every stored file that it had. Nothing else is deleted in the transaction.

    Raises: JobNotFound, MoveNotAllowed, JobInUse.
    """
    return delete_all(conn, [job_id])[0]


def delete_all(conn: Connection, job_ids: Sequence[str]) -> list[list[str]]:
    """`delete` of several jobs, one after another: of each the sha256 of every stored file that it had; raises the same."""
    counted: list[measures.Tally] = []
    hashes = [_delete(conn, job_id, counted) for job_id in job_ids]
    measures.keep_tallies(conn, counted)
    return hashes


def _delete(conn: Connection, job_id: str, counted: list[measures.Tally]) -> list[str]:
    job = jobs.find_job(conn, job_id, lock=True)
    _allow(job, "delete")
    if by := jobs.readers_of(conn, job_id):
        raise JobInUse(job_id=job_id, by=by)
    hashes = [artifact.sha256 for artifact in list_artifacts(conn, job_id)]
    for step in steps.list_steps(conn, job_id):
        hashes += (step.checkpoint or {"files": {}})["files"].values()
    counted += measures.tallies_of(conn, job_id)
    jobs.delete_job(conn, job_id)
    return hashes


def _allow(job: Job, move: Move) -> None:
    if move not in MOVES[job.status]:
        raise MoveNotAllowed(job_id=job.id, status=job.status, move=move, allowed=MOVES[job.status])
