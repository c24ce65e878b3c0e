"""Sign URLs of an S3 store, so that a client may get one object, or put one, without the service in between.

Signature Version 4 in its query form, by the method, key, lifetime and headers that are given: whoever changes one of them is
refused by the store. obstore signs neither headers nor queries, and both are needed (docs/decisions/0021). A signed URL is a
secret while it lives: it belongs in an answer, never in a log or the ledger.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlsplit

ALGORITHM = "AWS4-HMAC-SHA256"


@dataclass(frozen=True, kw_only=True, slots=True)
class SignedUrl:
    """A URL that does one thing for a short time."""

    url: str = field(repr=False)
    method: str
    headers: Mapping[str, str]
    """What the request must send, exactly so."""
    expires_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Signer:
    """Signs for one bucket with one pair of keys."""

    base: str
    """URL of the bucket and what is put before every key, without a slash at its end."""
    region: str
    access_key: str
    secret_key: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    """Of temporary credentials."""

    def sign(
        self,
        method: str,
        key: str,
        *,
        lives_s: int,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, str] | None = None,
        now: datetime | None = None,
    ) -> SignedUrl:
        """A URL for this method on this key.

        Args:   headers: of the request, in lower case; signed, so that it must send them so.
                query: of the request, `response-content-type` for example.
        Source: "Authenticating Requests: Using Query Parameters", Amazon S3 API reference.
        """
        now = now or datetime.now(UTC)
        stamp = now.strftime("%Y%m%dT%H%M%SZ")
        place = urlsplit(self.base)
        signed = dict(sorted({"host": place.netloc, **(headers or {})}.items()))
        scope = f"{stamp[:8]}/{self.region}/s3/aws4_request"
        asked = {
            **(query or {}),
            "X-Amz-Algorithm": ALGORITHM,
            "X-Amz-Credential": f"{self.access_key}/{scope}",
            "X-Amz-Date": stamp,
            "X-Amz-Expires": str(lives_s),
            "X-Amz-SignedHeaders": ";".join(signed),
            **({"X-Amz-Security-Token": self.token} if self.token else {}),
        }
        path = f"{place.path}/{quote(key, safe='/-_.~')}"
        text = "&".join(f"{_plain(name)}={_plain(value)}" for name, value in sorted(asked.items()))
        lines = [method, path, text, *(f"{name}:{value}" for name, value in signed.items()), "", ";".join(signed)]
        request = "\n".join([*lines, "UNSIGNED-PAYLOAD"])
        to_sign = "\n".join([ALGORITHM, stamp, scope, hashlib.sha256(request.encode()).hexdigest()])
        signature = hmac.new(self._key(stamp[:8]), to_sign.encode(), "sha256").hexdigest()
        return SignedUrl(
            url=f"{place.scheme}://{place.netloc}{path}?{text}&X-Amz-Signature={signature}",
            method=method,
            headers=dict(headers or {}),
            expires_at=now + timedelta(seconds=lives_s),
        )

    def _key(self, day: str) -> bytes:
        found = f"AWS4{self.secret_key}".encode()
        for part in (day, self.region, "s3", "aws4_request"):
            found = hmac.new(found, part.encode(), "sha256").digest()
        return found


def signer_of(bucket: str, *, endpoint: str, region: str, prefix: str) -> Signer | None:
    """The signer for a bucket with the keys of the environment; None without them, as where a machine has a role instead.

    Args:   endpoint: where the store answers; empty = Amazon's of the region. prefix: put before every key.
    """
    access, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
    if not (access and secret):
        return None
    below = f"/{quote(prefix, safe='/-_.~')}" if prefix else ""
    base = f"{(endpoint or f'https://s3.{region}.amazonaws.com').rstrip('/')}/{bucket}{below}"
    token = os.environ.get("AWS_SESSION_TOKEN") or None
    return Signer(base=base, region=region, access_key=access, secret_key=secret, token=token)


def _plain(text: str) -> str:
    return quote(text, safe="-_.~")
