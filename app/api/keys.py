"""API keys of the caller's project: make, list, revoke. Admins only; the first key is made with `p2d keys create`."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from app.access_errors import InsufficientScope
from app.api.bodies import read_json, receive_json
from app.api.context import Admin, Context, Cursor, IdempotencyKey, KeyId, Limit, Link, Services, page_after, page_of
from app.api.documentation import KEY_BODY, errors
from app.api.idempotency import Once
from app.core.keys import make_key
from app.db.api_keys import list_keys, revoke_key
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


@router.delete("/keys/{id}", responses=errors(KeyNotFound))
def delete_key(key_id: KeyId, services: Context, admin: Admin) -> KeyView:
    """Revoke a key: from now on it opens nothing. Repeating is harmless; its entry stays."""
    with services.engine.begin() as conn:
        key = revoke_key(conn, key_id)
        if key is None:
            raise KeyNotFound(id=key_id)
        services.note(conn, "key.revoke", key_id)
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
