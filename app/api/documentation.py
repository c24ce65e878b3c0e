"""What /openapi.json says beyond the routes' types: problems by status, bodies that are streamed, and the schemas of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter

from app.access_errors import InsufficientScope, KeyRefused, NotMigrated, TooManyRequests
from app.api.door import READING
from app.comparison_schemas import ComparisonBody
from app.errors import (
    CursorInvalid,
    DatabaseUnavailable,
    DiskFull,
    PreconditionFailed,
    RequestError,
    RequestInvalid,
    RequestTooLarge,
    RequestTooSlow,
    RouteNotFound,
    UnsupportedMediaType,
)
from app.key_schemas import KeyBody
from app.problems import MEDIA_TYPE, STATUS, catalogue
from app.result_schemas import BODIES, ArtifactPatch, MergeBody
from app.schemas import (
    CompleteBody,
    JobBody,
    JobPatch,
    Mapping,
    ModelCheckBody,
    PartUrlBody,
    RowsBody,
    SourceBody,
    StoredPartBody,
    UploadBody,
)
from app.views import KnownDatasetView, Problem
from app.webhook_schemas import MessageView, WebhookBody, WebhookPatch
from p2d.errors import DatasetTooLarge, P2DError

_PROBLEM = {"$ref": "#/components/schemas/Problem"}
_FILE = {
    "type": "string",
    "format": "binary",
    "description": "JSON Lines, a JSON array, CSV with a header, or Parquet; plain, or as one gzip or zstd stream.",
}
_MAPPING = TypeAdapter(Mapping).json_schema()


def errors(*classes: type[P2DError]) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route for the errors that are its own; `install` adds those of every route like it."""
    by_status: dict[int | str, list[str]] = {}
    for cls in classes:
        by_status.setdefault(STATUS[cls.code], []).append(cls.code)
    return {status: {"description": "", _CODES: codes} for status, codes in by_status.items()}


_CODES = "x-codes"
"""Where `errors` leaves codes for `install`; no answer of /openapi.json has it."""

COMMON = errors(RequestInvalid)
"""Of every route, so that FastAPI does not document a 422 of its own."""


def _shared(path: str, method: str, operation: dict[str, Any]) -> Iterator[type[P2DError]]:
    """Errors that an operation can answer with because of what it takes, whatever it does."""
    yield P2DError
    yield RequestInvalid
    if "{" in path:
        yield RouteNotFound  # an id that is empty or has a slash in it makes another path
    if operation.get("security") != []:
        yield from (KeyRefused, TooManyRequests, DatabaseUnavailable, NotMigrated)
        if method.upper() not in READING:
            yield InsufficientScope
    taken = _parameters(operation)
    if "cursor" in taken:
        yield CursorInvalid
    if "if-match" in taken:
        yield PreconditionFailed
    types = operation.get("requestBody", {}).get("content", {})
    if types:
        yield RequestTooSlow
    if types.keys() & {"application/json", "multipart/form-data"}:
        yield from (RequestError, RequestTooLarge, UnsupportedMediaType)
    if "multipart/form-data" in types:
        yield DatasetTooLarge
    if types.keys() & {"application/octet-stream", "multipart/form-data"}:
        yield DiskFull


def _parameters(operation: dict[str, Any]) -> set[str]:
    return {parameter["name"] for parameter in operation.get("parameters", ())}


def _document_etag(operation: dict[str, Any]) -> None:
    """Say of a conditional read that its answer has an ETag, and what is answered to who has it already."""
    if "if-none-match" not in _parameters(operation):
        return
    header = {"ETag": {"description": "Changes whenever the answer does.", "schema": {"type": "string"}}}
    operation["responses"]["200"]["headers"] = header
    text = "The client has it: If-None-Match names its ETag."
    operation["responses"]["304"] = {"description": text, "headers": header}


def _document_errors(path: str, method: str, operation: dict[str, Any]) -> None:
    """Put every error that the operation can answer with into its responses: by status, each with its codes."""
    responses: dict[str, Any] = operation["responses"]
    codes: dict[str, set[str]] = {}
    for cls in _shared(path, method, operation):
        codes.setdefault(str(STATUS[cls.code]), set()).add(cls.code)
    for status, response in responses.items():
        if _CODES in response:
            codes.setdefault(status, set()).update(response[_CODES])
    known = catalogue()
    for status, found in codes.items():
        meanings = [f"`{code}`: {(known[code].__doc__ or '').splitlines()[0]}" for code in sorted(found)]
        shape = {"allOf": [_PROBLEM], "properties": {"code": {"enum": sorted(found)}}}
        responses[status] = {"description": " ".join(meanings), "content": {MEDIA_TYPE: {"schema": shape}}}
    operation["responses"] = dict(sorted(responses.items()))


def _job_body(shape: str) -> dict[str, Any]:
    """A job's JSON, or a form with its files and that JSON."""
    schema = {"$ref": f"#/components/schemas/{shape}"}
    form = {
        "type": "object",
        "required": ["dataset", "job"],
        "properties": {"dataset": _FILE, "validation_dataset": _FILE, "job": schema},
        "additionalProperties": False,
    }
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": schema},
                "multipart/form-data": {"schema": form, "encoding": {"job": {"contentType": "application/json"}}},
            },
        }
    }


JOB_BODY = _job_body("JobBody")
SELECTION_BODY = _job_body("SelectionBody")

HEAD_MAP_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/HeadMapBody"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "description": "Either `job` and `dataset`, as in POST /jobs, or `head_map` alone.",
                    "properties": {
                        "dataset": _FILE,
                        "validation_dataset": _FILE,
                        "job": {"$ref": "#/components/schemas/HeadMapBody"},
                        "head_map": {"type": "string", "format": "binary", "description": "A head_map.json."},
                    },
                    "additionalProperties": False,
                },
                "encoding": {"job": {"contentType": "application/json"}},
            },
        },
    }
}

_PATCH = {
    "type": "object",
    "description": "A JSON merge patch (RFC 7396) of a job's body: only what is to differ; null means the default.",
}

CLONE_BODY = {
    "requestBody": {
        "required": False,
        "content": {"application/json": {"schema": _PATCH}, "application/merge-patch+json": {"schema": _PATCH}},
    }
}

DATASET_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "oneOf": [
                        {"$ref": "#/components/schemas/SourceBody"},
                        {"$ref": "#/components/schemas/RowsBody"},
                    ]
                }
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": _FILE, "mapping": _MAPPING},
                    "additionalProperties": False,
                },
                "encoding": {"mapping": {"contentType": "application/json"}},
            },
        },
    }
}

DATASET_KNOWN: dict[int | str, dict[str, Any]] = {
    200: {"description": "The same content was there already.", "model": KnownDatasetView}
}
"""What a request to make a dataset may be answered beside 201."""


MODELS: tuple[type[BaseModel], ...] = (
    *(JobBody, JobPatch, SourceBody, RowsBody),
    *(UploadBody, PartUrlBody, StoredPartBody, CompleteBody),
    *(KeyBody, WebhookBody, WebhookPatch, ComparisonBody, ModelCheckBody, Problem),
    *BODIES,
)
"""Bodies that FastAPI does not parse itself, and the shape of every error."""


def _json_body(model: type[BaseModel], *, required: bool, types: Sequence[str] = ("json",)) -> dict[str, Any]:
    content = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    return {"requestBody": {"required": required, "content": {f"application/{type}": content for type in types}}}


UPLOAD_BODY = _json_body(UploadBody, required=True)
PART_URL_BODY = _json_body(PartUrlBody, required=True)
STORED_PART_BODY = _json_body(StoredPartBody, required=True)
KEY_BODY = _json_body(KeyBody, required=True)
WEBHOOK_BODY = _json_body(WebhookBody, required=True)
PATCH_BODY = _json_body(JobPatch, required=True, types=("json", "merge-patch+json"))
ARTIFACT_PATCH_BODY = _json_body(ArtifactPatch, required=True, types=("json", "merge-patch+json"))
WEBHOOK_PATCH_BODY = _json_body(WebhookPatch, required=True, types=("json", "merge-patch+json"))
COMPARISON_BODY = _json_body(ComparisonBody, required=True)
MODEL_CHECK_BODY = _json_body(ModelCheckBody, required=True)
MERGE_BODY = _json_body(MergeBody, required=False)
COMPLETE_BODY = _json_body(CompleteBody, required=False)
PART_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


def install(app: FastAPI) -> None:
    """Make /openapi.json know the schemas of bodies that FastAPI does not parse itself, and what webhooks are sent."""

    later: dict[int | str, dict[str, Any]] = {"default": {"description": "It is sent again later."}}

    @app.webhooks.post("event", tags=["webhooks"], responses=later)
    def receive_event(message: MessageView) -> None:
        """What the URL of a webhook is sent, with the headers `webhook-id`, `webhook-timestamp` and `webhook-signature` of
        Standard Webhooks. Any answer with 2xx takes it, 410 disables the webhook, anything else has it sent again later.
        """

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                webhooks=app.webhooks.routes,
                tags=app.openapi_tags,
            )
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for model in MODELS:
                schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
            for path, operations in document["paths"].items():
                for method, operation in operations.items():
                    _document_etag(operation)
                    _document_errors(path, method, operation)
            document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            document["security"] = [{"key": []}]
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
