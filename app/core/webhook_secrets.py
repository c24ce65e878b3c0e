"""Secrets of webhooks, and signatures by the convention of Standard Webhooks (standardwebhooks.com).

A secret is HMAC-SHA256(pepper, id of the webhook and number of the secret): it can be made again whenever something is to be
signed, so it is stored nowhere. The pepper is that of the API keys (app.core.keys).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence

PREFIX = "whsec_"
"""By the convention; for secret scanners too."""


def secret_of(pepper: bytes, webhook_id: str, version: int) -> str:
    """The secret of a webhook as its receiver keeps it, `whsec_` and 44 characters of base64."""
    return PREFIX + base64.b64encode(_derive(pepper, f"webhook secret {webhook_id} {version}")).decode()


def mark_of(pepper: bytes) -> str:
    """A name of the pepper that tells nothing of it: which process can sign what."""
    return _derive(pepper, "webhook pepper").hex()[:16]


def signed_headers(message_id: str, body: bytes, secrets: Sequence[str], *, at_s: int) -> Mapping[str, str]:
    """The headers of a message: its id, the time in seconds since 1970, and a signature by each secret."""
    signed = b".".join((message_id.encode(), str(at_s).encode(), body))
    keys = (base64.b64decode(secret.removeprefix(PREFIX)) for secret in secrets)
    signatures = (base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() for key in keys)
    return {
        "Content-Type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(at_s),
        "webhook-signature": " ".join(f"v1,{signature}" for signature in signatures),
    }


def _derive(pepper: bytes, purpose: str) -> bytes:
    # No purpose begins as an API key does, so no secret is the HMAC of a key.
    return hmac.new(pepper, purpose.encode(), hashlib.sha256).digest()
