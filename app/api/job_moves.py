"""What a user may do to a job that is there: cancel, pause, resume, retry, rename, delete.

When which is allowed is app.core.moves' business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from app.access_errors import TooManyJobs
from app.api.bodies import Received, read_json, receive_json
from app.api.context import Context, IdempotencyKey, JobId, Services
from app.api.documentation import PATCH_BODY, errors
from app.api.etags import IfMatch, require_match, send_view
from app.api.idempotency import Once
from app.api.job_views import view_of
from app.api.patches import merge_patch
from app.api.receipts import receipt
from app.core.moves import delete, lock_to_retry, request_cancel, request_pause, request_resume, request_retry
from app.db.audit import Action
from app.db.engine import Connection
from app.db.jobs import Job, find_job, update_job
from app.db.steps import set_priority
from app.errors import (
    ArtifactNotFound,
    DatasetNotFound,
    HeadMapNotFound,
    IdempotencyInFlight,
    JobAlreadyFinal,
    JobInUse,
    JobNotFound,
    MoveNotAllowed,
    SelectionNotFound,
)
from app.key_schemas import ReceiptView
from app.problems import invalid
from app.result_errors import ArtifactExpired, DeadlinePassed, NotABaseModel, ResultsGone
from app.schemas import MAX_METADATA, JobPatch
from app.views import JobView
from p2d.errors import ErrorDetail

router = APIRouter(tags=["jobs"])

Asked = Literal["cancel", "pause", "resume", "retry"]
_ACTIONS: dict[Asked, Action] = {
    "cancel": "job.cancel",
    "pause": "job.pause",
    "resume": "job.resume",
    "retry": "job.retry",
}

_BEFORE: dict[int | str, dict[str, Any]] = {
    200: {"model": JobView, "description": "It was asked for before: nothing changed."}
}
_CANCEL_ERRORS = {**_BEFORE, **errors(JobNotFound, JobAlreadyFinal, IdempotencyInFlight)}
_MOVE_ERRORS = {**_BEFORE, **errors(JobNotFound, MoveNotAllowed, IdempotencyInFlight)}


@router.post("/jobs/{id}/cancel", status_code=202, response_model=JobView, responses=_CANCEL_ERRORS)
def cancel_job(job_id: JobId, services: Context, key: IdempotencyKey) -> Response:
    """Ask a job to stop. Asked again it answers 200 and changes nothing; a job that ended otherwise answers 409."""
    return _move(services, job_id, "cancel", key, request_cancel)


@router.post("/jobs/{id}/pause", status_code=202, response_model=JobView, responses=_MOVE_ERRORS)
def pause_job(job_id: JobId, services: Context, key: IdempotencyKey) -> Response:
    """Ask a job to stand still: `paused` once its running steps have stopped, from where it later goes on bit-exactly.

    Repeating is harmless. A paused job keeps no worker, and its `limits.max_seconds` do not run down.
    """
    return _move(services, job_id, "pause", key, request_pause)


@router.post("/jobs/{id}/resume", status_code=202, response_model=JobView, responses=_MOVE_ERRORS)
def resume_job(job_id: JobId, services: Context, key: IdempotencyKey) -> Response:
    """Let a paused job go on: it is `queued` and then `running`. Repeating is harmless."""
    return _move(services, job_id, "resume", key, request_resume)


@router.post(
    "/jobs/{id}/retry",
    status_code=202,
    response_model=JobView,
    responses=errors(
        *(JobNotFound, MoveNotAllowed, DeadlinePassed, IdempotencyInFlight, TooManyJobs),
        *(
            DatasetNotFound,
            HeadMapNotFound,
            SelectionNotFound,
            ArtifactNotFound,
            ArtifactExpired,
            NotABaseModel,
            ResultsGone,
        ),
    ),
)
def retry_job(job_id: JobId, services: Context, key: IdempotencyKey) -> Response:
    """Queue a job again that failed or was cancelled: finished steps and their files are kept, the others start again.

    Training goes on from its last checkpoint. Its `limits.max_seconds` count anew, its `limits.deadline` stays what it was. The
    earlier error stays in the job's events and attempts.
    """

    def retry(conn: Connection, job_id: str) -> Job:
        services.jobs.allow(conn, services.known_caller.project_id)
        return request_retry(conn, job_id)

    return _move(services, job_id, "retry", key, retry, lock=lock_to_retry)


@router.patch(
    "/jobs/{id}",
    response_model=JobView,
    responses=errors(JobNotFound),
    openapi_extra=PATCH_BODY,
)
async def patch_job(request: Request, job_id: JobId, services: Context, if_match: IfMatch = None) -> Response:
    """Change a job's name, metadata and priority, in any status; with If-Match only if the job is still as it was read."""
    body = await receive_json(request, services.settings)
    return await run_in_threadpool(_patch, services, job_id, read_json(JobPatch, body), if_match)


@router.delete("/jobs/{id}", responses=errors(JobNotFound, MoveNotAllowed, JobInUse))
def delete_job(job_id: JobId, services: Context, if_match: IfMatch = None) -> ReceiptView:
    """Delete a job that has ended, with its events, artifacts, head map and selection. Its datasets stay.

    With If-Match only if the job is still as it was read. Its files leave the store within the hours of
    `P2D_UNREFERENCED_KEPT_H`, but for those that others have too.
    """
    with services.engine.begin() as conn:
        require_match(if_match, lambda: view_of(conn, find_job(conn, job_id, lock=True)))
        return receipt(services, conn, "job", job_id, delete(conn, job_id))


def _patch(services: Services, job_id: str, patch: JobPatch, if_match: str | None) -> Response:
    with services.engine.begin() as conn:
        job = find_job(conn, job_id, lock=True)
        require_match(if_match, lambda: view_of(conn, job))
        now = {"name": job.name, "metadata": job.metadata, "priority": job.priority}
        asked = merge_patch(now, patch.model_dump(exclude_unset=True))
        metadata = asked.get("metadata", {})
        if len(metadata) > MAX_METADATA:
            text = f"With this there would be {len(metadata)} pairs; {MAX_METADATA} are the most."
            raise invalid([ErrorDetail(code="field.too_long", message=text, pointer="/metadata")])
        priority = asked.get("priority", 0)
        set_priority(conn, job_id, priority)
        job = update_job(conn, job_id, name=asked.get("name", ""), metadata=metadata, priority=priority)
        services.note(conn, "job.update", job_id, {"fields": sorted(patch.model_fields_set)})
        view = view_of(conn, job)
    return send_view(view)


def _lock(conn: Connection, job_id: str) -> Job:
    return find_job(conn, job_id, lock=True)


def _move(
    services: Services,
    job_id: str,
    move: Asked,
    key: str | None,
    request: Callable[[Connection, str], Job],
    *,
    lock: Callable[[Connection, str], Job] = _lock,
) -> Response:
    once = Once.of(f"POST /jobs/{job_id}/{move}", key, None, Received())
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        before = lock(conn, job_id)
        job = request(conn, job_id)
        status_code = 200 if job == before else 202
        if job != before:
            services.note(conn, _ACTIONS[move], job_id)
        view = view_of(conn, job).model_dump(mode="json")
        once.keep(conn, status_code, {}, view)
    services.waker.wake(job.queue)  # a hint only: the row already says it, and every worker polls
    return JSONResponse(view, status_code=status_code)
