"""One request per Idempotency-Key: replay the first answer, refuse another request under the same key.

The key is taken in the transaction of the work it stands for, so a crash leaves neither or both. Errors are not kept:
whoever mends a request may send it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse

from app.api.bodies import Received
from app.db.engine import Connection, Engine, Json
from app.db.idempotency import StoredAnswer, find_answer, store_answer, take_key
from app.errors import IdempotencyMismatch


@dataclass(frozen=True, slots=True)
class Once:
    """A request's claim to be done once; without a key every method does nothing."""

    route: str
    key: str | None
    request_hash: str

    @classmethod
    def of(cls, route: str, key: str | None, body: Json | None, received: Received | None = None) -> Once:
        """The claim of a request with this body and these files, whatever the order of its fields and parts."""
        seen = {
            "body": body or None,
            "files": {name: file.sha256 for name, file in received.files.items()} if received else {},
        }
        return cls(route, key, hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest())

    def earlier(self, engine: Engine) -> Response | None:
        """The answer of a finished request with this key, before any work is done again."""
        if self.key is None:
            return None
        with engine.connect() as conn:
            return self._replay(find_answer(conn, route=self.route, key=self.key))

    def take(self, conn: Connection) -> Response | None:
        """Take the key, or give the answer of the twin that was faster. Raises IdempotencyInFlight, IdempotencyMismatch."""
        if self.key is None:
            return None
        return self._replay(take_key(conn, route=self.route, key=self.key, request_hash=self.request_hash))

    def keep(self, conn: Connection, status_code: int, headers: Mapping[str, str], body: dict[str, Any]) -> None:
        """Keep the answer in the transaction of the work."""
        if self.key is not None:
            store_answer(
                conn, route=self.route, key=self.key, status_code=status_code, headers=dict(headers), body=body
            )

    def _replay(self, stored: StoredAnswer | None) -> Response | None:
        if stored is None:
            return None
        if stored.request_hash != self.request_hash:
            raise IdempotencyMismatch()
        headers = {**stored.headers, "Idempotency-Replayed": "true"}
        return JSONResponse(stored.body, status_code=stored.status_code, headers=headers)
