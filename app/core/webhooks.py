"""Webhooks: what a project is told of, when a delivery is tried again, and when its receiver is given up.

Functions take a Connection and never commit. `tell_webhooks` belongs into the transaction of the change itself, so that
none is lost and none is told that was rolled back; workers.postman sends.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

from app.core.egress import Egress, target_of
from app.core.keys import open_pepper
from app.core.webhook_secrets import mark_of, secret_of
from app.dataset_errors import EgressOff, SourceInvalid, SourceRefused
from app.db.api_keys import any_key
from app.db.audit import SERVICE, append_entry
from app.db.deliveries import (
    Delivery,
    DeliveryStatus,
    end_try,
    fail_deliveries,
    find_delivery,
    get_delivery,
    insert_deliveries,
    requeue_delivery,
)
from app.db.engine import Connection, Json
from app.db.ids import new_id
from app.db.jobs import Job, Status
from app.db.measures import count_try
from app.db.projects import lock_project
from app.db.usage import webhooks_made
from app.db.webhooks import (
    Heard,
    Reason,
    Webhook,
    find_webhook,
    get_webhook,
    insert_webhook,
    listeners,
    note_failure,
    rotate_secret,
    unknown_webhooks,
    update_webhook,
)
from app.settings import Settings
from app.webhook_errors import TooManyWebhooks, WebhookDisabled, WebhookNotFound, WebhookRefused
from p2d.errors import ErrorDetail

EVENTS = tuple(f"job.{status}" for status in get_args(Status))
"""What a webhook may be told of: that a job got this status."""

TEST = "webhook.test"
"""The type of the event that a user sends to see whether it arrives."""

JITTER = 0.2
"""Share of a delay that chance may add, so that what failed together is not tried together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """How a try went: the status of the answer, if there was one, and what was wrong, if something was."""

    status: int | None = None
    error: str | None = None

    @property
    def delivered(self) -> bool:
        """The receiver has it."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """The receiver wants no more."""
        return self.status == 410


def postbox_of(settings: Settings) -> Egress:
    """What may be sent to whom, as the operator allows it."""
    return Egress(
        allowed=settings.webhook_hosts,
        inside=settings.webhook_inside,
        max_bytes=0,
        max_s=settings.webhook_timeout_s,
    )


def check_url(settings: Settings, url: str) -> None:
    """Raise WebhookRefused unless the URL may be sent to, as far as its text tells; its addresses are checked at each try."""
    try:
        target_of(url, allowed=settings.webhook_hosts, inside=settings.webhook_inside)
    except EgressOff:
        raise WebhookRefused("The operator allows no webhooks to this host.") from None
    except (SourceInvalid, SourceRefused) as error:
        raise WebhookRefused(error.text) from None


# --- what users ask --------------------------------------------------------------------------------------------------


def make_webhook(
    conn: Connection,
    settings: Settings,
    *,
    url: str,
    events: Sequence[str],
    jobs: Heard,
    description: str,
    enabled: bool,
) -> Webhook:
    """Record a webhook of the caller's project. Raises WebhookRefused, TooManyWebhooks, PepperMissing."""
    check_url(settings, url)
    lock_project(conn)  # until the commit: who counts next sees this one
    if (made := webhooks_made(conn)) >= settings.quota_webhooks:
        raise TooManyWebhooks(limit=settings.quota_webhooks)
    pepper = open_pepper(settings, in_use=made > 0 or any_key(conn))
    return insert_webhook(
        conn,
        id=new_id("wh"),
        url=url,
        events=events,
        jobs=jobs,
        description=description,
        enabled=enabled,
        pepper_mark=mark_of(pepper),
    )


def change_webhook(conn: Connection, settings: Settings, webhook_id: str, changes: Mapping[str, Any]) -> Webhook:
    """Write what is to differ; enabling forgets why it was disabled. Raises WebhookNotFound, WebhookRefused."""
    webhook = find_webhook(conn, webhook_id, lock=True)
    values = dict(changes)
    if "url" in values:
        check_url(settings, values["url"])
    if "enabled" in values:
        values |= {"disabled_reason": None, "failing_since": None}
    return update_webhook(conn, webhook_id, **values) if values else webhook


def rotate(conn: Connection, settings: Settings, webhook_id: str) -> Webhook:
    """Give a webhook its next secret. Raises WebhookNotFound, PepperMissing."""
    find_webhook(conn, webhook_id, lock=True)
    return rotate_secret(conn, webhook_id, pepper_mark=mark_of(open_pepper(settings, in_use=True)))


def send_test(conn: Connection, webhook_id: str) -> Delivery:
    """Record an event that says nothing. Raises WebhookNotFound, WebhookDisabled."""
    webhook = _enabled(conn, webhook_id)
    data = {"webhook_id": webhook.id}
    return insert_deliveries(conn, webhook.project_id, [webhook.id], type=TEST, data=data)[0]


def redeliver(conn: Connection, webhook_id: str, delivery_id: str) -> Delivery:
    """Send a delivery again, or now. Raises WebhookNotFound, DeliveryNotFound, WebhookDisabled."""
    webhook = _enabled(conn, webhook_id)
    return requeue_delivery(conn, find_delivery(conn, webhook.id, delivery_id).id)


def _enabled(conn: Connection, webhook_id: str) -> Webhook:
    webhook = find_webhook(conn, webhook_id, lock=True)
    if not webhook.enabled:
        raise WebhookDisabled(id=webhook_id)
    return webhook


# --- what happens to jobs --------------------------------------------------------------------------------------------


def named_webhooks(conn: Connection, ids: Sequence[str]) -> Iterator[WebhookNotFound]:
    """What is wrong with the webhooks that a job is to name: one error for each that the caller's project does not have."""
    unknown = set(unknown_webhooks(conn, ids))
    for place, one in enumerate(ids):
        if one in unknown:
            error = WebhookNotFound(id=one)
            error.errors = (ErrorDetail(code=error.code, message=error.text, pointer=f"/webhooks/{place}"),)
            error.errors_total = 1
            yield error


def tell_webhooks(conn: Connection, job: Job) -> None:
    """Record that a job got its status, for every webhook of its project that is to hear of it."""
    type = f"job.{job.status}"
    if told := listeners(conn, job.project_id, type, named=job.webhooks):
        insert_deliveries(conn, job.project_id, told, type=type, data=_told_of(job), job_id=job.id)


def _told_of(job: Job) -> Json:
    data: Json = {"id": job.id, "kind": job.kind, "name": job.name, "status": job.status, "metadata": job.metadata}
    if job.error is not None:  # without its list of faults and its facts: they may be long, and GET /jobs/{id} has them
        shown = ("code", "fault", "retryable", "detail", "hint")
        data["error"] = {name: job.error[name] for name in shown if name in job.error}
    return data


# --- what is sent ----------------------------------------------------------------------------------------------------


def payload_of(delivery: Delivery) -> Json:
    """The message, as Standard Webhooks lays it out."""
    at = delivery.created_at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"type": delivery.type, "timestamp": at, "data": delivery.data}


def body_of(delivery: Delivery) -> bytes:
    """The bytes of the message: the same at every try."""
    return json.dumps(payload_of(delivery), ensure_ascii=False, separators=(",", ":")).encode()


def secrets_of(webhook: Webhook, pepper: bytes, *, old_secret_h: float) -> list[str]:
    """The secrets that sign now: the newest, and for some hours the one before."""
    versions = [webhook.secret_version]
    if webhook.rotated_at is not None and datetime.now(UTC) < webhook.rotated_at + timedelta(hours=old_secret_h):
        versions.append(webhook.secret_version - 1)
    return [secret_of(pepper, webhook.id, version) for version in versions]


def settle(conn: Connection, settings: Settings, delivery: Delivery, sent: Sent) -> None:
    """Record how a try went, and what follows: the next one, the end, or the end of the webhook."""
    webhook = get_webhook(conn, delivery.webhook_id, lock=True)
    now = get_delivery(conn, delivery.id)
    if webhook is None or now is None:
        return  # deleted meanwhile
    delays, delay_s = settings.webhook_retry_s, 0.0
    status: DeliveryStatus = "delivered" if sent.delivered else "failed"
    if not sent.delivered and not sent.gone and now.tries <= len(delays):
        status = "pending"
        if now.tries:  # else it was asked for again meanwhile
            delay_s = delays[now.tries - 1] * (1 + random.uniform(0, JITTER))  # noqa: S311 - jitter
    if not end_try(conn, delivery, status=status, response_status=sent.status, error=sent.error, next_in_s=delay_s):
        return  # its lease had run out, and another try is under way
    count_try(conn, "delivered" if sent.delivered else "refused" if sent.status else "unanswered")
    if sent.delivered:
        if webhook.failing_since is not None:
            update_webhook(conn, webhook.id, failing_since=None)
    elif sent.gone:
        _disable(conn, webhook, "gone")
    elif note_failure(conn, webhook.id, failing_d=settings.webhook_failing_d):
        _disable(conn, webhook, "failing")


def _disable(conn: Connection, webhook: Webhook, reason: Reason) -> None:
    if not webhook.enabled:
        return
    update_webhook(conn, webhook.id, enabled=False, disabled_reason=reason)
    fail_deliveries(conn, webhook.id, "The webhook was disabled.")
    facts = {"reason": reason}
    append_entry(
        conn, actor=SERVICE, action="webhook.disable", object_id=webhook.id, facts=facts, project_id=webhook.project_id
    )
