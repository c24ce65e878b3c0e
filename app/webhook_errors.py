"""Errors of webhooks. A branch of the tree in app.errors."""

from __future__ import annotations

from app.access_errors import TooMuch
from app.errors import Conflict, NotFound, RequestInvalid
from p2d.errors import ErrorDetail


class WebhookNotFound(NotFound):
    """No webhook of that id."""

    code, what = "webhook.not_found", "webhook"


class DeliveryNotFound(NotFound):
    """No delivery of that id to this webhook, or it was removed because it had ended long ago."""

    code, what = "delivery.not_found", "delivery"


class WebhookRefused(RequestInvalid):
    """A URL that the service sends nothing to: not https, not public, or not allowed."""

    code, hint = (
        "webhook.refused",
        "Give an https URL of a public host. One inside, on another port or over http, the operator has to name in "
        "P2D_WEBHOOK_INSIDE, and P2D_WEBHOOK_HOSTS has to allow the others.",
    )

    def __init__(self, reason: str) -> None:
        super().__init__(reason, errors=[ErrorDetail(code="field.url", message=reason, pointer="/url")])


class WebhookDisabled(Conflict):
    """Nothing is sent to a webhook that is disabled."""

    code, hint = "webhook.disabled", "PATCH it with `enabled: true` once its receiver answers again."

    def __init__(self, *, id: str) -> None:
        super().__init__(f"The webhook {id!r} is disabled.", id=id)


class TooManyWebhooks(TooMuch):
    """As many webhooks of one project as the service allows."""

    code, hint = "limit.webhooks", "Delete one, or let one take more events."

    def __init__(self, *, limit: int) -> None:
        super().__init__(f"The project has {limit} webhooks, which is the most.", limit=limit)
