"""Cursors of lists: an opaque word for where a page ends. What stands in one is the business of the list."""

from __future__ import annotations

import base64
import binascii
import hashlib
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


def mark_cursor(cursor: str, place: str) -> str:
    """The cursor, marked as one of the list that `place` names."""
    return _mark(place) + cursor


def unmarked(cursor: str, place: str) -> str:
    """What `mark_cursor` was given. Raises CursorInvalid for the cursor of another list."""
    mark = _mark(place)
    if not cursor.startswith(mark):
        raise CursorInvalid()
    return cursor.removeprefix(mark)


def _mark(place: str) -> str:
    """Six characters: no secret, only against mistakes."""
    return hashlib.sha256(place.encode()).hexdigest()[:6]
