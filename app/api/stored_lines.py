"""Pages of a stored JSON Lines file, read where they stand: the file never changes, so an offset is a good cursor."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from app.api.cursors import read_cursor, write_cursor
from app.blobs import Blob, BlobStore
from app.errors import CursorInvalid
from app.views import Page

PAGE_BYTES = 4 << 20
"""Where a page ends at the latest, but never before its first entry: rows may be a mebibyte each."""


def page_of_lines(
    blobs: BlobStore, blob: Blob, *, cursor: str | None, limit: int, want: Callable[[Any], bool] = lambda entry: True
) -> Page[Any]:
    """Up to `limit` entries that are wanted, from the cursor on. Raises CursorInvalid, BlobMissing, StoreUnavailable."""
    start, taken = _offset(blobs, cursor, blob), 0
    entries: list[Any] = []
    for offset, line in blobs.lines(blob.sha256, blob.size_bytes, start):
        entry = json.loads(line)
        if not want(entry):
            continue
        if len(entries) == limit or (entries and taken + len(line) > PAGE_BYTES):
            return Page(data=entries, has_more=True, next_cursor=write_cursor([offset]))
        entries.append(entry)
        taken += len(line)
    return Page(data=entries, has_more=False)


def _offset(blobs: BlobStore, cursor: str | None, blob: Blob) -> int:
    if cursor is None:
        return 0
    value = read_cursor(cursor)
    if not (isinstance(value, list) and len(value) == 1 and type(value[0]) is int):
        raise CursorInvalid()
    offset = int(value[0])
    if not 0 < offset < blob.size_bytes or b"".join(blobs.stream(blob.sha256, offset - 1, offset)) != b"\n":
        raise CursorInvalid()
    return offset
