"""Exports: ask for a head adapter in another form. A worker makes it, in a job of kind `export`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from app.access_errors import TooManyJobs
from app.api.bodies import read_json, receive_json
from app.api.content import STORED
from app.api.context import ArtifactId, Context, IdempotencyKey, Services
from app.api.documentation import MERGE_BODY, errors
from app.api.idempotency import Once
from app.api.job_views import new_view
from app.api.jobs import POLL_AFTER_S
from app.core.bases import find_base, is_artifact, keep_base
from app.core.exports import ExportRequest, find_adapter, submit_export
from app.core.webhooks import named_webhooks
from app.errors import (
    ArtifactNotFound,
    IdempotencyInFlight,
    IdempotencyMismatch,
)
from app.result_errors import ArtifactExpired, NotABaseModel, NotAnAdapter
from app.result_schemas import MergeBody
from app.views import JobView
from app.webhook_errors import WebhookNotFound
from p2d.errors import AdapterMismatch, ModelError, ModelNotFound, ModelUnsupported

router = APIRouter(tags=["artifacts"])


@router.post(
    "/artifacts/{id}/merge",
    status_code=202,
    response_model=JobView,
    responses=errors(
        *(
            ArtifactNotFound,
            ArtifactExpired,
            NotAnAdapter,
            ModelNotFound,
            ModelError,
            ModelUnsupported,
            AdapterMismatch,
            NotABaseModel,
        ),
        *STORED,
        *(WebhookNotFound, TooManyJobs, IdempotencyInFlight, IdempotencyMismatch),
    ),
    openapi_extra=MERGE_BODY,
)
async def merge_artifact(request: Request, artifact_id: ArtifactId, services: Context, key: IdempotencyKey) -> Response:
    """Bring an adapter (`heads.safetensors`) into another form: a full model, a PEFT LoRA, or both.

    202 with a job of kind `export`, whose artifacts are the files: those of a model directory, those of a LoRA.
    """
    body = read_json(MergeBody, await receive_json(request, services.settings) or b"{}")
    return await run_in_threadpool(_merge, services, artifact_id, body, key)


def _merge(services: Services, artifact_id: str, body: MergeBody, key: str | None) -> Response:
    once = Once.of(f"POST /artifacts/{artifact_id}/merge", key, body.model_dump(mode="json"))
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    with services.engine.connect() as conn:
        base_model = find_adapter(conn, artifact_id)[1].base_model
    info = find_base(services.engine, services.blobs, services.settings.models_dir, base_model)
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        if is_artifact(base_model):
            keep_base(conn, base_model)
        _, trained = find_adapter(conn, artifact_id)  # before the project, as a retry of that job does
        services.jobs.allow(conn, services.known_caller.project_id)
        for error in named_webhooks(conn, body.webhooks):
            raise error
        if info.digest != trained.model_digest:
            text = f"The installed {info.name!r} is not the one that the adapter was trained on."
            raise AdapterMismatch(text, expected=trained.model_digest, found=info.digest)
        request = ExportRequest(
            formats=body.formats,
            name=body.name,
            metadata=body.metadata,
            priority=body.priority,
            artifact_ttl=body.artifact_ttl,
            webhooks=body.webhooks,
        )
        job = submit_export(conn, artifact_id, request, queue=services.settings.worker_queue)
        services.note(conn, "job.create", job.id, {"kind": job.kind, "adapter_id": artifact_id})
        view = new_view(job).model_dump(mode="json")
        headers = {"Location": f"/jobs/{job.id}", "Retry-After": str(POLL_AFTER_S)}
        once.keep(conn, 202, headers, view)
    services.waker.wake(job.queue)  # after the commit, and only a hint
    return JSONResponse(view, status_code=202, headers=headers)
