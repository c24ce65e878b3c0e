"""Datasets: upload, read, list, delete. What a good row is, p2d.rows says; what happens to the bytes, app.core.ingest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from app.access_errors import StorageFull
from app.api.bodies import Received, read_json, receive, work_folder
from app.api.content import STORED
from app.api.context import (
    Context,
    Cursor,
    DatasetId,
    IdempotencyKey,
    Limit,
    Link,
    Services,
    page_after,
    page_of,
)
from app.api.documentation import DATASET_BODY, DATASET_KNOWN, errors
from app.api.etags import IfMatch, IfNoneMatch, require_match, send_view
from app.api.idempotency import Once
from app.api.receipts import receipt
from app.api.reports import reporting
from app.api.stored_lines import page_of_lines
from app.blobs import Blob
from app.core.erasure import erase, erase_all
from app.core.ingest import Candidate, inspect_file, inspect_given, record, store
from app.dataset_errors import (
    DatasetReaderDied,
    DatasetTooCostly,
    EgressOff,
    IntakeFull,
    SourceFailed,
    SourceInvalid,
    SourceRefused,
)
from app.db.datasets import Dataset, DatasetFilter, DerivedJob, get_dataset, list_datasets
from app.db.engine import Connection
from app.errors import (
    DatasetInUse,
    DatasetNotFound,
    DiskFull,
    IdempotencyInFlight,
    IdempotencyMismatch,
    JobInUse,
    MoveNotAllowed,
    RequestInvalid,
    StoreUnavailable,
)
from app.key_schemas import DerivedJobView, DerivedView, ReceiptView
from app.schemas import DatasetBody, Mapping, Moment, RowsBody, Sha256, SourceBody, Text
from app.views import DatasetStatsView, DatasetView, KnownDatasetView, Page, ReportView, RowView
from p2d.columns import ACCEPTED, mapped
from p2d.errors import DatasetEmpty, DatasetError, DatasetTooLarge, ErrorDetail, MappingInvalid
from p2d.formats import Format

router = APIRouter(tags=["datasets"])

Order = Literal["asc", "desc"]

MAX_LISTED = 1000
"""Jobs over a deleted dataset that its receipt names."""

DATASET_ERRORS = (
    *(DatasetError, DatasetEmpty, DatasetTooLarge, DatasetTooCostly, DatasetReaderDied, MappingInvalid),
    *(IntakeFull, DiskFull, StorageFull, StoreUnavailable, IdempotencyInFlight, IdempotencyMismatch),
)
"""What a request that makes a dataset may be refused with."""

SOURCE_ERRORS = (EgressOff, SourceInvalid, SourceRefused, SourceFailed)
"""And with one that names it."""


@router.post(
    "/datasets",
    status_code=201,
    response_model=DatasetView,
    responses={**DATASET_KNOWN, **errors(*DATASET_ERRORS, *SOURCE_ERRORS)},
    openapi_extra=DATASET_BODY,
)
async def create_dataset(request: Request, services: Context, key: IdempotencyKey) -> Response:
    """Upload a dataset as the part `file`, with the part `mapping` where its columns have other names; or name it as JSON.

    `{"source": {"type": "https", "url": ...}}`, `{"type": "hf", "repo", "path", "revision"}`, `{"type": "s3", "url"}`:
    where the operator lets it. A small one may be written out: `{"rows": [{"question": ..., "answer": ...}, ...]}`.

    All of it is checked; one bad line refuses it. The first hundred bad lines are named, and all in the report to which the answer
    links.
    """
    async with receive(request, services.settings, files=("file",), json_part="mapping", json=True) as received:
        if not received.plain:
            return await run_in_threadpool(_create, services, received, key)
        body: SourceBody | RowsBody = read_json(DatasetBody, received.json or b"")  # type: ignore[arg-type]  # a union
        return await run_in_threadpool(_take, services, body, key)


@router.get("/datasets")
def get_datasets(
    services: Context,
    link: Link,
    limit: Limit = 20,
    cursor: Cursor = None,
    q: Annotated[Text | None, Query(min_length=1, max_length=200, description="Stands in the name.")] = None,
    format: Annotated[Format | None, Query(description="Only files that came in this format.")] = None,
    content_hash: Annotated[Sha256 | None, Query(description="Only the dataset of this content.")] = None,
    created_after: Annotated[Moment | None, Query(description="Made then or later.")] = None,
    created_before: Annotated[Moment | None, Query(description="Made before.")] = None,
    order: Annotated[Order, Query(description="`desc` = newest first.")] = "desc",
) -> Page[DatasetView]:
    """The datasets of the project."""
    only = DatasetFilter(
        q=q, format=format, content_hash=content_hash, created_after=created_after, created_before=created_before
    )
    after = page_after(cursor)
    with services.engine.connect() as conn:
        datasets = list_datasets(conn, limit=limit + 1, after=after, oldest_first=order == "asc", only=only)
    views = [DatasetView.model_validate(dataset) for dataset in datasets]
    return link(Page[DatasetView].model_validate(page_of(views, [dataset.id for dataset in datasets], limit)))


@router.get("/datasets/{id}", response_model=DatasetView, responses=errors(DatasetNotFound))
def get_one_dataset(dataset_id: DatasetId, services: Context, if_none_match: IfNoneMatch = None) -> Response:
    """One dataset."""
    return send_view(DatasetView.model_validate(_find(services, dataset_id)), if_none_match)


@router.get("/datasets/{id}/report", responses=errors(DatasetNotFound))
def get_dataset_report(dataset_id: DatasetId, services: Context) -> ReportView:
    """What the check of the dataset found, in the same shape as of a refused file (GET /reports/{id})."""
    dataset = _find(services, dataset_id)
    told = {"dataset_id": dataset.id, **{name: getattr(dataset, name) for name in ("name", "raw_sha256", "created_at")}}
    return ReportView.model_validate({**dataset.report, **told})


@router.get("/datasets/{id}/rows", responses=errors(DatasetNotFound, *STORED))
def get_dataset_rows(
    dataset_id: DatasetId, services: Context, link: Link, limit: Limit = 20, cursor: Cursor = None
) -> Page[RowView]:
    """The rows in order, in the form in which jobs read them. A page of long rows may hold fewer than `limit`."""
    dataset = _find(services, dataset_id)
    blob = Blob(dataset.sha256, dataset.stored_bytes)
    return link(page_of_lines(services.blobs, blob, cursor=cursor, limit=limit))


@router.get("/datasets/{id}/stats", responses=errors(DatasetNotFound))
def get_dataset_stats(dataset_id: DatasetId, services: Context) -> DatasetStatsView:
    """How long prompts and answers are, in characters, what repeats, and what looks like personal data."""
    dataset = _find(services, dataset_id)
    report = dataset.report
    return DatasetStatsView.model_validate(
        {
            **{name: report.get(name) for name in ("duplicates", "prompt_chars", "answer_chars")},
            "dataset_id": dataset.id,
            "rows": dataset.rows,
            "stored_bytes": dataset.stored_bytes,
            "personal": {kind: found["rows"] for kind, found in report.get("personal", {}).items()},
        }
    )


@router.delete("/datasets/{id}", responses=errors(DatasetNotFound, DatasetInUse, JobInUse, MoveNotAllowed))
def delete_one_dataset(
    dataset_id: DatasetId,
    services: Context,
    derived: Annotated[
        bool, Query(description="Delete the jobs over it too, with all that they have made of its rows.")
    ] = False,
    if_match: IfMatch = None,
) -> ReceiptView:
    """Delete a dataset. Refused while a job that has not ended reads it. The receipt names what jobs have made of it.

    Its rows leave the store within the hours of `P2D_UNREFERENCED_KEPT_H`, unless something else has the same.
    """
    # Without a lock: a dataset is deleted or as it was made.
    require_match(if_match, lambda: DatasetView.model_validate(_find(services, dataset_id)))
    with services.engine.begin() as conn:
        if not derived:
            dataset, left = erase(conn, dataset_id)
            found = _derived([(job, None) for job in left], deleted=False)
        else:
            dataset, gone = erase_all(conn, dataset_id)
            told = [(job, receipt(services, conn, "job", job.job_id, hashes).audit_id) for job, hashes in gone]
            found = _derived(told, deleted=True)
        return receipt(services, conn, "dataset", dataset_id, [dataset.sha256], found)


def _derived(jobs: Sequence[tuple[DerivedJob, str | None]], *, deleted: bool) -> DerivedView:
    """Args: jobs: each with the entry of the audit log about its deletion."""
    listed = [
        DerivedJobView(job_id=job.job_id, artifact_ids=job.artifact_ids, size_bytes=job.size_bytes, audit_id=audit_id)
        for job, audit_id in jobs[:MAX_LISTED]
    ]
    return DerivedView(
        deleted=deleted,
        jobs=len(jobs),
        artifacts=sum(len(job.artifact_ids) for job, _ in jobs),
        size_bytes=sum(job.size_bytes for job, _ in jobs),
        listed=listed,
    )


def _create(services: Services, received: Received, key: str | None) -> Response:
    file = received.files.get("file")
    if file is None:
        text = "The part 'file' is missing."
        raise RequestInvalid(text, errors=[ErrorDetail(code="field.missing", message=text, pointer="/file")])
    mapping = read_json(Mapping, received.json, root="/mapping") if received.json is not None else {}
    once = Once.of("POST /datasets", key, mapping, received)
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    with services.intake.seat(services.known_caller), reporting(services) as refused:
        columns = mapped(mapping)
        candidate = inspect_file(file.data(), services.settings, columns, refused, raw_sha256=file.sha256)
    return _make(services, once, candidate)


def _take(services: Services, body: SourceBody | RowsBody, key: str | None) -> Response:
    once = Once.of("POST /datasets", key, body.model_dump(mode="json"))
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    with work_folder(services.settings) as folder:
        with services.intake.seat(services.known_caller), reporting(services) as refused:
            candidate = inspect_given(body, services.settings, services.egress, folder / "file", ACCEPTED, refused)
        return _make(services, once, candidate)


def _make(services: Services, once: Once, candidate: Candidate) -> Response:
    blob = store(services.blobs, candidate)
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        dataset, new = record(conn, candidate, blob, services.settings)
        if new:
            note_dataset(services, conn, dataset)
        return answer_made(conn, once, dataset) if new else answer_known(conn, once, dataset, candidate.raw_sha256)


def note_dataset(services: Services, conn: Connection, dataset: Dataset) -> None:
    """Write into the audit log that a dataset was made."""
    services.note(conn, "dataset.create", dataset.id, {"sha256": dataset.sha256, "rows": dataset.rows})


def answer_made(conn: Connection, once: Once, dataset: Dataset) -> Response:
    """Answer a request that made a dataset, and keep the answer."""
    return _answer(conn, once, 201, DatasetView.model_validate(dataset))


def answer_known(conn: Connection, once: Once, dataset: Dataset, received_sha256: str | None) -> Response:
    """Answer a request to make a dataset whose content was there already, and keep the answer."""
    view = DatasetView.model_validate(dataset).model_dump()
    told = {"deduplicated": True, "received_sha256": received_sha256}
    return _answer(conn, once, 200, KnownDatasetView.model_validate({**view, **told}))


def _answer(conn: Connection, once: Once, status_code: int, view: DatasetView) -> Response:
    body, headers = view.model_dump(mode="json"), {"Location": f"/datasets/{view.id}"}
    once.keep(conn, status_code, headers, body)
    return JSONResponse(body, status_code=status_code, headers=headers)


def _find(services: Services, dataset_id: str) -> Dataset:
    with services.engine.connect() as conn:
        dataset = get_dataset(conn, dataset_id)
    if dataset is None:
        raise DatasetNotFound(id=dataset_id)
    return dataset
