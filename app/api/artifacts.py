"""Artifacts: the immutable files of a job, listed, described, downloaded, and given up."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from app.api.bodies import read_json, receive_json
from app.api.content import PARTIAL, STORED, send_blob
from app.api.context import ArtifactId, Context, JobId, Services
from app.api.documentation import ARTIFACT_PATCH_BODY, errors
from app.api.etags import IfMatch, IfNoneMatch, require_match, send_view
from app.api.receipts import receipt
from app.blobs import Blob
from app.core.results import delete_artifact, find_artifact, lock_artifact, set_ttl, unexpired
from app.db.artifacts import Artifact, list_artifacts
from app.db.artifacts import find_artifact as artifact_of_job
from app.db.engine import Connection
from app.db.jobs import find_job
from app.errors import (
    ArtifactNotFound,
    JobNotFound,
    RangeNotSatisfiable,
)
from app.key_schemas import ReceiptView
from app.result_errors import ArtifactExpired, ArtifactInUse
from app.result_schemas import ArtifactPatch
from app.views import ArtifactView, Page

router = APIRouter(tags=["artifacts"])

_BYTES: dict[str, object] = {"*/*": {}}

CONTENT: dict[int | str, dict[str, object]] = {
    200: {"description": "The whole file, of its own media type; `ETag` is its sha256.", "content": _BYTES},
    **PARTIAL,
}
"""What a download answers."""

PAST: dict[int | str, dict[str, object]] = {
    307: {"description": "The file is at `Location`, a signed URL of the store: fetch it there, without the API key."}
}
"""And what one may answer that need not go through this service."""


@router.get("/jobs/{id}/artifacts", responses=errors(JobNotFound))
def get_job_artifacts(job_id: JobId, services: Context) -> Page[ArtifactView]:
    """All files that the job has made so far; a few dozen at most, so always one page."""
    with services.engine.connect() as conn:
        find_job(conn, job_id)
        found = list_artifacts(conn, job_id)
    return Page[ArtifactView](data=[ArtifactView.model_validate(one) for one in found], has_more=False)


@router.get(
    "/jobs/{id}/report",
    response_class=Response,
    responses={
        200: {"description": "The file `report.json`.", "content": {"application/json": {}}},
        **PARTIAL,
        **errors(JobNotFound, ArtifactNotFound, ArtifactExpired, RangeNotSatisfiable, *STORED),
    },
)
def get_job_report(request: Request, job_id: JobId, services: Context) -> Response:
    """The report of a finished job."""
    with services.engine.connect() as conn:
        find_job(conn, job_id)
        artifact = artifact_of_job(conn, job_id, "report.json")
    if artifact is None:
        raise ArtifactNotFound(id=f"{job_id}/report.json")
    return send_artifact(request, services, unexpired(artifact))


@router.get("/artifacts/{id}", response_model=ArtifactView, responses=errors(ArtifactNotFound))
def get_one_artifact(artifact_id: ArtifactId, services: Context, if_none_match: IfNoneMatch = None) -> Response:
    """One file, described; also when its bytes have expired."""
    with services.engine.connect() as conn:
        view = ArtifactView.model_validate(find_artifact(conn, artifact_id))
    return send_view(view, if_none_match)


@router.patch(
    "/artifacts/{id}",
    response_model=ArtifactView,
    responses=errors(ArtifactNotFound, ArtifactExpired, ArtifactInUse),
    openapi_extra=ARTIFACT_PATCH_BODY,
)
async def patch_artifact(
    request: Request, artifact_id: ArtifactId, services: Context, if_match: IfMatch = None
) -> Response:
    """Say how long a file stays from now on, once its job has ended; null keeps it as long as the job."""
    patch = read_json(ArtifactPatch, await receive_json(request, services.settings))
    return await run_in_threadpool(_patch, services, artifact_id, patch, if_match)


@router.delete("/artifacts/{id}", responses=errors(ArtifactNotFound, ArtifactInUse))
def delete_one_artifact(artifact_id: ArtifactId, services: Context, if_match: IfMatch = None) -> ReceiptView:
    """Delete a file of a job that has ended. That of a head map or selection goes with it alone.

    A failed or cancelled job that lacks a file cannot be retried any more, only cloned.
    """
    with services.engine.begin() as conn:
        _require_match(conn, artifact_id, if_match)
        return receipt(services, conn, "artifact", artifact_id, delete_artifact(conn, artifact_id))


@router.head("/artifacts/{id}/content", include_in_schema=False)
@router.get(
    "/artifacts/{id}/content",
    response_class=Response,
    responses={
        **CONTENT,
        **PAST,
        **errors(ArtifactNotFound, ArtifactExpired, RangeNotSatisfiable, *STORED),
    },
)
def get_artifact_content(request: Request, artifact_id: ArtifactId, services: Context) -> Response:
    """Download a file: whole, or one Range of it. Check what arrives against its sha256.

    With an S3 store, and where the operator set `P2D_PRESIGN`, the answer is 307 to a URL of the store that lives for five
    minutes; send the Range there too.
    """
    with services.engine.connect() as conn:
        artifact = unexpired(find_artifact(conn, artifact_id))
    return send_artifact(request, services, artifact, past=services.settings.presign)


def send_artifact(request: Request, services: Services, artifact: Artifact, *, past: bool = False) -> Response:
    """The bytes of an artifact, or where they are; the audit log says that they were sent."""
    blob = Blob(artifact.sha256, artifact.size_bytes)
    answer = send_blob(
        request, services.blobs, blob, media_type=artifact.media_type, file_name=artifact.name, past=past
    )
    if request.method == "GET" and answer.status_code != 304:
        facts = {"job_id": artifact.job_id, "name": artifact.name, "sha256": artifact.sha256}
        with services.engine.begin() as conn:
            services.note(conn, "artifact.download", artifact.id, facts | _way_of(answer))
    return answer


def _way_of(answer: Response) -> dict[str, str]:
    if answer.status_code == 307:
        return {"by": "signed URL"}
    return {"range": answer.headers["Content-Range"]} if answer.status_code == 206 else {}


def _patch(services: Services, artifact_id: str, patch: ArtifactPatch, if_match: str | None) -> Response:
    with services.engine.begin() as conn:
        _require_match(conn, artifact_id, if_match)
        if "artifact_ttl" not in patch.model_fields_set:
            return send_view(ArtifactView.model_validate(find_artifact(conn, artifact_id)))
        artifact = set_ttl(conn, artifact_id, patch.artifact_ttl)
        services.note(conn, "artifact.expire", artifact_id, {"artifact_ttl": patch.artifact_ttl})
    return send_view(ArtifactView.model_validate(artifact))


def _require_match(conn: Connection, artifact_id: str, if_match: str | None) -> None:
    require_match(if_match, lambda: ArtifactView.model_validate(lock_artifact(conn, artifact_id)))
