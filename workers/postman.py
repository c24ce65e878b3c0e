"""Sends what webhooks are told: threads of a worker that each take a delivery that is due, send it, and record how it went.

Any number of workers may do so: PostgreSQL gives each delivery to one of them, for the time of a lease. One that dies with
it leaves it to another when that has run out, so a receiver may get a message twice, under the same `webhook-id`. What
follows from how a try went, app.core.webhooks says.
"""

from __future__ import annotations

import random
import threading
import time

import structlog

from app.core.egress import Egress
from app.core.keys import read_pepper
from app.core.webhook_secrets import mark_of, signed_headers
from app.core.webhooks import Sent, body_of, postbox_of, secrets_of, settle
from app.dataset_errors import EgressOff, SourceFailed, SourceInvalid, SourceRefused
from app.db.deliveries import Delivery, any_unsignable, claim_delivery
from app.db.engine import Connection, DatabaseUnavailable, Engine
from app.db.webhooks import Webhook, get_webhook
from app.settings import Settings

log = structlog.get_logger()


class Postman:
    """The hands of one worker that send. Set `stopping`, then `wake`: each ends after the try that it is at."""

    def __init__(
        self, db: Engine, settings: Settings, stopping: threading.Event, postbox: Egress | None = None
    ) -> None:
        self._db, self._settings, self._stopping = db, settings, stopping
        self._postbox = postbox or postbox_of(settings)
        self._woken = threading.Event()
        self._hands = [
            threading.Thread(target=self._run, args=(number == 0,), name=f"postman-{number}", daemon=True)
            for number in range(settings.webhook_hands)
        ]

    def start(self) -> None:
        """Start sending."""
        for hand in self._hands:
            hand.start()

    def wake(self) -> None:
        """Look for deliveries now instead of at the next poll."""
        self._woken.set()

    def join(self, deadline: float) -> None:
        """Wait until every hand has ended, or until then by the monotonic clock."""
        for hand in self._hands:
            if hand.ident is not None:
                hand.join(max(deadline - time.monotonic(), 0.0))

    def _run(self, polls: bool) -> None:
        # One hand looks from time to time; whoever finds something calls the others to look too.
        while not self._stopping.is_set():
            self._woken.clear()  # before the look: a wake-up during it must not get lost
            if self._serve():
                continue
            wait_s = self._settings.poll_s * random.uniform(0.8, 1.0)  # noqa: S311 - jitter
            self._woken.wait(wait_s if polls else None)

    def _serve(self) -> bool:
        """Send one delivery; False if none is due, or PostgreSQL is away."""
        try:
            pepper = read_pepper(self._settings)
            mark = None if pepper is None else mark_of(pepper)
            with self._db.begin() as conn:
                found = self._claim(conn, mark)
            if found is None or pepper is None:
                return False
            self._woken.set()
            sent = self._send(*found, pepper)
            with self._db.begin() as conn:
                settle(conn, self._settings, found[0], sent)
        except DatabaseUnavailable as error:
            log.warning("postman.failed", error=type(error).__name__)
            return False
        return True

    def _claim(self, conn: Connection, mark: str | None) -> tuple[Delivery, Webhook] | None:
        settings = self._settings
        if mark is not None:
            lease_s = settings.webhook_timeout_s + settings.lease_s  # resolving a name has no limit of its own
            delivery = claim_delivery(conn, pepper_mark=mark, lease_s=lease_s)
            if delivery is not None:
                webhook = get_webhook(conn, delivery.webhook_id)
                assert webhook is not None, "a delivery without a webhook"
                return delivery, webhook
        if any_unsignable(conn, pepper_mark=mark):
            log.warning("postman.pepper_missing", hint="Set P2D_KEY_PEPPER here too, or P2D_WEBHOOK_HANDS=0.")
        return None

    def _send(self, delivery: Delivery, webhook: Webhook, pepper: bytes) -> Sent:
        body = body_of(delivery)
        secrets = secrets_of(webhook, pepper, old_secret_h=self._settings.webhook_old_secret_h)
        headers = signed_headers(delivery.id, body, secrets, at_s=int(time.time()))
        try:
            status = self._postbox.post(webhook.url, body, headers)
        except (EgressOff, SourceInvalid, SourceRefused, SourceFailed) as error:
            sent = Sent(error=error.text)
        else:
            more = " Redirects are not followed." if 300 <= status < 400 else ""
            sent = Sent(status=status)
            if not sent.delivered:
                sent = Sent(status=status, error=f"The receiver answered with {status}.{more}")
        log.info(
            "webhook.sent", delivery=delivery.id, webhook=webhook.id, attempt=delivery.attempts, status=sent.status
        )
        return sent
