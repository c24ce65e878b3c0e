"""Jobs: create, clone, list. What a job may ask for and do is app.core's business; how it runs is the workers'."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import JsonValue

from app.access_errors import StorageFull, TooManyJobs
from app.api.bodies import Received, read_json, receive, receive_json
from app.api.context import Context, Cursor, IdempotencyKey, JobId, Limit, Services, page_after, page_of
from app.api.datasets import note_dataset
from app.api.documentation import CLONE_BODY, JOB_BODY, errors
from app.api.idempotency import Once
from app.api.job_views import summary_of, view_of
from app.api.patches import merge_patch
from app.blobs import Blob
from app.core.ingest import Candidate, inspect, record, store
from app.core.quotas import allow_job
from app.core.submit import Content, JobRequest, find_dataset, refusals, submit
from app.db.engine import Connection
from app.db.jobs import Job, find_job, list_jobs, update_job
from app.errors import (
    HeadMapMismatch,
    HeadMapNotFound,
    IdempotencyInFlight,
    IdempotencyMismatch,
    JobNotFound,
    RequestError,
    RequestInvalid,
    RequestTooLarge,
    SelectionMismatch,
    SelectionNotFound,
    UnsupportedMediaType,
)
from app.problems import invalid
from app.schemas import JobBody, JobSummary, JobView, Page, Status
from p2d.columns import mapped
from p2d.config import Kind, check, config_json, resolve
from p2d.errors import (
    ConfigError,
    DatasetEmpty,
    DatasetError,
    DatasetTooLarge,
    DatasetTooSmall,
    ErrorDetail,
    MappingInvalid,
    ModelError,
    ModelNotFound,
    ModelUnsupported,
    P2DError,
)
from p2d.model_info import ModelInfo, find_model, read_model_info
from p2d.plans import held_out_count
from p2d.versions import versions
from p2d.wording import counted

router = APIRouter(tags=["jobs"])

FILES = ("dataset", "validation_dataset")
POLL_AFTER_S = 2

_REFUSALS: tuple[type[P2DError], ...] = (
    *(RequestError, RequestInvalid, RequestTooLarge, UnsupportedMediaType, IdempotencyInFlight, IdempotencyMismatch),
    *(ConfigError, DatasetError, DatasetEmpty, DatasetTooSmall, DatasetTooLarge, MappingInvalid),
    *(ModelError, ModelNotFound, ModelUnsupported),
    *(HeadMapNotFound, HeadMapMismatch, SelectionNotFound, SelectionMismatch),
    *(StorageFull, TooManyJobs),
)
_CREATE_ERRORS, _CLONE_ERRORS = errors(*_REFUSALS), errors(JobNotFound, *_REFUSALS)


@router.post("/jobs", status_code=202, response_model=JobView, responses=_CREATE_ERRORS, openapi_extra=JOB_BODY)
async def create_job(request: Request, services: Context, key: IdempotencyKey) -> Response:
    """Queue a job: JSON that names a dataset, or multipart with the dataset's file and the same JSON as the part `job`.

    Refused before any model is loaded, with all faults listed.
    """
    async with receive(request, services.settings, files=FILES, json_part="job", json=True) as received:
        return await run_in_threadpool(_create, services, received, key)


@router.get("/jobs")
def get_jobs(
    services: Context,
    limit: Limit = 20,
    cursor: Cursor = None,
    status: Annotated[Status | None, Query(description="Only jobs in this status.")] = None,
    kind: Annotated[Kind | None, Query(description="Only jobs of this kind.")] = None,
) -> Page[JobSummary]:
    """All jobs, newest first."""
    before = page_after(cursor)
    with services.engine.connect() as conn:
        jobs = list_jobs(conn, limit=limit + 1, before=before, status=status, kind=kind)
    summaries = [summary_of(job) for job in jobs]
    return Page[JobSummary].model_validate(page_of(summaries, [job.id for job in jobs], limit))


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
    body = _parse(received)
    return _queue(services, body, received, Once.of("POST /jobs", key, body.model_dump(mode="json"), received))


def _clone(services: Services, job_id: str, body: bytes, key: str | None) -> Response:
    patch = read_json(dict[str, JsonValue], body or b"{}")
    once = Once.of(f"POST /jobs/{job_id}/clone", key, patch, Received())
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    with services.engine.connect() as conn:
        job = find_job(conn, job_id)
    inputs = {"base_model": job.base_model, "dataset": job.dataset_id, "validation_dataset": job.validation_dataset_id}
    asked = {**job.config, **inputs, "name": job.name, "metadata": job.metadata, "priority": job.priority}
    received = Received(json=json.dumps(merge_patch(asked, patch)).encode())
    return _queue(services, _parse(received), received, once)


def _queue(services: Services, body: JobBody, received: Received, once: Once) -> Response:
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    model, candidates = _inspect(services, body, received)
    blobs = {name: store(services.blobs, candidate) for name, candidate in candidates.items()}
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        allow_job(conn, services.settings)
        ids = {name: _record(services, conn, candidate, blobs[name]) for name, candidate in candidates.items()}
        dataset_id = ids.get("dataset", body.dataset)
        assert dataset_id is not None
        request = JobRequest(
            config=body.config(),
            model=model,
            dataset_id=dataset_id,
            validation_dataset_id=ids.get("validation_dataset", body.validation_dataset),
            name=body.name,
            metadata=body.metadata,
            priority=body.priority,
        )
        job = submit(conn, request, shard_rows=services.settings.shard_rows, queue=services.settings.worker_queue)
        job = _resolve(conn, job, request)
        services.note(conn, "job.create", job.id, {"kind": job.kind, "dataset_id": job.dataset_id})
        view = view_of(conn, job).model_dump(mode="json")
        headers = {"Location": f"/jobs/{job.id}", "Retry-After": str(POLL_AFTER_S)}
        once.keep(conn, 202, headers, view)
    services.waker.wake(job.queue)  # after the commit, and only a hint
    return JSONResponse(view, status_code=202, headers=headers)


def _record(services: Services, conn: Connection, candidate: Candidate, blob: Blob) -> str:
    dataset, new = record(conn, candidate, blob, services.settings)
    if new:
        note_dataset(services, conn, dataset)
    return dataset.id


def _parse(received: Received) -> JobBody:
    if received.json is None:
        text = "The part 'job' with the job's JSON is missing."
        raise RequestInvalid(text, errors=[ErrorDetail(code="field.missing", message=text, pointer="/job")])
    body = read_json(JobBody, received.json)
    faults = []
    for name in FILES:
        named, sent = getattr(body, name) is not None, name in received.files
        if named and sent:
            faults.append(
                ErrorDetail(code="field.given_twice", message="Given as an id and as a file.", pointer=f"/{name}")
            )
        if name == "dataset" and not (named or sent):
            faults.append(
                ErrorDetail(code="field.missing", message="Give a dataset's id, or send its file.", pointer="/dataset")
            )
    if body.mapping and not received.files:
        text = "A mapping is for files that are sent along; a stored dataset was read already."
        faults.append(ErrorDetail(code="field.without_file", message=text, pointer="/mapping"))
    if faults:
        raise invalid(faults)
    return body


def _inspect(services: Services, body: JobBody, received: Received) -> tuple[ModelInfo, dict[str, Candidate]]:
    """Check everything that can be checked without a model's weights, and raise all that is wrong at once."""
    faults, config, settings = _Faults(), body.config(), services.settings
    faults.catch(lambda: check(config))
    model = faults.catch(lambda: _model(services, body))
    contents: dict[str, Content | None] = {}
    candidates: dict[str, Candidate] = {}
    if (columns := faults.catch(lambda: mapped(body.mapping))) is not None:
        for name, file in received.files.items():
            found = faults.catch(partial(inspect, file.path, file.name, settings, columns, pointer=f"/{name}"))
            contents[name] = found
            if found is not None:
                candidates[name] = found
    with services.engine.connect() as conn:
        for name in FILES:
            if (dataset_id := getattr(body, name)) is not None:
                contents[name] = faults.catch(lambda name=name, id=dataset_id: find_dataset(conn, id, f"/{name}"))  # type: ignore[misc]
        dataset = contents.get("dataset")
        if model is not None and dataset is not None:
            faults.add(*refusals(conn, config, model, dataset, contents.get("validation_dataset")))
    faults.raise_all()
    assert model is not None
    return model, candidates


def _model(services: Services, body: JobBody) -> ModelInfo:
    info = read_model_info(find_model(services.settings.models_dir, body.base_model))
    if body.revision is not None and body.revision != info.digest:
        text = f"The model {info.name!r} has another digest: {info.digest}."
        raise ModelNotFound(text, errors=[ErrorDetail(code=ModelNotFound.code, message=text, pointer="/revision")])
    return info


Found = TypeVar("Found")


class _Faults:
    """Collects errors, so that a user mends all of them at once."""

    def __init__(self) -> None:
        self._errors: list[P2DError] = []

    def catch(self, find: Callable[[], Found]) -> Found | None:
        try:
            return find()
        except P2DError as error:
            if error.fault != "user":
                raise
            self.add(error)
            return None

    def add(self, *errors: P2DError) -> None:
        self._errors += errors

    def raise_all(self) -> None:
        """Raise the one error as it is, several as one `request.invalid`."""
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            total = sum(max(error.errors_total, 1) for error in self._errors)
            # The text of a ConfigError only counts its own faults, which stand in the list.
            texts = [error.text for error in self._errors if not isinstance(error, ConfigError)]
            raise RequestInvalid(
                " ".join([f"The job has {counted(total, 'fault', 'faults')}.", *texts]),
                errors=[detail for error in self._errors for detail in _details(error)],
                errors_total=total,
            )


def _details(error: P2DError) -> Iterator[ErrorDetail]:
    yield from error.errors or (ErrorDetail(code=error.code, message=error.text),)


# --- what auto means -------------------------------------------------------------------------------------------------


def _resolve(conn: Connection, job: Job, request: JobRequest) -> Job:
    """Say at once what every "auto" means. The validate step says it again, from the rows that are left for training."""
    config, validation = request.config, None
    rows = find_dataset(conn, request.dataset_id, "/dataset").rows
    if request.validation_dataset_id is not None:
        validation = find_dataset(conn, request.validation_dataset_id, "/validation_dataset").rows
    held_out = held_out_count(rows, validation, proxy_rows=0)
    train_rows = rows - held_out if validation is None else rows
    found = resolve(config, rows=train_rows, context_length=request.model.context_length)
    resolved = {
        "config": config_json(found.config),
        "reasons": found.reasons,
        "warnings": list(found.warnings),
        "versions": versions(),
    }
    return update_job(conn, job.id, resolved=resolved)
