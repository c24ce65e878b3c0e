"""Uploads in parts: begin, send parts in any order, look, list, complete, give up. What they become is a dataset like any other."""

from __future__ import annotations

import base64
import binascii
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from app.access_errors import StorageFull
from app.api.bodies import ReceivedFile, read_json, receive_bytes, receive_json, work_folder
from app.api.context import Context, Cursor, IdempotencyKey, Limit, Link, Services, UploadId, page_after, page_of
from app.api.datasets import DATASET_ERRORS, answer_known, answer_made, note_dataset
from app.api.documentation import COMPLETE_BODY, DATASET_KNOWN, PART_BODY, UPLOAD_BODY, errors
from app.api.etags import IfMatch, IfNoneMatch, require_match, send_view
from app.api.idempotency import Once
from app.api.receipts import receipt
from app.api.reports import reporting
from app.core.disk_space import need_space
from app.core.ingest import inspect_file, record, store
from app.core.quotas import allow_storage
from app.core.uploads import MAX_PARTS, assemble, ended_meanwhile, expected_size, part_size, take_part
from app.dataset_errors import TooManyVersions
from app.db.datasets import Dataset, get_dataset
from app.db.engine import Connection
from app.db.uploads import (
    Part,
    Upload,
    all_parts,
    delete_upload,
    finish_upload,
    get_upload,
    insert_upload,
    list_uploads,
    lock_upload,
    parts_of,
)
from app.errors import (
    BlobMissing,
    DatasetNotFound,
    DiskFull,
    IdempotencyInFlight,
    IdempotencyMismatch,
    PartWrong,
    RequestInvalid,
    StoreUnavailable,
    UploadCompleted,
    UploadIncomplete,
    UploadNotFound,
    UploadWrong,
)
from app.key_schemas import ReceiptView
from app.schemas import CompleteBody, Sha256, UploadBody
from app.views import DatasetView, Page, PartView, UploadSummary, UploadView
from p2d.columns import mapped
from p2d.errors import DatasetTooLarge, ErrorDetail
from p2d.validation import DataFile

router = APIRouter(tags=["uploads"])

PartNumber = Annotated[int, PathParameter(ge=1, le=MAX_PARTS, description="From 1.")]


@router.post(
    "/uploads",
    status_code=201,
    response_model=UploadView,
    responses=errors(DatasetTooLarge, DiskFull, StorageFull, IdempotencyInFlight, IdempotencyMismatch),
    openapi_extra=UPLOAD_BODY,
)
async def create_upload(request: Request, services: Context, key: IdempotencyKey) -> Response:
    """Begin a file that comes in parts. The answer says how to cut it: `part_count` parts of `part_bytes` each."""
    body = read_json(UploadBody, await receive_json(request, services.settings))
    return await run_in_threadpool(_create, services, body, key)


@router.get("/uploads")
def get_uploads(
    services: Context,
    link: Link,
    limit: Limit = 20,
    cursor: Cursor = None,
    status: Annotated[
        Literal["open", "completed"] | None, Query(description="`open` = not a dataset yet: parts are taken.")
    ] = None,
    sha256: Annotated[
        Sha256 | None, Query(description="Only those of the file with this sha256, as its sender said.")
    ] = None,
) -> Page[UploadSummary]:
    """The uploads of the project that have not been given up, newest first: who lost an id finds it here and goes on."""
    before, open = page_after(cursor), None if status is None else status == "open"
    with services.engine.connect() as conn:
        found = list_uploads(conn, limit=limit + 1, before=before, open=open, sha256=sha256)
    views = [UploadSummary.model_validate({**asdict(one), **_told(one)}) for one in found]
    return link(Page[UploadSummary].model_validate(page_of(views, [one.id for one in found], limit)))


@router.get("/uploads/{id}", response_model=UploadView, responses=errors(UploadNotFound))
def get_one_upload(upload_id: UploadId, services: Context, if_none_match: IfNoneMatch = None) -> Response:
    """An upload and the parts that are there."""
    with services.engine.connect() as conn:
        return send_view(_view(conn, _find(conn, upload_id)), if_none_match)


@router.put(
    "/uploads/{id}/parts/{number}",
    responses=errors(UploadNotFound, UploadCompleted, PartWrong, TooManyVersions, StoreUnavailable),
    openapi_extra=PART_BODY,
)
async def put_part(
    request: Request,
    upload_id: UploadId,
    number: PartNumber,
    services: Context,
    digest: Annotated[
        str | None,
        Header(
            alias="Content-Digest",
            max_length=200,
            description="`sha-256=:BASE64:` (RFC 9530) of the part; checked before it is taken.",
        ),
    ] = None,
) -> PartView:
    """Send one part: plain bytes, any order, again as often as it takes; other bytes for a part replace it, up to ten."""
    said = _digest(digest)

    def expect() -> int:
        return expected_size(services.engine, upload_id, number)

    async with receive_bytes(request, services.settings, expect) as received:
        return await run_in_threadpool(_take, services, upload_id, number, received, said)


@router.post(
    "/uploads/{id}/complete",
    status_code=201,
    response_model=DatasetView,
    responses={
        **DATASET_KNOWN,
        **errors(
            *(*DATASET_ERRORS, UploadNotFound, UploadIncomplete, PartWrong, UploadWrong, DatasetNotFound, BlobMissing),
        ),
    },
    openapi_extra=COMPLETE_BODY,
)
async def complete_upload(request: Request, upload_id: UploadId, services: Context, key: IdempotencyKey) -> Response:
    """Make the dataset, checked as in POST /datasets. Refused, the upload stays open, so that parts can be sent anew."""
    content = await receive_json(request, services.settings)
    body = read_json(CompleteBody, content or b"{}")
    return await run_in_threadpool(_complete, services, upload_id, body, key)


@router.delete("/uploads/{id}", responses=errors(UploadNotFound))
def delete_one_upload(upload_id: UploadId, services: Context, if_match: IfMatch = None) -> ReceiptView:
    """Give an upload up; its parts are removed soon. A dataset that it became stays."""
    with services.engine.begin() as conn:
        upload = lock_upload(conn, upload_id)
        if upload is None:
            raise UploadNotFound(id=upload_id)
        require_match(if_match, lambda: _view(conn, upload))
        delete_upload(conn, upload_id)
        parts = all_parts(conn, upload_id)
        return receipt(services, conn, "upload", upload_id, [part.sha256 for part in parts])


def _create(services: Services, body: UploadBody, key: str | None) -> Response:
    settings = services.settings
    if body.size_bytes > (limit := settings.max_upload_bytes):
        text = f"The file has {body.size_bytes} bytes; the limit is {limit}."
        detail = ErrorDetail(code=DatasetTooLarge.code, message=text, pointer="/size_bytes")
        raise DatasetTooLarge(text, errors=[detail], size_bytes=body.size_bytes, limit=limit)
    need_space(settings)
    once = Once.of("POST /uploads", key, body.model_dump(mode="json"))
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        allow_storage(conn, settings, size_bytes=body.size_bytes)
        upload = insert_upload(
            conn,
            name=body.name,
            size_bytes=body.size_bytes,
            sha256=body.sha256,
            part_bytes=part_size(body.size_bytes, settings.upload_part_bytes),
            expiry_h=settings.upload_expiry_h,
        )
        view, headers = _view(conn, upload).model_dump(mode="json"), {"Location": f"/uploads/{upload.id}"}
        once.keep(conn, 201, headers, view)
    return JSONResponse(view, status_code=201, headers=headers)


def _take(services: Services, upload_id: str, number: int, received: ReceivedFile, said: str | None) -> PartView:
    if said not in (None, received.sha256):
        text = f"Part {number} has another sha256 than Content-Digest says."
        fault = ErrorDetail(code="upload.part_hash", message=text, pointer="/header/Content-Digest")
        raise PartWrong(text, errors=[fault], expected=said, found=received.sha256)
    part = Part(upload_id=upload_id, number=number, sha256=received.sha256)
    take_part(services.engine, services.blobs, part, received.path, expiry_h=services.settings.upload_expiry_h)
    return PartView.model_validate(part)


def _complete(services: Services, upload_id: str, body: CompleteBody, key: str | None) -> Response:
    once = Once.of(f"POST /uploads/{upload_id}/complete", key, body.model_dump(mode="json"))
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    columns = mapped(body.mapping)
    with services.engine.connect() as conn:
        upload = _find(conn, upload_id)
    if upload.dataset_id is not None:
        return _completed(services, once, upload.dataset_id)
    need_space(services.settings)
    try:
        with services.intake.seat(services.known_caller), work_folder(services.settings) as folder:
            path = folder / "file"
            sha256 = assemble(services.engine, services.blobs, upload, path)
            with reporting(services) as refused:
                file = DataFile(path=path, name=upload.name)
                candidate = inspect_file(file, services.settings, columns, refused, raw_sha256=sha256)
            blob = store(services.blobs, candidate)
    except BlobMissing as missing:
        return _completed(services, once, ended_meanwhile(services.engine, upload_id, missing))
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        locked = lock_upload(conn, upload_id)
        if locked is None:
            raise UploadNotFound(id=upload_id)
        if locked.dataset_id is not None:  # a twin was faster
            return answer_known(conn, once, _dataset(conn, locked.dataset_id), sha256)
        dataset, new = record(conn, candidate, blob, services.settings, freed_bytes=locked.size_bytes)
        finish_upload(conn, upload_id, dataset.id)
        if new:
            note_dataset(services, conn, dataset)
        return answer_made(conn, once, dataset) if new else answer_known(conn, once, dataset, sha256)


def _completed(services: Services, once: Once, dataset_id: str) -> Response:
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        return answer_known(conn, once, _dataset(conn, dataset_id), None)


def _dataset(conn: Connection, dataset_id: str) -> Dataset:
    dataset = get_dataset(conn, dataset_id)
    if dataset is None:
        raise DatasetNotFound(id=dataset_id)
    return dataset


def _find(conn: Connection, upload_id: str) -> Upload:
    upload = get_upload(conn, upload_id)
    if upload is None:
        raise UploadNotFound(id=upload_id)
    return upload


def _view(conn: Connection, upload: Upload) -> UploadView:
    parts = [PartView.model_validate(part) for part in parts_of(conn, upload.id)]
    return UploadView.model_validate({**asdict(upload), **_told(upload), "parts": parts, "parts_there": len(parts)})


def _told(upload: Upload) -> dict[str, Any]:
    """What of an upload is in no column."""
    return {"status": "open" if upload.dataset_id is None else "completed", "part_count": upload.part_count}


def _digest(header: str | None) -> str | None:
    """The sha256 that Content-Digest says, in hexadecimal. Raises RequestInvalid for one that cannot be read."""
    for one in (header or "").split(","):
        name, _, value = one.strip().partition("=")
        if name.strip().lower() == "sha-256":
            try:
                digest = base64.b64decode(value.strip().removeprefix(":").removesuffix(":"), validate=True)
            except (ValueError, binascii.Error):
                digest = b""
            if len(digest) == 32:
                return digest.hex()
            break
    else:
        if header is None:
            return None
    text = "Expected `sha-256=:BASE64:` (RFC 9530)."
    fault = ErrorDetail(code="field.content_digest", message=text, pointer="/header/Content-Digest")
    raise RequestInvalid("The Content-Digest cannot be used.", errors=[fault])
