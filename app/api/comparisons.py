"""Comparisons: two to twenty jobs side by side, as JSON, as a table and as a page. Only the ids are stored."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from app.api.bodies import read_json, receive_json
from app.api.context import (
    ComparisonId,
    Context,
    Cursor,
    IdempotencyKey,
    Limit,
    Link,
    Services,
    page_after,
    page_of,
)
from app.api.documentation import COMPARISON_BODY, errors
from app.api.etags import IfMatch, IfNoneMatch, require_match, send_view
from app.api.idempotency import Once
from app.comparison_schemas import ComparedJobView, ComparisonBody, ComparisonSummary, ComparisonView
from app.core.comparing import Compared, compared, read_facts
from app.db.comparisons import (
    ComparisonRecord,
    delete_comparison,
    get_comparison,
    insert_comparison,
    list_comparisons,
)
from app.db.engine import Connection
from app.db.jobs import get_job
from app.errors import (
    ComparisonNotFound,
    IdempotencyInFlight,
    IdempotencyMismatch,
    JobNotFound,
    StoreUnavailable,
)
from app.problems import invalid
from app.views import Page
from p2d.comparison import Comparison, Facts, compare
from p2d.comparison_views import to_csv, to_html
from p2d.errors import ErrorDetail

router = APIRouter(tags=["comparisons"])


def _file(media_type: str) -> dict[int | str, dict[str, object]]:
    return {200: {"description": "The file.", "content": {media_type: {}}}}


@router.post(
    "/comparisons",
    status_code=201,
    response_model=ComparisonSummary,
    responses=errors(JobNotFound, IdempotencyInFlight, IdempotencyMismatch),
    openapi_extra=COMPARISON_BODY,
)
async def create_comparison(request: Request, services: Context, key: IdempotencyKey) -> Response:
    """Put jobs side by side, in whatever state: what they have not made yet is null, and there once they have."""
    body = read_json(ComparisonBody, await receive_json(request, services.settings))
    return await run_in_threadpool(_create, services, body, key)


@router.get("/comparisons")
def get_comparisons(services: Context, link: Link, limit: Limit = 20, cursor: Cursor = None) -> Page[ComparisonSummary]:
    """All comparisons, newest first."""
    before = page_after(cursor)
    with services.engine.connect() as conn:
        found = list_comparisons(conn, limit=limit + 1, before=before)
    views = [ComparisonSummary.model_validate(one) for one in found]
    return link(Page[ComparisonSummary].model_validate(page_of(views, [one.id for one in found], limit)))


# The paths with an ending come first: `{id}` would take `cmp_....html` too.


@router.get(
    "/comparisons/{id}.csv",
    response_class=Response,
    responses={**_file("text/csv"), **errors(ComparisonNotFound, StoreUnavailable)},
)
def get_comparison_csv(comparison_id: ComparisonId, services: Context) -> Response:
    """Everything as a table, a line for each value."""
    _, _, jobs, found = _compute(services, comparison_id)
    return Response(to_csv(jobs, found), media_type="text/csv")


@router.get(
    "/comparisons/{id}.html",
    response_class=Response,
    responses={**_file("text/html"), **errors(ComparisonNotFound, StoreUnavailable)},
)
def get_comparison_html(comparison_id: ComparisonId, services: Context) -> Response:
    """One page that loads nothing else, to keep or to send."""
    record, _, jobs, found = _compute(services, comparison_id)
    headers = {
        # No script may run, whatever stands in a name.
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
        "X-Content-Type-Options": "nosniff",
    }
    page = to_html(record.name or f"Comparison of {len(jobs)} jobs", jobs, found)
    return Response(page, media_type="text/html", headers=headers)


@router.get("/comparisons/{id}", response_model=ComparisonView, responses=errors(ComparisonNotFound, StoreUnavailable))
def get_one_comparison(comparison_id: ComparisonId, services: Context, if_none_match: IfNoneMatch = None) -> Response:
    """Configuration, heads, rows, held-out losses, curves, seconds and cost of the jobs, as far as each has got."""
    return send_view(_view(services, comparison_id), if_none_match)


@router.delete("/comparisons/{id}", status_code=204, responses=errors(ComparisonNotFound, StoreUnavailable))
def remove_comparison(comparison_id: ComparisonId, services: Context, if_match: IfMatch = None) -> None:
    """Forget a comparison; its jobs stay. With If-Match only if none of them has got further since it was read."""
    # Without a lock: its files would be read under it, and what changes it is its jobs.
    require_match(if_match, lambda: _view(services, comparison_id))
    with services.engine.begin() as conn:
        if not delete_comparison(conn, comparison_id):
            raise ComparisonNotFound(id=comparison_id)
        services.note(conn, "comparison.delete", comparison_id)


def _create(services: Services, body: ComparisonBody, key: str | None) -> Response:
    once = Once.of("POST /comparisons", key, body.model_dump(mode="json"))
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        _check(conn, body.job_ids)
        record = insert_comparison(conn, name=body.name, job_ids=body.job_ids)
        services.note(conn, "comparison.create", record.id, {"job_ids": record.job_ids})
        view = ComparisonSummary.model_validate(record).model_dump(mode="json")
        headers = {"Location": f"/comparisons/{record.id}"}
        once.keep(conn, 201, headers, view)
    return JSONResponse(view, status_code=201, headers=headers)


def _check(conn: Connection, job_ids: list[str]) -> None:
    """Raise RequestInvalid or JobNotFound with every id that cannot be compared."""
    twice = [place for place, job_id in enumerate(job_ids) if job_id in job_ids[:place]]
    if twice:
        text = "The job is in the list already."
        raise invalid([_fault("field.given_twice", text, place) for place in twice])
    absent = [place for place, job_id in enumerate(job_ids) if get_job(conn, job_id) is None]
    if absent:
        error = JobNotFound(id=job_ids[absent[0]])
        error.errors = tuple(_fault(error.code, "There is no such job.", place) for place in absent)
        error.errors_total = len(absent)
        raise error


def _fault(code: str, text: str, place: int) -> ErrorDetail:
    return ErrorDetail(code=code, message=text, pointer=f"/job_ids/{place}")


def _compute(
    services: Services, comparison_id: str
) -> tuple[ComparisonRecord, list[ComparedJobView], list[Facts], Comparison]:
    with services.engine.connect() as conn:
        record = get_comparison(conn, comparison_id)
        if record is None:
            raise ComparisonNotFound(id=comparison_id)
        ledger = compared(conn, record.job_ids)
    read = [read_facts(services.blobs, one) for one in ledger]
    jobs = [facts for facts, _ in read]
    views = [_job(one, missing) for one, (_, missing) in zip(ledger, read, strict=True)]
    return record, views, jobs, compare(jobs)


def _job(one: Compared, missing: list[str]) -> ComparedJobView:
    if one.job is None:
        return ComparedJobView(id=one.id, name="", status="deleted", missing=missing)
    return ComparedJobView(id=one.id, name=one.job.name, status=one.job.status, missing=missing)


def _view(services: Services, comparison_id: str) -> ComparisonView:
    record, jobs, _, found = _compute(services, comparison_id)
    fields: dict[str, Any] = asdict(found) | {"jobs": jobs}
    return ComparisonView.model_validate({**asdict(record), **fields})
