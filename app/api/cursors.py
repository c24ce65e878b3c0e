"""Cursors of lists: an opaque word for where a page ends. What stands in one is the business of the list."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from app.errors import CursorInvalid


def write_cursor(value: str | list[int]) -> str:
    """An opaque word for where a page ends."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> Any:
    """What `write_cursor` was given. Raises CursorInvalid."""
    try:
        return json.loads(base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True))
    except (ValueError, binascii.Error, RecursionError):
        raise CursorInvalid() from None
