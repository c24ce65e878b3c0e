"""Jobs: create, clone, list. What a job may ask for and do is app.core's business; how it runs is the workers'."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import JsonValue

from app.access_errors import StorageFull, TooManyJobs
from app.api.bodies import Received, read_json, receive, receive_json
from app.api.context import Context, Cursor, IdempotencyKey, JobId, Limit, Link, Services, page_after, page_of
from app.api.datasets import note_dataset
from app.api.documentation import CLONE_BODY, JOB_BODY, errors
from app.api.estimates import answer_estimate
from app.api.idempotency import Once
from app.api.job_filters import METADATA_QUERY, Wanted
from app.api.job_requests import FILES, REFUSALS, inspect_job, parse_job
from app.api.job_views import new_view, summary_of
from app.api.patches import merge_patch
from app.api.reports import reporting
from app.blobs import Blob
from app.core.bases import is_artifact
from app.core.ingest import Candidate, record, store
from app.core.submit import JobRequest, submit
from app.db.datasets import Dataset
from app.db.engine import Connection
from app.db.jobs import find_job, list_jobs
from app.errors import IdempotencyInFlight, IdempotencyMismatch, JobNotFound
from app.estimate_schemas import EstimateView
from app.job_bodies import AskedJob
from app.schemas import Body
from app.views import JobSummary, JobView, Page
from p2d.config import Kind

router = APIRouter(tags=["jobs"])

POLL_AFTER_S = 2

_MORE = (IdempotencyInFlight, IdempotencyMismatch, StorageFull, TooManyJobs)
_ESTIMATE: dict[int | str, dict[str, Any]] = {200: {"model": EstimateView, "description": "With `dry_run`."}}
_CREATE_ERRORS = {**_ESTIMATE, **errors(*REFUSALS, *_MORE)}
_CLONE_ERRORS = errors(JobNotFound, *REFUSALS, *_MORE)


@router.post("/jobs", status_code=202, response_model=JobView, responses=_CREATE_ERRORS, openapi_extra=JOB_BODY)
async def create_job(
    request: Request,
    services: Context,
    key: IdempotencyKey,
    dry_run: Annotated[bool, Query(description="Make and store nothing: answer as POST /estimates does.")] = False,
) -> Response:
    """Queue a job: JSON that names or holds a dataset, or multipart with its file and the same JSON as the part `job`.

    Refused before any model is loaded, with all faults listed.
    """
    async with receive(request, services.settings, files=FILES, json_part="job", json=True) as received:
        if dry_run:
            return await run_in_threadpool(answer_estimate, services, received)
        return await run_in_threadpool(_create, services, received, key)


@router.get("/jobs", openapi_extra=METADATA_QUERY)
def get_jobs(
    services: Context, link: Link, wanted: Wanted, limit: Limit = 20, cursor: Cursor = None
) -> Page[JobSummary]:
    """Jobs, newest first: all, or those that every filter lets through."""
    after = page_after(cursor)
    with services.engine.connect() as conn:
        jobs = list_jobs(conn, limit=limit + 1, after=after, wanted=wanted)
    summaries = [summary_of(job) for job in jobs]
    return link(Page[JobSummary].model_validate(page_of(summaries, [job.id for job in jobs], limit)))


@router.post(
    "/jobs/{id}/clone",
    status_code=202,
    response_model=JobView,
    responses=_CLONE_ERRORS,
    openapi_extra=CLONE_BODY,
)
async def clone_job(request: Request, job_id: JobId, services: Context, key: IdempotencyKey) -> Response:
    """Queue a new job from the request of another one, changed by a JSON merge patch: null means the default.

    Checked as POST /jobs checks it; the base model is the one that is installed under its name now.
    """
    patch = await receive_json(request, services.settings)
    return await run_in_threadpool(_clone, services, job_id, patch, key)


# --- creating --------------------------------------------------------------------------------------------------------


def _create(services: Services, received: Received, key: str | None) -> Response:
    asked = parse_job(received)
    return queue_job(services, asked, received, _once("POST /jobs", key, asked, received))


def _once(route: str, key: str | None, asked: AskedJob, received: Received) -> Once:
    # Of a job with faults only a part was read: that may be all of another one, whose answer is not its answer.
    return Once.of(route, None if asked.faults else key, asked.body.model_dump(mode="json"), received)


def _clone(services: Services, job_id: str, body: bytes, key: str | None) -> Response:
    patch = read_json(dict[str, JsonValue], body or b"{}")
    once = Once.of(f"POST /jobs/{job_id}/clone", key, patch, Received())
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    with services.engine.connect() as conn:
        job = find_job(conn, job_id)
    inputs = {"base_model": job.base_model, "dataset": job.dataset_id, "validation_dataset": job.validation_dataset_id}
    own = {name: getattr(job, name) for name in ("name", "metadata", "priority", "artifact_ttl", "webhooks")}
    asked = {**job.config, **inputs, **own}
    received = Received(json=json.dumps(merge_patch(asked, patch)).encode())
    return queue_job(services, parse_job(received), received, once)


def queue_stage(
    services: Services, received: Received, key: str | None, *, shape: type[Body], kind: Kind, path: str
) -> Response:
    """Queue a job of the first stages alone, asked for at a path of its own with a body of `shape`; as `queue_job`."""
    asked = parse_job(received, shape, kind=kind)
    return queue_job(services, asked, received, _once(f"POST {path}", key, asked, received))


def queue_job(services: Services, asked: AskedJob, received: Received, once: Once) -> Response:
    """Check the job, store the files that came with it, and queue it: 202, or the answer of an earlier twin."""
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    with ExitStack() as stack, reporting(services) as refused:
        inspected = inspect_job(services, asked, received, stack, refused)
        if (
            inspected.candidates or refused
        ):  # before anything is stored, so that a refused job leaves nothing but a report
            with services.engine.connect() as conn:
                inspected.check(conn)
        blobs = {name: store(services.blobs, candidate) for name, candidate in inspected.candidates.items()}
    body = asked.body
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        checked = inspected.check(conn, keep=True)
        services.jobs.allow(conn, services.known_caller.project_id)
        made = {name: _record(services, conn, found, blobs[name]) for name, found in inspected.candidates.items()}
        datasets = {**checked.stored, **made}
        request = JobRequest(
            config=body.config(),
            model=checked.model,
            dataset=datasets["dataset"],
            validation_dataset=datasets.get("validation_dataset"),
            name=body.name,
            metadata=body.metadata,
            priority=body.priority,
            artifact_ttl=body.artifact_ttl,
            webhooks=body.webhooks,
            base_artifact_id=body.base_model if is_artifact(body.base_model) else None,
        )
        job = submit(conn, request, shard_rows=services.settings.shard_rows, queue=services.settings.worker_queue)
        services.note(conn, "job.create", job.id, {"kind": job.kind, "dataset_id": job.dataset_id})
        view = new_view(job).model_dump(mode="json")
        headers = {"Location": f"/jobs/{job.id}", "Retry-After": str(POLL_AFTER_S)}
        once.keep(conn, 202, headers, view)
    services.waker.wake(job.queue)  # after the commit, and only a hint
    return JSONResponse(view, status_code=202, headers=headers)


def _record(services: Services, conn: Connection, candidate: Candidate, blob: Blob) -> Dataset:
    dataset, new = record(conn, candidate, blob, services.settings)
    if new:
        note_dataset(services, conn, dataset)
    return dataset
