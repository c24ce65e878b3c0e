"""Send a stored object: whole or one range, with its sha256 as ETag. Holds no database connection while it sends."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from app.api.etags import matches
from app.blobs import Blob, BlobStore
from app.errors import BlobCorrupt, BlobMissing, RangeNotSatisfiable, StoreUnavailable

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


PARTIAL: dict[int | str, dict[str, object]] = {
    206: {"description": "The range that was asked for.", "content": {"*/*": {}}},
    304: {"description": "The client has it: If-None-Match names its sha256."},
}
"""What a file may be answered with beside the whole of it."""

STORED = (StoreUnavailable, BlobMissing, BlobCorrupt)
"""What reading an object can fail with."""

PART_CHECKED_BYTES = 64 << 20
"""Objects up to this are read and checked whole for a Range too; of a larger one a part is sent as the store gives it."""

URL_LIVES_S = 300
"""Seconds in which a download past this service must have begun."""


def send_blob(
    request: Request, blobs: BlobStore, blob: Blob, *, media_type: str, file_name: str, past: bool = False
) -> Response:
    """Answer with the object, honouring If-None-Match, Range and If-Range; HEAD gets the headers alone.

    An object that does not have its hash is never sent whole: a small one (of one chunk, a MiB) is an error before the first byte,
    of a larger one the connection ends before the last chunk. A Range of a large object is not checked; `Repr-Digest` is for that.

    Args:   past: answer a GET with 307 to a signed URL of the store, where it signs any.
    Raises: RangeNotSatisfiable, BlobMissing, BlobCorrupt, StoreUnavailable - all before the first byte.
    """
    etag = f'"{blob.sha256}"'
    digest = base64.b64encode(bytes.fromhex(blob.sha256)).decode()
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Repr-Digest": f"sha-256=:{digest}:",
        "X-Content-Type-Options": "nosniff",
    }
    if matches(request.headers.get("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    stored = blobs.size(blob.sha256)
    if stored is None:
        raise BlobMissing(sha256=blob.sha256)
    if stored != blob.size_bytes:
        raise BlobCorrupt(sha256=blob.sha256)
    start, end = 0, blob.size_bytes
    wanted = _range(request, etag, blob.size_bytes)
    if wanted is not None:
        start, end = wanted
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size_bytes}"
    disposition = f'attachment; filename="{re.sub(r"[^A-Za-z0-9._-]", "_", file_name)}"'
    if past and blobs.signs and request.method == "GET":
        signed = blobs.sign_get(blob.sha256, media_type=media_type, disposition=disposition, lives_s=URL_LIVES_S)
        return Response(status_code=307, headers={"Location": signed.url, "Cache-Control": "no-store"})
    headers["Content-Length"] = str(end - start)
    headers["Content-Disposition"] = disposition
    status_code = 200 if wanted is None else 206
    if request.method == "HEAD" or start == end:
        return Response(status_code=status_code, headers=headers, media_type=media_type)
    checks = wanted is None or blob.size_bytes <= PART_CHECKED_BYTES
    chunks = primed((blobs.checked if checks else blobs.stream)(blob.sha256, start, end))
    return StreamingResponse(chunks, status_code=status_code, headers=headers, media_type=media_type)


def primed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same chunks, the first of them already read, so that a store that fails still gets an answer of its own."""
    first = next(chunks, b"")

    def rest() -> Iterator[bytes]:
        yield first
        yield from chunks

    return rest()


def _range(request: Request, etag: str, size: int) -> tuple[int, int] | None:
    """Start and end of the one range asked for; None = the whole, also for what this service does not do (RFC 9110)."""
    header, if_range = request.headers.get("range"), request.headers.get("if-range")
    if header is None or (if_range is not None and if_range.strip() != etag):
        return None
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if first == "":
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < int(first):
            return None
    if start >= size or start >= end:
        raise RangeNotSatisfiable(size_bytes=size)
    return start, end
