"""Selections: made alone, listed, and every row with its score, page by page or one with its reasons; the kept rows as a file.

`ratio` gives another view of a selection: other rows are kept of the same ranking, and no model is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from pydantic import JsonValue

from app.access_errors import StorageFull, TooManyJobs
from app.api.bodies import receive
from app.api.content import STORED, primed
from app.api.context import Context, Cursor, IdempotencyKey, Limit, Link, SelectionId, Services, page_after, page_of
from app.api.cursors import read_cursor, write_cursor
from app.api.documentation import SELECTION_BODY, errors
from app.api.etags import IfMatch, IfNoneMatch, require_match, send_view
from app.api.head_maps import OfDataset, OfModel, OfScorer
from app.api.job_requests import FILES, REFUSALS
from app.api.jobs import queue_stage
from app.api.receipts import receipt
from app.api.stored_lines import PAGE_BYTES, page_of_lines
from app.blobs import Blob, BlobStore
from app.core.results import delete_selection
from app.core.row_reasons import nearest, reason_of, sources_of, text_of
from app.db.datasets import get_dataset
from app.db.selections import SelectionRecord, get_selection, list_selections
from app.errors import (
    CursorInvalid,
    DatasetNotFound,
    IdempotencyInFlight,
    IdempotencyMismatch,
    SelectionNotFound,
)
from app.key_schemas import ReceiptView
from app.result_errors import SelectionInUse, SelectionRanksNothing, SelectionRowNotFound
from app.result_schemas import GuideScaleView, PlacedRowView, RowReasonView, SelectionBody, SelectionView
from app.views import JobView, Page, TurnView
from p2d.config import UNIFORM, top_count
from p2d.response_matrix import ALONE
from p2d.rows import Row, conversation, stored_row
from p2d.selection_table import SelectionTable

router = APIRouter(tags=["selections"])

Kept = Annotated[bool | None, Query(description="Only rows that were kept (or dropped).")]
Order = Annotated[Literal["row", "score"], Query(description="In the order of the file, or best first.")]
Ratio = Annotated[
    float | None,
    Query(gt=0, le=1, allow_inf_nan=False, description="Share of rows that is kept; absent = the selection's own."),
]
RowNumber = Annotated[int, Path(ge=0, le=2**31 - 1, description="0-based, as `row` in the rows.")]

_MORE = (IdempotencyInFlight, IdempotencyMismatch, StorageFull, TooManyJobs)
_LINES: dict[int | str, dict[str, Any]] = {
    200: {"description": "One row a line, `prompt` and `answer`.", "content": {"application/x-ndjson": {}}},
}


@router.post(
    "/selections",
    status_code=202,
    response_model=JobView,
    responses=errors(*REFUSALS, *_MORE),
    openapi_extra=SELECTION_BODY,
)
async def create_selection(request: Request, services: Context, key: IdempotencyKey) -> Response:
    """Score all rows of a dataset: 202 with a job of kind `select_data`, whose `selection` it then is."""
    async with receive(request, services.settings, files=FILES, json_part="job", json=True) as received:
        return await run_in_threadpool(
            queue_stage, services, received, key, shape=SelectionBody, kind="select_data", path="/selections"
        )


@router.get("/selections")
def get_selections(
    services: Context,
    link: Link,
    limit: Limit = 20,
    cursor: Cursor = None,
    base_model: OfModel = None,
    dataset: OfDataset = None,
    scorer: OfScorer = None,
) -> Page[SelectionView]:
    """All selections, newest first."""
    before = page_after(cursor)
    with services.engine.connect() as conn:
        found = list_selections(
            conn, limit=limit + 1, before=before, base_model=base_model, dataset_id=dataset, scorer=scorer
        )
    views = [SelectionView.model_validate(one) for one in found]
    return link(Page[SelectionView].model_validate(page_of(views, [one.id for one in found], limit)))


@router.get(
    "/selections/{id}",
    response_model=SelectionView,
    responses=errors(SelectionNotFound, SelectionRanksNothing, *STORED),
)
def get_one_selection(
    selection_id: SelectionId, services: Context, ratio: Ratio = None, if_none_match: IfNoneMatch = None
) -> Response:
    """A selection; a later job over the same dataset may name it as `data.selection`."""
    found = _find(services, selection_id, ratio)
    kept = found.kept if ratio is None else services.tables.get(services.blobs, found).kept_at(ratio)
    return send_view(SelectionView.model_validate({**asdict(found), "kept": kept, "ratio": ratio}), if_none_match)


@router.delete("/selections/{id}", responses=errors(SelectionNotFound, SelectionInUse))
def delete_one_selection(selection_id: SelectionId, services: Context, if_match: IfMatch = None) -> ReceiptView:
    """Delete a selection and its file. Refused while a job that has not ended needs it; its job stays.

    The ETag for If-Match is that of the selection without another `ratio`.
    """
    # Without a lock: a selection is deleted or as it was made.
    require_match(if_match, lambda: SelectionView.model_validate(_find(services, selection_id)))
    with services.engine.begin() as conn:
        return receipt(services, conn, "selection", selection_id, delete_selection(conn, selection_id))


# --- rows ------------------------------------------------------------------------------------------------------------


@router.get("/selections/{id}/rows", responses=errors(SelectionNotFound, SelectionRanksNothing, *STORED))
def get_selection_rows(
    selection_id: SelectionId,
    services: Context,
    link: Link,
    limit: Limit = 20,
    cursor: Cursor = None,
    kept: Kept = None,
    order: Order = "row",
    ratio: Ratio = None,
) -> Page[dict[str, JsonValue]]:
    """The rows: line, score, rank and whether each is kept; the text of rows that are kept and that the selection itself keeps.

    A row that nearly repeats a better-scored one names it in `repeats`, and ranks behind all that repeat none.

    `/rows/{row}` and `/export` have the text of the others.
    """
    found = _find(services, selection_id, ratio)
    if order == "score":
        return link(_best_first(services, found, limit=limit, cursor=cursor, kept=kept, ratio=ratio))
    page = page_of_lines(
        services.blobs,
        Blob(found.sha256, found.size_bytes),
        cursor=cursor,
        limit=limit,
        want=lambda row: kept is None or _is_kept(row, found, ratio) is kept,
    )
    return link(page.model_copy(update={"data": [_seen_at(row, found, ratio) for row in page.data]}))


@router.get(
    "/selections/{id}/rows/{row}",
    responses=errors(SelectionNotFound, SelectionRowNotFound, SelectionRanksNothing, *STORED),
)
def get_selection_row(
    selection_id: SelectionId, row: RowNumber, services: Context, ratio: Ratio = None
) -> RowReasonView:
    """Why a row is kept or dropped: its score, what each chosen head adds to it, and its neighbours in the ranking.

    The figures add up to the score, but for what is drawn among rows that are good enough. Where files of the job were deleted,
    `not_known` names them and the parts are absent.
    """
    found = _find(services, selection_id, ratio)
    table = services.tables.get(services.blobs, found)
    if row >= table.rows:
        raise SelectionRowNotFound(row=row, rows=table.rows)
    with services.engine.connect() as conn:
        sources = sources_of(conn, found, row)
    reason = reason_of(services.blobs, sources, row)
    kept = table.kept_at(ratio)
    of_ranks = reason is not None and reason.combine in ("worse_rank", "rank")
    by_response, by_quality = table.rank_parts(row, reason.combine) if reason and of_ranks else (None, None)
    near = [None if at is None else _placed(table, at, kept) for at in nearest(table, row, kept)]
    text = text_of(services.blobs, sources, row) or _own_text(services.blobs, found, table, row)
    return RowReasonView(
        **_placed(table, row, kept).model_dump(),
        prompt=text.prompt if text else None,
        answer=text.answer if text else None,
        before=[TurnView.model_validate(turn) for turn in text.before] if text else [],
        formula=reason.formula if reason else None,
        drawn=reason is not None and reason.bar is not None and bool(table.score_R[row] >= reason.bar),
        response=reason.response if reason and reason.combine not in ALONE and not reason.unscored else None,
        heads=[asdict(head) for head in reason.heads] if reason else [],
        stand_ins=reason.stand_ins if reason else 0,
        stand_in=reason.stand_in if reason else 0.0,
        scored=table.scored,
        guide=GuideScaleView.model_validate(reason.guide) if reason and reason.guide else None,
        response_rank=by_response,
        quality_rank=by_quality,
        border=float(table.score_R[table.row_by_rank[kept - 1]]),
        nearest_kept=near[0],
        nearest_dropped=near[1],
        not_known=list(sources.missing),
    )


@router.get(
    "/selections/{id}/export",
    response_class=Response,
    responses={**_LINES, **errors(SelectionNotFound, DatasetNotFound, SelectionRanksNothing, *STORED)},
)
def export_selection(selection_id: SelectionId, services: Context, ratio: Ratio = None) -> Response:
    """The kept rows as JSON Lines, in the order of the dataset, from which they are read: it must not be deleted yet."""
    found = _find(services, selection_id, ratio)
    table = services.tables.get(services.blobs, found)
    with services.engine.begin() as conn:
        dataset = get_dataset(conn, found.dataset_id)
        if dataset is None:
            raise DatasetNotFound(id=found.dataset_id)
        kept = table.kept_at(ratio)
        services.note(conn, "selection.export", selection_id, {"rows": kept, "dataset_id": dataset.id})
    lines = set(table.line_R[table.rank_R < kept].tolist())
    stored = services.blobs.lines(dataset.sha256, dataset.stored_bytes)
    headers = {
        "Content-Disposition": f'attachment; filename="{selection_id}.jsonl"',
        "X-Content-Type-Options": "nosniff",
    }
    content = primed(_exported((line for _, line in stored), lines))
    return StreamingResponse(content, media_type="application/x-ndjson", headers=headers)


# --- inside ----------------------------------------------------------------------------------------------------------


def _best_first(
    services: Services,
    found: SelectionRecord,
    *,
    limit: int,
    cursor: str | None,
    kept: bool | None,
    ratio: float | None,
) -> Page[dict[str, JsonValue]]:
    table = services.tables.get(services.blobs, found)
    most = table.kept_at(ratio)
    first, end = {None: (0, table.rows), True: (0, most), False: (most, table.rows)}[kept]
    start = max(first, _rank(cursor, table))
    stop = min(end, start + limit)
    spans = [table.span(int(row)) for row in table.row_by_rank[start:stop]]
    while sum(last - first for first, last in spans) > PAGE_BYTES and len(spans) > 1:
        spans.pop()
    stop = start + len(spans)
    lines = services.blobs.ranges(found.sha256, spans)
    rows = [_seen_at(json.loads(line), found, ratio) for line in lines]
    more = stop < end
    # Two numbers: no place in the file, which is what the cursor of the other order holds.
    return Page(data=rows, has_more=more, next_cursor=write_cursor([0, stop]) if more else None)


def _is_kept(row: dict[str, Any], found: SelectionRecord, ratio: float | None) -> bool:
    """Whether a ratio keeps the row of a line of selection.jsonl."""
    if ratio is None:
        return bool(row["kept"])
    return row["score"] is not None and row["rank"] < top_count(ratio, found.rows)


def _seen_at(row: dict[str, Any], found: SelectionRecord, ratio: float | None) -> dict[str, Any]:
    """A line of selection.jsonl as a ratio sees it."""
    kept = _is_kept(row, found, ratio)
    shown = row if kept else {name: value for name, value in row.items() if name not in ("prompt", "answer")}
    return {**shown, "kept": kept}


def _placed(table: SelectionTable, row: int, kept: int) -> PlacedRowView:
    scored = bool(table.score_R[row] == table.score_R[row])  # not NaN
    quality = float(table.quality_R[row])
    return PlacedRowView(
        row=row,
        line=int(table.line_R[row]),
        score=float(table.score_R[row]) if scored else None,
        quality=quality if quality == quality else None,
        rank=int(table.rank_R[row]),
        repeats=int(table.repeats_R[row]) if table.repeats_R[row] >= 0 else None,
        kept=bool(table.rank_R[row] < kept),
    )


def _own_text(blobs: BlobStore, found: SelectionRecord, table: SelectionTable, row: int) -> Row | None:
    """A row that the selection itself keeps."""
    if table.rank_R[row] >= table.kept:
        return None
    return stored_row(json.loads(blobs.ranges(found.sha256, [table.span(row)])[0]))


def _exported(rows: Iterator[bytes], lines: set[int]) -> Iterator[bytes]:
    """Normalised rows of these lines, without the number of the line, which ends each of them (`p2d.rows.row_line`).

    Conversations are written as `messages`, as a dataset file has them.
    """
    for row in rows:
        text, _, line = row.rpartition(b',"line":')
        if int(line.rstrip(b"}")) in lines:
            yield conversation(stored_row(json.loads(row))) if text.startswith(b'{"before":') else text + b"}\n"


def _rank(cursor: str | None, table: SelectionTable) -> int:
    if cursor is None:
        return 0
    value = read_cursor(cursor)
    if not (isinstance(value, list) and len(value) == 2 and all(type(one) is int for one in value)):
        raise CursorInvalid()
    if value[0] != 0 or not 0 < value[1] < table.rows:
        raise CursorInvalid()
    return int(value[1])


def _find(services: Services, selection_id: str, ratio: float | None = None) -> SelectionRecord:
    with services.engine.connect() as conn:
        found = get_selection(conn, selection_id)
    if found is None:
        raise SelectionNotFound(id=selection_id)
    if found.scorer == UNIFORM and ratio is not None and ratio < 1:
        raise SelectionRanksNothing
    return found
