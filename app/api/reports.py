"""Reports on files that were refused: what was wrong, counted and listed. Those on datasets are at the datasets."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

from fastapi import APIRouter, Query, Response

from app.api.content import STORED
from app.api.context import Context, Cursor, Limit, Link, ReportId, Services, page_after, page_of
from app.api.documentation import errors
from app.api.etags import IfMatch, IfNoneMatch, require_match, send_view
from app.api.receipts import receipt
from app.api.stored_lines import page_of_lines
from app.blobs import Blob
from app.core.refusals import Refusal, keep_report
from app.db.reports import ReportRecord, delete_report, get_report, list_reports
from app.errors import ReportNotFound
from app.key_schemas import ReceiptView
from app.views import FaultView, Page, ReportView
from p2d.errors import P2DError

router = APIRouter(tags=["datasets"])

ManyAtOnce = Annotated[int, Query(ge=1, le=1000, description="Entries of one page.")]


@contextlib.contextmanager
def reporting(services: Services) -> Iterator[list[Refusal]]:
    """What is refused inside the block leaves a report, to which the error then links. Yields where refusals are put."""
    refused: list[Refusal] = []
    try:
        yield refused
    except P2DError as error:
        if refused and (report_id := keep_report(services.engine, services.blobs, services.settings, refused)):
            error.report = f"/reports/{report_id}"
        raise


@router.get("/reports")
def get_reports(services: Context, link: Link, limit: Limit = 20, cursor: Cursor = None) -> Page[ReportView]:
    """The reports on files of the project that were refused, newest first."""
    before = page_after(cursor)
    with services.engine.connect() as conn:
        found = list_reports(conn, limit=limit + 1, before=before)
    return link(Page[ReportView].model_validate(page_of([*map(_view, found)], [one.id for one in found], limit)))


@router.get("/reports/{id}", response_model=ReportView, responses=errors(ReportNotFound))
def get_one_report(report_id: ReportId, services: Context, if_none_match: IfNoneMatch = None) -> Response:
    """What was wrong with a file, counted by code. A file that was refused is not stored; its report is, for some days."""
    return send_view(_view(_find(services, report_id)), if_none_match)


@router.get("/reports/{id}/errors", responses=errors(ReportNotFound, *STORED))
def get_report_errors(
    report_id: ReportId, services: Context, link: Link, limit: ManyAtOnce = 100, cursor: Cursor = None
) -> Page[FaultView]:
    """Everything that was wrong, in the order of the file; of more than 100,000 bad rows the first ones."""
    report = _find(services, report_id)
    blob = Blob(report.sha256, report.stored_bytes)
    return link(page_of_lines(services.blobs, blob, cursor=cursor, limit=limit))


@router.delete("/reports/{id}", responses=errors(ReportNotFound))
def delete_one_report(report_id: ReportId, services: Context, if_match: IfMatch = None) -> ReceiptView:
    """Delete a report before its time."""
    # Without a lock: a report is deleted or as it was made.
    require_match(if_match, lambda: _view(_find(services, report_id)))
    with services.engine.begin() as conn:
        report = get_report(conn, report_id)
        if report is None or not delete_report(conn, report_id):
            raise ReportNotFound(id=report_id)
        return receipt(services, conn, "report", report_id, [report.sha256])


def _find(services: Services, report_id: str) -> ReportRecord:
    with services.engine.connect() as conn:
        report = get_report(conn, report_id)
    if report is None:
        raise ReportNotFound(id=report_id)
    return report


def _view(report: ReportRecord) -> ReportView:
    own = {name: getattr(report, name) for name in ("id", "name", "code", "detail", "created_at", "expires_at")}
    return ReportView.model_validate({**report.report, **own})
