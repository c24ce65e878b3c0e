"""Selections: a score for every row of a dataset, and the rows page by page, straight from the stored file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import JsonValue

from app.api.context import Context, Cursor, Limit, SelectionId, Services
from app.api.cursors import read_cursor, write_cursor
from app.api.documentation import errors
from app.blobs import BlobStore
from app.db.selections import SelectionRecord, get_selection
from app.errors import CursorInvalid, SelectionNotFound
from app.views import Page, SelectionView

router = APIRouter(tags=["selections"])

Kept = Annotated[bool | None, Query(description="Only rows that were kept (or dropped).")]


@router.get("/selections/{id}", responses=errors(SelectionNotFound))
def get_one_selection(selection_id: SelectionId, services: Context) -> SelectionView:
    """A selection; a later job over the same dataset may name it as `data.selection`."""
    return SelectionView.model_validate(_find(services, selection_id))


@router.get("/selections/{id}/rows", responses=errors(SelectionNotFound, CursorInvalid))
def get_selection_rows(
    selection_id: SelectionId, services: Context, limit: Limit = 20, cursor: Cursor = None, kept: Kept = None
) -> Page[dict[str, JsonValue]]:
    """The rows in file order: line, score, rank and whether each was kept; the text of kept rows only."""
    found = _find(services, selection_id)
    start = _offset(services.blobs, cursor, found)
    rows: list[dict[str, Any]] = []
    for offset, line in _lines(services.blobs, found.sha256, start, found.size_bytes):
        row = json.loads(line)
        if kept is not None and row.get("kept") is not kept:
            continue
        if len(rows) == limit:  # one more than asked for, so there is a next page, and it begins here
            return Page(data=rows, has_more=True, next_cursor=write_cursor([offset]))
        rows.append(row)
    return Page(data=rows, has_more=False)


def _lines(blobs: BlobStore, sha256: str, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Yield each line with the offset at which it begins; the file never changes, so an offset is a good cursor."""
    if start >= size:
        return
    rest, offset = b"", start
    for chunk in blobs.stream(sha256, start, size):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield offset, line
            offset += len(line) + 1
    if rest:
        yield offset, rest


def _offset(blobs: BlobStore, cursor: str | None, found: SelectionRecord) -> int:
    if cursor is None:
        return 0
    value = read_cursor(cursor)
    if not (isinstance(value, list) and len(value) == 1 and type(value[0]) is int):
        raise CursorInvalid()
    offset = int(value[0])
    if not 0 < offset < found.size_bytes or b"".join(blobs.stream(found.sha256, offset - 1, offset)) != b"\n":
        raise CursorInvalid()
    return offset


def _find(services: Services, selection_id: str) -> SelectionRecord:
    with services.engine.connect() as conn:
        found = get_selection(conn, selection_id)
    if found is None:
        raise SelectionNotFound(id=selection_id)
    return found
