"""Turn any error into `application/problem+json` (RFC 9457), and hold the one table from catalogue code to status.

No other shape of error leaves the service. What an error means stands on its class in `p2d.errors` or `app.errors`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic_core import ErrorDetails
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import app.access_errors as access_errors
import app.dataset_errors as dataset_errors
import app.errors as service_errors
import app.result_errors as result_errors
import app.webhook_errors as webhook_errors
from app.db.engine import DatabaseUnavailable, PoolTimeout, SchemaBehind
from app.db.ids import new_id
from app.field_faults import expected_and_got
from p2d.config_checks import AUTO_OR_NULL, OR_AUTO
from p2d.errors import ErrorDetail, P2DError
from p2d.wording import counted

MEDIA_TYPE = "application/problem+json"

STATUS = {
    "internal.error": 500,
    "config.invalid": 422,
    "config.unknown_name": 422,
    "dataset.invalid": 422,
    "dataset.empty": 422,
    "dataset.file_missing": 422,
    "dataset.mapping": 422,
    "dataset.too_small": 422,
    "dataset.too_large": 413,
    "dataset.row_too_long": 422,
    "dataset.template_refuses": 422,
    "dataset.too_costly": 422,
    "dataset.reader_died": 422,
    "source.egress_off": 403,
    "source.invalid": 422,
    "source.refused": 403,
    "source.failed": 502,
    "dataset.not_found": 404,
    "dataset.in_use": 409,
    "report.not_found": 404,
    "upload.not_found": 404,
    "upload.part_wrong": 422,
    "upload.incomplete": 409,
    "upload.completed": 409,
    "upload.too_many_versions": 409,
    "upload.hash_mismatch": 422,
    "store.no_signed_urls": 409,
    "model.invalid": 422,
    "model.not_found": 404,
    "model.unsupported": 422,
    "model.name_taken": 409,
    "adapter.base_mismatch": 422,
    "engine.failed": 500,
    "engine.diverged": 422,
    "engine.out_of_memory": 503,
    "run.out_in_use": 409,
    "run.out_unusable": 422,
    "request.malformed": 400,
    "request.invalid": 422,
    "request.too_large": 413,
    "request.too_slow": 408,
    "request.unsupported_media_type": 415,
    "request.method_not_allowed": 405,
    "request.no_such_path": 404,
    "request.range": 416,
    "request.cursor": 422,
    "request.precondition_failed": 412,
    "request.conflict": 409,
    "auth.not_allowed": 403,
    "auth.key_refused": 401,
    "auth.insufficient_scope": 403,
    "limit.reached": 429,
    "limit.requests": 429,
    "limit.jobs": 429,
    "limit.streams": 429,
    "limit.storage": 429,
    "limit.webhooks": 429,
    "key.not_found": 404,
    "webhook.not_found": 404,
    "webhook.refused": 422,
    "webhook.disabled": 409,
    "delivery.not_found": 404,
    "resource.not_found": 404,
    "artifact.not_found": 404,
    "artifact.expired": 410,
    "artifact.in_use": 409,
    "artifact.not_an_adapter": 409,
    "artifact.not_a_base_model": 409,
    "head_map.not_found": 404,
    "head_map.mismatch": 409,
    "head_map.invalid": 422,
    "head_map.in_use": 409,
    "head_map.ranks_nothing": 409,
    "selection.ranks_nothing": 409,
    "selection.not_found": 404,
    "comparison.not_found": 404,
    "selection.mismatch": 409,
    "selection.in_use": 409,
    "selection.row_not_found": 404,
    "idempotency.mismatch": 422,
    "idempotency.in_flight": 409,
    "job.not_found": 404,
    "job.already_final": 409,
    "job.move_not_allowed": 409,
    "job.deadline_passed": 409,
    "job.in_use": 409,
    "job.results_gone": 409,
    # Why a job ended: met in `job.error`; the status is what an answer with this code would have.
    "job.cancelled": 409,
    "job.failed": 500,
    "job.worker_lost": 500,
    "job.limit_reached": 422,
    "job.stalled": 500,
    "process.failed": 500,
    "step.lease_lost": 409,
    "service.unavailable": 503,
    "service.no_keys": 500,
    "service.pepper_missing": 500,
    "service.too_many_streams": 503,
    "service.intake_full": 503,
    "service.disk_full": 507,
    "database.unavailable": 503,
    "database.not_migrated": 503,
    "database.role_missing": 500,
    "database.in_use": 503,
    "store.unavailable": 503,
    "store.object_missing": 500,
    "store.object_corrupt": 500,
}
"""Status of every code of the catalogue. A test holds this table and the error classes together."""

RETRY_AFTER_S = {
    "service.disk_full": 60,
    "database.not_migrated": 30,
    "idempotency.in_flight": 1,
    "service.too_many_streams": 30,
    "service.intake_full": 10,
}
"""Seconds in Retry-After; 5 for every other retryable answer."""

_AUTO = {"literal['auto']": OR_AUTO, "literal['auto',None]": AUTO_OR_NULL}
"""What pydantic calls the second half of a type such as `int | Auto`, and how we name it behind the first."""

_TAG = re.compile(r"<\w+>")
"""Our names for the types that a field may have, which pydantic puts among the places of a fault."""

_SOURCES = {"https", "s3", "hf"}
"""And the word by which it tells sources apart."""

BEARER = {
    "auth.key_refused": 'Bearer realm="p2d"',
    "auth.insufficient_scope": 'Bearer realm="p2d", error="insufficient_scope", scope="{needed}"',
}
"""WWW-Authenticate of answers about keys (RFC 6750)."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = structlog.get_logger()


def catalogue() -> dict[str, type[P2DError]]:
    """Every error class by its code, engine's and service's. Where classes share a code the most general stands for it."""
    assert service_errors  # imported, so that its subclasses are known
    assert access_errors
    assert dataset_errors
    assert result_errors
    assert webhook_errors
    found: dict[str, type[P2DError]] = {}
    todo: list[type[P2DError]] = [P2DError]
    while todo:
        cls = todo.pop(0)
        found.setdefault(cls.code, cls)
        todo.extend(cls.__subclasses__())
    return found


def problem_body(
    error: Mapping[str, Any], *, instance: str | None = None, request_id: str | None = None
) -> dict[str, Any]:
    """The wire form of an error: an answer's body and `job.error` alike.

    Args:   error: what P2DError.to_json gives.
            instance: the path of what it happened to.
    """
    code = str(error["code"])
    cls = catalogue().get(code, P2DError)
    body = {
        "type": f"/errors/{code}",
        "title": (cls.__doc__ or code).splitlines()[0].rstrip("."),
        "status": STATUS.get(code, 500),
        **error,
        "errors": [{key: value for key, value in fault.items() if value is not None} for fault in error["errors"]],
    }
    if instance is not None:
        body["instance"] = instance
    if request_id is not None:
        body["request_id"] = request_id
    return body


def answer(request: Request, error: P2DError, *, headers: Mapping[str, str] | None = None) -> Response:
    """The response that says `error`."""
    body = problem_body(error.to_json(), instance=quote(request.scope["path"]), request_id=request_id(request))
    # Also set by RequestIds, but an answer to an unknown exception is sent from outside of it.
    extra = {**(headers or {}), "X-Request-Id": body["request_id"]}
    if body["retryable"] and body["status"] != 500:
        extra["Retry-After"] = str(error.facts.get("retry_after_s", RETRY_AFTER_S.get(error.code, 5)))
    if error.code in BEARER:
        extra["WWW-Authenticate"] = BEARER[error.code].format(**error.facts)
    if error.code == "request.range":
        extra["Content-Range"] = f"bytes */{error.facts['size_bytes']}"
    return Response(
        json.dumps(body, ensure_ascii=False, allow_nan=False, default=str).encode("utf-8", "replace"),
        status_code=body["status"],
        media_type=MEDIA_TYPE,
        headers=extra,
    )


def request_id(request: Request) -> str:
    """The id that names this request in answers and logs."""
    return str(request.scope.get("p2d.request_id", ""))


class RequestIds:
    """Name every request, by the caller's own X-Request-Id where that is a plain word, and say the name in the answer.

    The answer also gets the headers that the door noted in `p2d.headers`, whoever made it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        noted: dict[str, str] = {}
        scope["p2d.headers"] = noted
        scope["p2d.request_id"] = name = given if _REQUEST_ID.fullmatch(given) else new_id("req")

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = name
                headers.update(noted)
            await send(message)

        await self._app(scope, receive, named)


def body_faults(errors: Iterable[ErrorDetails], *, root: str = "") -> list[ErrorDetail]:
    """Pydantic's faults as ours: a JSON pointer each, and never the value that was sent.

    Of a field that is something or "auto" pydantic tells two faults, one for each, under names of its own: here it is one.
    """
    found = list(errors)
    autos = {
        error["loc"][:-1]: _AUTO[str(error["loc"][-1])] for error in found if error["loc"] and error["loc"][-1] in _AUTO
    }
    faults = []
    for error in found:
        loc, message = error["loc"], _expected(error)
        field = next((auto for auto in autos if len(loc) > len(auto) and loc[: len(auto)] == auto), None)
        if field is not None:
            if loc[-1] in _AUTO:
                continue
            loc = field + loc[len(field) + 1 :]
            message += autos[field] if loc == field else ""
        expected, got = expected_and_got(error)
        if expected and field is not None:
            expected += autos[field] if loc == field else ""
        pointer = root + _pointer(loc)
        faults.append(
            ErrorDetail(
                code=f"field.{error['type']}", message=f"{message}.", pointer=pointer, expected=expected, got=got
            )
        )
    return faults


def _expected(error: ErrorDetails) -> str:
    return 'Expected a JSON list, as in ["a", "b"]' if error["type"] == "list_type" else error["msg"]


def invalid(faults: list[ErrorDetail]) -> service_errors.RequestInvalid:
    """The error that lists wrong fields."""
    text = counted(len(faults), "field of the request is wrong.", "fields of the request are wrong.")
    return service_errors.RequestInvalid(text, errors=faults)


def install(app: FastAPI) -> None:
    """Register the handlers that leave no error in another shape."""

    @app.exception_handler(P2DError)
    def known(request: Request, error: P2DError) -> Response:
        if STATUS[error.code] >= 500 and error.fault == "capacity":
            log.warning("request.refused", code=error.code, request_id=request_id(request))
        elif STATUS[error.code] >= 500:
            log.error("request.failed", code=error.code, request_id=request_id(request), exc_info=error)
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    def wrong_fields(request: Request, error: RequestValidationError) -> Response:
        return answer(request, invalid(body_faults(error.errors())))

    @app.exception_handler(HTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:  # the router names the methods of one route, a path may have several
            headers["Allow"] = ", ".join(_allowed(request))
        return answer(request, _http_error(request, error), headers=headers)

    @app.exception_handler(DatabaseUnavailable)
    @app.exception_handler(PoolTimeout)
    def database(request: Request, error: Exception) -> Response:
        found = access_errors.NotMigrated() if isinstance(error, SchemaBehind) else service_errors.DatabaseUnavailable()
        log.error(found.code, request_id=request_id(request), exc_info=error)
        return answer(request, found)

    @app.exception_handler(ClientDisconnect)
    def gone(request: Request, error: Exception) -> Response:
        log.info("request.aborted", request_id=request_id(request))
        return Response(status_code=499)  # nobody reads it; for the access log

    @app.exception_handler(Exception)
    def unknown(request: Request, error: Exception) -> Response:
        # uvicorn closes the connection behind it; unless that is said, the client's next request may meet a reset.
        return answer(request, P2DError("The service met an error of its own."), headers={"Connection": "close"})


def _http_error(request: Request, error: HTTPException) -> P2DError:
    if error.status_code == 404:
        return service_errors.RouteNotFound("There is no such path.")
    if error.status_code == 405:
        return service_errors.MethodNotAllowed(f"This path has no {request.method}.")
    return service_errors.RequestError("The request cannot be read.")


def _allowed(request: Request) -> list[str]:
    methods, scope = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT"), request.scope
    app: FastAPI = request.app
    return [
        method
        for method in methods
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in app.router.routes)
    ]


def _pointer(loc: tuple[int | str, ...]) -> str:
    places = [str(part) for part in loc]
    real = [
        place
        for before, place in zip(["", *places], places, strict=False)
        if not (_TAG.fullmatch(place) or (before == "source" and place in _SOURCES))
    ]
    return "".join("/" + place.replace("~", "~0").replace("/", "~1") for place in real)
