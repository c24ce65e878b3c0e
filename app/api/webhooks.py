"""Webhooks of the caller's project: make, list, change, rotate, delete, and see and repeat what was sent. Admins only.

A secret is told once. It is not in what is kept for an Idempotency-Key either: for a repeated request it is made again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from app.access_errors import InsufficientScope
from app.api.bodies import read_json, receive_json
from app.api.context import (
    Admin,
    Context,
    Cursor,
    DeliveryId,
    IdempotencyKey,
    Limit,
    Link,
    Services,
    WebhookId,
    page_after,
    page_of,
)
from app.api.documentation import WEBHOOK_BODY, WEBHOOK_PATCH_BODY, errors
from app.api.etags import IfMatch, IfNoneMatch, require_match, send_view
from app.api.idempotency import Once
from app.core.keys import open_pepper
from app.core.webhook_secrets import secret_of
from app.core.webhooks import change_webhook, make_webhook, payload_of, redeliver, rotate, send_test
from app.db.audit import Action
from app.db.deliveries import Delivery, list_deliveries
from app.db.engine import Connection, Json
from app.db.webhooks import Webhook, delete_webhook, find_webhook, list_webhooks
from app.errors import (
    IdempotencyInFlight,
    IdempotencyMismatch,
    PepperMissing,
)
from app.views import Page
from app.webhook_errors import (
    DeliveryNotFound,
    TooManyWebhooks,
    WebhookDisabled,
    WebhookNotFound,
    WebhookRefused,
)
from app.webhook_schemas import DeliveryView, NewSecretView, WebhookBody, WebhookPatch, WebhookView

router = APIRouter(tags=["webhooks"])

_ONCE = (IdempotencyInFlight, IdempotencyMismatch)

DeliveryStatus = Annotated[
    Literal["pending", "delivered", "failed"] | None, Query(description="Only deliveries of this status.")
]


@router.post(
    "/webhooks",
    status_code=201,
    response_model=NewSecretView,
    responses=errors(WebhookRefused, TooManyWebhooks, PepperMissing, *_ONCE),
    openapi_extra=WEBHOOK_BODY,
)
async def create_webhook(request: Request, services: Context, admin: Admin, key: IdempotencyKey) -> Response:
    """Have a URL told of what becomes of the project's jobs. The answer is the only place where its secret ever stands.

    Every message is signed by the convention of Standard Webhooks, tried again until it is answered with 2xx, and may come
    twice: its `webhook-id` stays the same.
    """
    body = read_json(WebhookBody, await receive_json(request, services.settings))

    def make(conn: Connection) -> Webhook:
        webhook = make_webhook(conn, services.settings, **body.model_dump())
        services.note(conn, "webhook.create", webhook.id, _facts(webhook))
        return webhook

    once = Once.of("POST /webhooks", key, body.model_dump())
    return await run_in_threadpool(_tell_secret, services, once, 201, make)


@router.get("/webhooks", responses=errors(InsufficientScope))
def get_webhooks(
    services: Context, admin: Admin, link: Link, limit: Limit = 20, cursor: Cursor = None
) -> Page[WebhookView]:
    """All webhooks of the project, newest first."""
    before = page_after(cursor)
    with services.engine.connect() as conn:
        found = list_webhooks(conn, limit=limit + 1, before=before)
    views = [WebhookView.model_validate(webhook) for webhook in found]
    return link(Page[WebhookView].model_validate(page_of(views, [webhook.id for webhook in found], limit)))


@router.get("/webhooks/{id}", response_model=WebhookView, responses=errors(InsufficientScope, WebhookNotFound))
def get_one_webhook(
    webhook_id: WebhookId, services: Context, admin: Admin, if_none_match: IfNoneMatch = None
) -> Response:
    """A webhook, and whether its receiver answers."""
    with services.engine.connect() as conn:
        view = WebhookView.model_validate(find_webhook(conn, webhook_id))
    return send_view(view, if_none_match)


@router.patch(
    "/webhooks/{id}",
    response_model=WebhookView,
    responses=errors(WebhookNotFound, WebhookRefused),
    openapi_extra=WEBHOOK_PATCH_BODY,
)
async def patch_webhook(
    request: Request, webhook_id: WebhookId, services: Context, admin: Admin, if_match: IfMatch = None
) -> Response:
    """Change where it is, what it is told, or whether it is told at all. What waits goes to the new URL."""
    patch = read_json(WebhookPatch, await receive_json(request, services.settings))
    changes = patch.model_dump(exclude_unset=True)
    if "description" in changes:
        changes["description"] = changes["description"] or ""

    def change() -> Webhook:
        with services.engine.begin() as conn:
            _require_match(conn, webhook_id, if_match)
            webhook = change_webhook(conn, services.settings, webhook_id, changes)
            services.note(conn, "webhook.update", webhook_id, {"changed": sorted(changes), **_facts(webhook)})
        return webhook

    return send_view(WebhookView.model_validate(await run_in_threadpool(change)))


@router.delete("/webhooks/{id}", status_code=204, responses=errors(WebhookNotFound))
def delete_one_webhook(webhook_id: WebhookId, services: Context, admin: Admin, if_match: IfMatch = None) -> None:
    """Remove a webhook and its deliveries; what waits to be sent is not sent."""
    with services.engine.begin() as conn:
        _require_match(conn, webhook_id, if_match)
        webhook = delete_webhook(conn, webhook_id)
        if webhook is None:
            raise WebhookNotFound(id=webhook_id)
        services.note(conn, "webhook.delete", webhook_id, _facts(webhook))


@router.post(
    "/webhooks/{id}/rotate", response_model=NewSecretView, responses=errors(WebhookNotFound, PepperMissing, *_ONCE)
)
def rotate_webhook(webhook_id: WebhookId, services: Context, admin: Admin, key: IdempotencyKey) -> Response:
    """Make a new secret. The one before signs too, beside it, for the hours of `P2D_WEBHOOK_OLD_SECRET_H`.

    Rotate twice where a secret must be worth nothing at once: only two sign.
    """

    def make(conn: Connection) -> Webhook:
        webhook = rotate(conn, services.settings, webhook_id)
        services.note(conn, "webhook.rotate", webhook_id, {"secret_version": webhook.secret_version})
        return webhook

    return _tell_secret(services, Once.of(f"POST /webhooks/{webhook_id}/rotate", key, None), 200, make)


@router.post(
    "/webhooks/{id}/test",
    status_code=202,
    response_model=DeliveryView,
    responses=errors(WebhookNotFound, WebhookDisabled, *_ONCE),
)
def test_webhook(webhook_id: WebhookId, services: Context, admin: Admin, key: IdempotencyKey) -> Response:
    """Send an event of the type `webhook.test`, the way of all others; the list of deliveries tells what became of it."""
    route = f"POST /webhooks/{webhook_id}/test"
    return _send(services, route, key, webhook_id, "webhook.test", lambda conn: send_test(conn, webhook_id))


@router.get("/webhooks/{id}/deliveries", responses=errors(InsufficientScope, WebhookNotFound))
def get_deliveries(
    webhook_id: WebhookId,
    services: Context,
    admin: Admin,
    link: Link,
    limit: Limit = 20,
    cursor: Cursor = None,
    status: DeliveryStatus = None,
) -> Page[DeliveryView]:
    """What was sent, what waits and what was given up, newest first; kept for the days of `P2D_WEBHOOK_KEPT_D`."""
    before = page_after(cursor)
    with services.engine.connect() as conn:
        find_webhook(conn, webhook_id)
        found = list_deliveries(conn, webhook_id, limit=limit + 1, before=before, status=status)
    page = page_of([_view(one) for one in found], [one.id for one in found], limit)
    return link(Page[DeliveryView].model_validate(page))


@router.post(
    "/webhooks/{id}/deliveries/{delivery}/redeliver",
    status_code=202,
    response_model=DeliveryView,
    responses=errors(WebhookNotFound, DeliveryNotFound, WebhookDisabled, *_ONCE),
)
def redeliver_one(
    webhook_id: WebhookId, delivery_id: DeliveryId, services: Context, admin: Admin, key: IdempotencyKey
) -> Response:
    """Send a delivery again, whatever became of it, or now if it waits: the same message under the same `webhook-id`."""
    route = f"POST /webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver"
    return _send(
        services, route, key, delivery_id, "webhook.redeliver", lambda conn: redeliver(conn, webhook_id, delivery_id)
    )


def _require_match(conn: Connection, webhook_id: str, if_match: str | None) -> None:
    require_match(if_match, lambda: WebhookView.model_validate(find_webhook(conn, webhook_id, lock=True)))


def _tell_secret(services: Services, once: Once, status_code: int, make: Callable[[Connection], Webhook]) -> Response:
    """Make a webhook or a secret once, and answer with the secret: the first time, and to the same request again."""
    if (replay := once.earlier(services.engine)) is not None:
        return _with_secret(services, replay)
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return _with_secret(services, replay)
        view = WebhookView.model_validate(make(conn)).model_dump(mode="json")
        once.keep(conn, status_code, {}, view)
    return _with_secret(services, JSONResponse(view, status_code=status_code))


def _with_secret(services: Services, answer: Response) -> Response:
    view: Json = json.loads(bytes(answer.body))
    pepper = open_pepper(services.settings, in_use=True)
    secret = secret_of(pepper, view["id"], view["secret_version"])
    replayed = {name: value for name, value in answer.headers.items() if name == "idempotency-replayed"}
    return JSONResponse({**view, "secret": secret}, status_code=answer.status_code, headers=replayed)


def _send(
    services: Services,
    route: str,
    key: str | None,
    object_id: str,
    action: Action,
    send: Callable[[Connection], Delivery],
) -> Response:
    once = Once.of(route, key, None)
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        delivery = send(conn)
        services.note(conn, action, object_id, {"webhook_id": delivery.webhook_id, "delivery_id": delivery.id})
        view = _view(delivery).model_dump(mode="json")
        once.keep(conn, 202, {}, view)
    services.waker.wake(services.settings.worker_queue)  # a hint only: workers look for deliveries anyway
    return JSONResponse(view, status_code=202)


def _view(delivery: Delivery) -> DeliveryView:
    shown = {name: getattr(delivery, name) for name in DeliveryView.model_fields if name != "payload"}
    if delivery.status != "pending":
        shown["next_try_at"] = None
    return DeliveryView.model_validate({**shown, "payload": payload_of(delivery)})


def _facts(webhook: Webhook) -> Json:
    # Without its query, which may hold a key of the receiver's.
    return {
        "url": webhook.url.partition("?")[0],
        "events": webhook.events,
        "jobs": webhook.jobs,
        "enabled": webhook.enabled,
    }
