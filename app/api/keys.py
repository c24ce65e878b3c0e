"""API keys of the caller's project: make, read, list, revoke. Admins only; the first key is made with `p2d keys create`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from app.access_errors import InsufficientScope
from app.api.bodies import read_json, receive_json
from app.api.context import Admin, Context, Cursor, IdempotencyKey, KeyId, Limit, Link, Services, page_after, page_of
from app.api.documentation import KEY_BODY, errors
from app.api.etags import IfMatch, IfNoneMatch, require_match, send_view
from app.api.idempotency import Once
from app.core.keys import make_key
from app.db.api_keys import get_key, list_keys, revoke_key
from app.db.engine import Connection
from app.errors import IdempotencyInFlight, IdempotencyMismatch, KeyNotFound, PepperMissing
from app.key_schemas import KeyBody, KeyView, NewKeyView
from app.views import Page

router = APIRouter(tags=["keys"])


@router.post(
    "/keys",
    status_code=201,
    response_model=NewKeyView,
    responses=errors(PepperMissing, IdempotencyInFlight, IdempotencyMismatch),
    openapi_extra=KEY_BODY,
)
async def create_key(request: Request, services: Context, admin: Admin, key: IdempotencyKey) -> Response:
    """Make a key for the caller's project. The answer is the only place where its text ever stands.

    Repeated with its Idempotency-Key, the request makes no second key and is told the first without its text. A key whose
    answer got lost opens nothing for anybody: revoke it by the `id`, and make another under a new Idempotency-Key.
    """
    body = read_json(KeyBody, await receive_json(request, services.settings))
    return await run_in_threadpool(_create, services, admin.project_id, body, key)


@router.get("/keys", responses=errors(InsufficientScope))
def get_keys(services: Context, admin: Admin, link: Link, limit: Limit = 20, cursor: Cursor = None) -> Page[KeyView]:
    """All keys of the project, newest first, in every state."""
    before = page_after(cursor)
    with services.engine.connect() as conn:
        keys = list_keys(conn, limit=limit + 1, before=before)
    views = [KeyView.model_validate(key) for key in keys]
    return link(Page[KeyView].model_validate(page_of(views, [key.id for key in keys], limit)))


@router.get("/keys/{id}", response_model=KeyView, responses=errors(InsufficientScope, KeyNotFound))
def get_one_key(key_id: KeyId, services: Context, admin: Admin, if_none_match: IfNoneMatch = None) -> Response:
    """A key: what it may do, whether it opens anything, and when it was last used."""
    with services.engine.connect() as conn:
        return send_view(_view(conn, key_id), if_none_match)


@router.delete("/keys/{id}", responses=errors(KeyNotFound))
def delete_key(key_id: KeyId, services: Context, admin: Admin, if_match: IfMatch = None) -> KeyView:
    """Revoke a key: from now on it opens nothing. Repeating is harmless; its entry stays.

    With If-Match only if it is still as it was read; a use of the key since then, to the minute, is a change of it too.
    """
    with services.engine.begin() as conn:
        require_match(if_match, lambda: _view(conn, key_id, lock=True))
        key = revoke_key(conn, key_id)
        if key is None:
            raise KeyNotFound(id=key_id)
        services.note(conn, "key.revoke", key_id)
    return KeyView.model_validate(key)


def _view(conn: Connection, key_id: str, *, lock: bool = False) -> KeyView:
    key = get_key(conn, key_id, lock=lock)
    if key is None:
        raise KeyNotFound(id=key_id)
    return KeyView.model_validate(key)


def _create(services: Services, project_id: str, body: KeyBody, idempotency_key: str | None) -> Response:
    once = Once.of("POST /keys", idempotency_key, body.model_dump(mode="json"))
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        key, text = make_key(
            conn,
            services.settings,
            project_id=project_id,
            scope=body.scope,
            name=body.name,
            expires_days=body.expires_days,
        )
        services.note(conn, "key.create", key.id, {"scope": key.scope, "name": key.name})
        view = KeyView.model_validate(key).model_dump(mode="json")
        # Not made again for a replay, as secrets of webhooks are: whoever has pepper and ledger could then make every key.
        once.keep(conn, 201, {}, {**view, "key": None})
    return JSONResponse({**view, "key": text}, status_code=201)
