"""Selections: a score for every row of a dataset, and the rows page by page, straight from the stored file."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import JsonValue

from app.api.context import Context, Cursor, Limit, SelectionId, Services
from app.api.documentation import errors
from app.api.stored_lines import page_of_lines
from app.blobs import Blob
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
    blob = Blob(found.sha256, found.size_bytes)
    return page_of_lines(
        services.blobs, blob, cursor=cursor, limit=limit, want=lambda row: kept is None or row.get("kept") is kept
    )


def _find(services: Services, selection_id: str) -> SelectionRecord:
    with services.engine.connect() as conn:
        found = get_selection(conn, selection_id)
    if found is None:
        raise SelectionNotFound(id=selection_id)
    return found
