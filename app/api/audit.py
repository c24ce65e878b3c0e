"""The audit log of the caller's project, for admins. It is written where things are done."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app.access_errors import InsufficientScope
from app.api.context import Admin, Context, Cursor, Limit, Link, page_after, page_of
from app.api.documentation import errors
from app.db.audit import list_entries
from app.key_schemas import AuditView
from app.schemas import Text
from app.views import Page

router = APIRouter(tags=["audit"])

Object = Annotated[
    Text | None, Query(alias="object", max_length=64, description="Only what was done to the thing of this id.")
]


@router.get("/audit", responses=errors(InsufficientScope))
def get_audit(
    services: Context, admin: Admin, link: Link, limit: Limit = 20, cursor: Cursor = None, of: Object = None
) -> Page[AuditView]:
    """Who did what and when, newest first. Entries never change, and stay when their thing is gone."""
    before = page_after(cursor)
    with services.engine.connect() as conn:
        entries = list_entries(conn, limit=limit + 1, before=before, object_id=of)
    views = [AuditView.model_validate(entry) for entry in entries]
    return link(Page[AuditView].model_validate(page_of(views, [entry.id for entry in entries], limit)))
