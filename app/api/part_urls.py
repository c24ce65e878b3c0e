"""Parts of uploads that go to an S3 store directly: a signed URL for one part, and its registration once it is there.

The service sees no byte of such a part before POST /uploads/{id}/complete puts all together and checks every sha256.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from app.api.bodies import read_json, receive_json
from app.api.context import Context, IdempotencyKey, Services, UploadId
from app.api.documentation import PART_URL_BODY, STORED_PART_BODY, errors
from app.api.uploads import PartNumber
from app.core.uploads import expected_size, offer_part, register_part
from app.dataset_errors import TooManyVersions
from app.db.uploads import Part
from app.errors import (
    PartWrong,
    PresignUnavailable,
    StoreUnavailable,
    UploadCompleted,
    UploadNotFound,
)
from app.schemas import PartUrlBody, StoredPartBody
from app.views import PartUrlView, PartView
from p2d.errors import ErrorDetail

router = APIRouter(tags=["uploads"])

URL_LIVES_S = 900
"""Seconds in which a part must have begun to arrive: shorter than the hour in which its upload's row outlives the upload."""

_ERRORS = (UploadNotFound, UploadCompleted, PartWrong, StoreUnavailable)


@router.post(
    "/uploads/{id}/parts/{number}/url",
    responses=errors(*_ERRORS, TooManyVersions, PresignUnavailable),
    openapi_extra=PART_URL_BODY,
)
async def sign_part_url(
    request: Request, upload_id: UploadId, number: PartNumber, services: Context, key: IdempotencyKey
) -> PartUrlView:
    """A URL under which this part, of this size and sha256, can be put into the store itself, for a quarter of an hour.

    Send the part there with the headers of the answer, then register it: POST /uploads/{id}/parts/{number}. Each call signs
    anew, so the answer is not kept for an Idempotency-Key. Only with an S3 store, and where the operator set `P2D_PRESIGN`.
    """
    content = await receive_json(request, services.settings)
    return await run_in_threadpool(_sign, services, upload_id, number, content)


@router.post("/uploads/{id}/parts/{number}", responses=errors(*_ERRORS), openapi_extra=STORED_PART_BODY)
async def register_stored_part(
    request: Request, upload_id: UploadId, number: PartNumber, services: Context, key: IdempotencyKey
) -> PartView:
    """Register a part that was put under a signed URL. Repeating is harmless; a part that is not there is refused."""
    content = await receive_json(request, services.settings)
    return await run_in_threadpool(_register, services, upload_id, number, content)


def _sign(services: Services, upload_id: str, number: int, content: bytes) -> PartUrlView:
    size_bytes = expected_size(services.engine, upload_id, number)
    body = read_json(PartUrlBody, content)
    if body.size_bytes != size_bytes:
        text = f"Part {number} has {size_bytes} bytes."
        fault = ErrorDetail(code="upload.part_size", message=text, pointer="/size_bytes")
        raise PartWrong(text, errors=[fault], expected=size_bytes)
    if not services.settings.presign:
        raise PresignUnavailable("This service hands out no URLs of its store.")
    part = Part(upload_id=upload_id, number=number, sha256=body.sha256)
    settings = services.settings
    signed = offer_part(
        services.engine, services.blobs, part, size_bytes, lives_s=URL_LIVES_S, expiry_h=settings.upload_expiry_h
    )
    return PartUrlView.model_validate(signed)


def _register(services: Services, upload_id: str, number: int, content: bytes) -> PartView:
    size_bytes = expected_size(services.engine, upload_id, number)
    body = read_json(StoredPartBody, content)
    part = Part(upload_id=upload_id, number=number, sha256=body.sha256)
    register_part(services.engine, services.blobs, part, size_bytes)
    return PartView.model_validate(part)
