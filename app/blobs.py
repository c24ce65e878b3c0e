"""Keep immutable bytes in a local folder or an S3 bucket, named by their sha256. One code path on obstore.

What an object means and who refers to it stands in the database; this file knows neither. No client ever names a key.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

import obstore
import structlog
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import LocalStore, ObjectStore, S3Store

from app.errors import BlobCorrupt, BlobMissing, PresignUnavailable, StoreUnavailable
from app.presign import SignedUrl, Signer, signer_of

CHUNK_BYTES = 1 << 20
"""Bytes held at once while an object goes by."""

SMALL_BYTES = 8 << 20
"""Largest object that is written in one piece."""

PART_BYTES = 5 << 20  # S3's least

PARTS = "uploads"
"""Prefix of what uploads in parts leave until they are complete; all else is named by its sha256."""


class Book(Protocol):
    """Where a store writes down what it puts, so that it can be collected once nothing refers to it."""

    def announce(self, sha256: str, size_bytes: int) -> int | None:
        """Before putting; returns what to confirm afterwards, if anything."""

    def confirm(self, sha256: str, generation: int) -> bool:
        """After putting; False: it was removed meanwhile, put it again."""


_SHA256 = re.compile(r"[0-9a-f]{64}")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored object."""

    sha256: str
    size_bytes: int


class BlobStore:
    """Content-addressed storage: put once, read whole or a range, delete."""

    def __init__(self, store: ObjectStore, book: Book | None = None, signer: Signer | None = None) -> None:
        self._store, self._book, self._signer = store, book, signer

    @classmethod
    def open(cls, url: str, book: Book | None = None) -> BlobStore:
        """Open `file:///path` or `s3://bucket/prefix?endpoint=http://host:port&region=r`; raises ValueError for other URLs.

        S3 credentials are read from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), never from the URL.
        Args:   book: `app.core.garbage.ObjectBook`; what is put without one is never collected.
        """
        parts = urlsplit(url)
        if parts.scheme == "file":
            return cls(LocalStore(Path(unquote(parts.path)), automatic_cleanup=False, mkdir=True), book)
        if parts.scheme == "s3" and parts.netloc:
            return cls(_s3(url), book, signer_of(parts.netloc, **_place(url)))
        raise ValueError("a store URL is file:///path or s3://bucket/prefix?endpoint=...")

    def put_file(self, path: Path) -> Blob:
        """Store the file under its hash. Storing the same bytes again is success and writes nothing."""
        with path.open("rb") as file:
            blob = Blob(hashlib.file_digest(file, "sha256").hexdigest(), file.tell())
        while True:
            generation = self._book.announce(blob.sha256, blob.size_bytes) if self._book else None
            self._put(path, blob)
            if self._book is None or generation is None or self._book.confirm(blob.sha256, generation):
                return blob

    def _put(self, path: Path, blob: Blob) -> None:
        with path.open("rb") as file:
            try:
                if blob.size_bytes <= SMALL_BYTES:
                    obstore.put(self._store, key(blob.sha256), file, mode="create")
                elif not self._has(blob):
                    # Not `create`: that reads the whole file into memory. Racing writers write the same bytes, and
                    # both stores show an object only when it is whole.
                    obstore.put(
                        self._store,
                        key(blob.sha256),
                        file,
                        use_multipart=True,
                        chunk_size=PART_BYTES,
                        max_concurrency=2,
                    )
            except AlreadyExistsError:
                self._has(blob)
            except (BaseError, OSError) as error:
                raise StoreUnavailable() from error

    def fetch(self, sha256: str, path: Path) -> Blob:
        """Copy the object to `path`, appearing there only whole and with the right hash. Raises BlobMissing, BlobCorrupt."""
        digest, size = hashlib.sha256(), 0
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".fetch-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                for chunk in self.stream(sha256):
                    digest.update(chunk)
                    size += len(chunk)
                    file.write(chunk)
                _sync(file)
            if digest.hexdigest() != sha256:
                raise BlobCorrupt(sha256=sha256)
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return Blob(sha256, size)

    def stream(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from `start` up to, without, `end`. Raises BlobMissing before the first chunk."""
        options = {"range": (start, end)} if end is not None else {"range": {"offset": start}} if start else None
        yield from self._stream(key(sha256), sha256, options)

    def checked(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The same bytes, but all of the object is read, and the last of them are given only once its hash is right.

        Raises: BlobMissing before the first chunk; BlobCorrupt, which is logged, in place of the last one.
        """
        digest, offset, held = hashlib.sha256(), 0, b""
        for chunk in self.stream(sha256):
            digest.update(chunk)
            part = chunk[max(0, start - offset) : None if end is None else max(0, end - offset)]
            offset += len(chunk)
            if part:
                if held:
                    yield held
                held = part
        if digest.hexdigest() != sha256:
            log.error("object.corrupt", sha256=sha256)  # an answer that has begun can only be cut off
            raise BlobCorrupt(sha256=sha256)
        yield held

    def lines(self, sha256: str, size_bytes: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield each line from `start` on, without its newline, with the byte at which it begins.

        Whoever reads all of them has read what was stored, or met BlobCorrupt before the last ones. Raises: BlobMissing.
        """
        if start >= size_bytes:
            return
        rest, offset = b"", start
        for chunk in self.checked(sha256) if start == 0 else self.stream(sha256, start, size_bytes):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield offset, line
                offset += len(line) + 1
        if rest:
            yield offset, rest

    def ranges(self, sha256: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of several spans (start, end), fetched together. Raises BlobMissing."""
        if not spans:
            return []
        starts, ends = zip(*spans, strict=True)
        try:
            return [bytes(part) for part in obstore.get_ranges(self._store, key(sha256), starts=starts, ends=ends)]
        except FileNotFoundError:
            raise BlobMissing(sha256=sha256) from None
        except (BaseError, OSError) as error:
            raise StoreUnavailable() from error

    def size(self, sha256: str) -> int | None:
        """Size in bytes, or None if the object is not there."""
        return self._size(key(sha256))

    def exists(self, sha256: str) -> bool:
        """Whether the object is there."""
        return self.size(sha256) is not None

    def delete(self, sha256: str) -> None:
        """Remove the object; one that is not there is success."""
        self._delete(key(sha256))

    # --- parts of uploads -------------------------------------------------------------------------------------------
    # Under a prefix of their own: each belongs to one upload and may be removed without asking who else holds the bytes.

    def put_part(self, name: str, path: Path) -> None:
        """Store the file as a part; the same name always stands for the same bytes."""
        try:
            with path.open("rb") as file:
                obstore.put(self._store, f"{PARTS}/{name}", file, chunk_size=PART_BYTES, max_concurrency=2)
        except (BaseError, OSError) as error:
            raise StoreUnavailable() from error

    def stream_part(self, name: str, sha256: str) -> Iterator[bytes]:
        """Yield the bytes of a part. Raises BlobMissing before the first chunk."""
        yield from self._stream(f"{PARTS}/{name}", sha256)

    def delete_part(self, name: str) -> None:
        """Remove a part; one that is not there is success."""
        self._delete(f"{PARTS}/{name}")

    def part_size(self, name: str) -> int | None:
        """Size of a part in bytes, or None if it is not there."""
        return self._size(f"{PARTS}/{name}")

    # --- past this service ------------------------------------------------------------------------------------------

    @property
    def signs(self) -> bool:
        """Whether it can sign URLs: an S3 store, with keys in the environment."""
        return self._signer is not None

    def sign_part(self, name: str, sha256: str, size_bytes: int, *, lives_s: int) -> SignedUrl:
        """A URL under which a part of this size and sha256 can be put. Raises PresignUnavailable.

        The size is signed, so every store refuses another one; the sha256 is a header that Amazon's S3 and others compare with the
        bytes, and which some ignore.
        """
        digest = base64.b64encode(bytes.fromhex(sha256)).decode()
        headers = {"content-length": str(size_bytes), "x-amz-checksum-sha256": digest}
        return self._signing().sign("PUT", f"{PARTS}/{name}", lives_s=lives_s, headers=headers)

    def sign_get(self, sha256: str, *, media_type: str, disposition: str, lives_s: int) -> SignedUrl:
        """A URL under which an object can be fetched, with these headers and no other. Raises PresignUnavailable."""
        answers = {
            "response-cache-control": "private, no-store",
            "response-content-disposition": disposition,
            "response-content-type": media_type,
        }
        return self._signing().sign("GET", key(sha256), lives_s=lives_s, query=answers)

    def _signing(self) -> Signer:
        if self._signer is None:
            raise PresignUnavailable("The store of this service signs no URLs.")
        return self._signer

    # --- all --------------------------------------------------------------------------------------------------------

    def ping(self) -> None:
        """Raise StoreUnavailable unless the store answers."""
        self.exists("0" * 64)

    def _size(self, path: str) -> int | None:
        try:
            return int(obstore.head(self._store, path)["size"])
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise StoreUnavailable() from error

    def _delete(self, path: str) -> None:
        try:
            obstore.delete(self._store, path)
        except FileNotFoundError:
            pass
        except (BaseError, OSError) as error:
            raise StoreUnavailable() from error

    def _stream(self, path: str, sha256: str, options: dict[str, Any] | None = None) -> Iterator[bytes]:
        try:
            found = obstore.get(self._store, path, options=options)  # type: ignore[arg-type]
            for chunk in found.stream(min_chunk_size=CHUNK_BYTES):
                yield bytes(chunk)
        except FileNotFoundError:
            raise BlobMissing(sha256=sha256) from None
        except (BaseError, OSError) as error:
            raise StoreUnavailable() from error

    def _has(self, blob: Blob) -> bool:
        """Whether the object is there; BlobCorrupt if it has another size than it should."""
        size = self.size(blob.sha256)
        if size is not None and size != blob.size_bytes:
            raise BlobCorrupt(sha256=blob.sha256)
        return size is not None


def stream_object(bucket_url: str, path: str) -> Iterator[bytes]:
    """Yield the bytes of an object that is not ours, below the prefix of a URL as `BlobStore.open` takes it.

    Raises: FileNotFoundError before the first chunk, StoreUnavailable.
    """
    try:
        for chunk in obstore.get(_s3(bucket_url), path).stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        raise StoreUnavailable() from error


def _place(url: str) -> dict[str, str]:
    """Endpoint (empty = Amazon's), region and the prefix below the bucket of an S3 URL. Raises ValueError."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    if unknown := set(options) - {"endpoint", "region"}:
        raise ValueError(f"the store URL has options that are not known: {', '.join(sorted(unknown))}")
    prefix = parts.path.strip("/")
    return {"endpoint": options.get("endpoint", ""), "region": options.get("region", "us-east-1"), "prefix": prefix}


def _s3(url: str) -> S3Store:
    place = _place(url)
    return S3Store(
        urlsplit(url).netloc,
        prefix=place["prefix"] or None,
        region=place["region"],
        client_options={"allow_http": place["endpoint"].startswith("http://")},
        retry_config={"max_retries": 5},
        endpoint=place["endpoint"] or None,
    )


def key(sha256: str) -> str:
    """Where an object lies. The folder level keeps local directories small."""
    assert _SHA256.fullmatch(sha256), "not a sha256"
    return f"sha256/{sha256[:2]}/{sha256}"


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
