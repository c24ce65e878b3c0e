"""Uploads in parts: take a part, put all together, remove what is left. The parts lie in the store, not on a disk of ours.

So any API process takes any part, a restart loses none, and a worker on another machine can remove what was given up.
How the bytes of a part arrive is app.api's business; what the whole file means, app.core.ingest's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from app.blobs import BlobStore
from app.dataset_errors import TooManyVersions
from app.db.engine import Connection, Engine
from app.db.objects import outlast_idleness
from app.db.uploads import (
    Part,
    Upload,
    all_parts,
    announce_part,
    confirm_part,
    count_others,
    forget_upload,
    get_upload,
    lock_upload,
    mark_emptied,
    mark_removed,
    parts_of,
    replaced_by,
    uploads_to_empty,
    uploads_to_forget,
)
from app.errors import (
    BlobMissing,
    PartWrong,
    UploadCompleted,
    UploadIncomplete,
    UploadNotFound,
    UploadWrong,
)
from app.presign import SignedUrl
from p2d.errors import ErrorDetail

MAX_PARTS = 10_000
"""Most parts of one upload, as S3 has it."""

MAX_VERSIONS = 10
"""Most different bytes that one part may be announced with; a guess. What was put under signed URLs and never registered lies in
the store until the upload ends, so this bounds how many times its size an upload can take."""

GRACE_H = 1.0
"""Hours after its end in which an upload's row still tells where a part may lie that a slow request brings."""


def part_size(size_bytes: int, least: int) -> int:
    """Bytes of every part but the last, of a file of `size_bytes`."""
    return max(least, -(-size_bytes // MAX_PARTS))


def open_upload(conn: Connection, upload_id: str) -> Upload:
    """The upload, which still takes parts. Raises UploadNotFound, UploadCompleted."""
    upload = lock_upload(conn, upload_id)
    if upload is None:
        raise UploadNotFound(id=upload_id)
    if upload.dataset_id is not None:
        raise UploadCompleted(upload_id=upload.id, dataset_id=upload.dataset_id)
    return upload


def expected_size(engine: Engine, upload_id: str, number: int) -> int:
    """Bytes that the part must have. Raises UploadNotFound, UploadCompleted, PartWrong if the file has no such part."""
    with engine.begin() as conn:
        upload = open_upload(conn, upload_id)
    if number > upload.part_count:
        text = f"The upload has {upload.part_count} parts of {upload.part_bytes} bytes; there is no part {number}."
        raise PartWrong(text, errors=[ErrorDetail(code="upload.no_such_part", message=text, pointer="/path/number")])
    return upload.size_of(number)


def take_part(engine: Engine, blobs: BlobStore, part: Part, path: Path, *, expiry_h: float) -> None:
    """Store a part. The same part again changes nothing; other bytes under its number take its place.

    Raises: UploadNotFound, UploadCompleted: also when the upload ended while the part was on its way. TooManyVersions.
    """
    _announce(engine, part, expiry_h)
    blobs.put_part(part.key, path)
    try:
        while not _confirm(engine, blobs, part):
            blobs.put_part(part.key, path)
    except (UploadNotFound, UploadCompleted):
        blobs.delete_part(part.key)  # the sweep may have been here already
        raise


def offer_part(
    engine: Engine, blobs: BlobStore, part: Part, size_bytes: int, *, lives_s: int, expiry_h: float
) -> SignedUrl:
    """Sign a URL under which this very part can be put. Its row stands before its bytes do, as for a part that is sent here.

    Raises: PresignUnavailable, UploadNotFound, UploadCompleted, TooManyVersions.
    """
    signed = blobs.sign_part(part.key, part.sha256, size_bytes, lives_s=lives_s)
    _announce(engine, part, expiry_h)
    return signed


def register_part(engine: Engine, blobs: BlobStore, part: Part, size_bytes: int) -> None:
    """Take a part that was put under its URL; what it holds is checked when the upload is completed.

    Raises: PartWrong if it is not there, or of another size; UploadNotFound, UploadCompleted.
    """
    there = blobs.part_size(part.key)
    if there != size_bytes:
        raise _not_there(part, there, size_bytes)
    if not _confirm(engine, blobs, part):
        raise _not_there(part, None, size_bytes)


def _not_there(part: Part, there: int | None, size_bytes: int) -> PartWrong:
    found = "is not in the store" if there is None else f"has {there} bytes there"
    text = f"Part {part.number} with this sha256 {found}; expected {size_bytes}."
    return PartWrong(text, errors=[ErrorDetail(code="upload.part_not_there", message=text, pointer="/sha256")])


def _announce(engine: Engine, part: Part, expiry_h: float) -> None:
    with engine.begin() as conn:
        open_upload(conn, part.upload_id)
        if count_others(conn, part) >= MAX_VERSIONS:
            raise TooManyVersions(number=part.number, limit=MAX_VERSIONS)
        announce_part(conn, part, expiry_h=expiry_h)


def _confirm(engine: Engine, blobs: BlobStore, part: Part) -> bool:
    """Say that the part's bytes are stored, and remove those whose place they take.

    False if they were removed meanwhile, for others that came under their number: put them again.
    """
    with engine.begin() as conn:
        open_upload(conn, part.upload_id)
        others = count_others(conn, part)
        if others and blobs.part_size(part.key) is None:
            return False
        confirm_part(conn, part)
    if others:
        # Apart: undone together with the rest, a removal would leave a row that promises bytes.
        _remove_replaced(engine, blobs, part)
    return True


def _remove_replaced(engine: Engine, blobs: BlobStore, part: Part) -> None:
    with engine.begin() as conn:
        outlast_idleness(conn)
        if lock_upload(conn, part.upload_id) is None:
            return  # the sweep removes them all
        for old in replaced_by(conn, part):
            blobs.delete_part(old.key)
            mark_removed(conn, old)


def assemble(engine: Engine, blobs: BlobStore, upload: Upload, path: Path) -> str:
    """Write the whole file to `path`; its sha256.

    Raises: UploadIncomplete with every missing part; PartWrong with every part that holds other bytes than were said; UploadWrong;
            BlobMissing.
    """
    with engine.connect() as conn:
        parts = parts_of(conn, upload.id)
    there = {part.number for part in parts}
    if missing := [number for number in range(1, upload.part_count + 1) if number not in there]:
        raise UploadIncomplete(missing=missing, total=upload.part_count)
    whole, wrong = hashlib.sha256(), list[int]()
    with path.open("wb") as file:
        for part in parts:
            digest = hashlib.sha256()
            try:
                for chunk in blobs.stream_part(part.key, part.sha256):
                    digest.update(chunk)
                    whole.update(chunk)
                    file.write(chunk)
            except BlobMissing:
                if _counts(engine, part):
                    raise
                raise UploadIncomplete(missing=[part.number], total=upload.part_count) from None
            if digest.hexdigest() != part.sha256:
                wrong.append(part.number)
    if wrong:
        raise _other_bytes(wrong)
    if upload.sha256 not in (None, whole.hexdigest()):
        raise UploadWrong(expected=str(upload.sha256), found=whole.hexdigest())
    return whole.hexdigest()


def _counts(engine: Engine, part: Part) -> bool:
    """Whether the part is still the one of its number: it may be replaced while the file is put together."""
    with engine.connect() as conn:
        return part in parts_of(conn, part.upload_id)


def _other_bytes(numbers: list[int]) -> PartWrong:
    """Of parts that went to the store directly; one that was sent here was checked, so the store itself has changed it."""
    details = [
        ErrorDetail(code="upload.part_hash", message=f"Part {number} has another sha256 than was said.")
        for number in numbers
    ]
    return PartWrong(" ".join(detail.message for detail in details), errors=details, parts=numbers)


def sweep_uploads(engine: Engine, blobs: BlobStore) -> None:
    """Remove the parts of uploads that became datasets, were deleted or have expired. Safe to run anywhere, any number."""
    with engine.begin() as conn:
        ended, old = uploads_to_empty(conn), uploads_to_forget(conn, grace_h=GRACE_H)
    for upload_id in {*ended, *old}:
        with engine.begin() as conn:
            parts = all_parts(conn, upload_id)
        for part in parts:
            blobs.delete_part(part.key)
        with engine.begin() as conn:
            forget_upload(conn, upload_id) if upload_id in old else mark_emptied(conn, upload_id)


def ended_meanwhile(engine: Engine, upload_id: str, missing: BlobMissing) -> str:
    """The dataset that the upload became while its parts were read, which is why one is missing. Else raises `missing`."""
    with engine.connect() as conn:
        upload = get_upload(conn, upload_id)
    if upload is None:
        raise UploadNotFound(id=upload_id)
    if upload.dataset_id is None:
        raise missing
    return upload.dataset_id
