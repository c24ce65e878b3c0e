"""Unpack a dataset file that comes as one gzip or zstd stream, told by its first bytes and never by its name.

What the unpacked bytes hold is `formats.py`'s business. Archives of several files, and other ways to compress, are refused
in words, as their bytes would else be met as a row that is not UTF-8. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from p2d.errors import DatasetError, DatasetTooLarge, ErrorDetail

Compression = Literal["gzip", "zstd"]

_CHUNK_BYTES = 1 << 20
_HEAD_BYTES = 512

_STREAMS: dict[bytes, Compression] = {b"\x1f\x8b\x08": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

_REFUSED = {
    "a zip archive": re.compile(rb"PK\x03\x04|PK\x05\x06"),
    "a tar archive": re.compile(rb".{257}ustar(\x00|  \x00)", re.DOTALL),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "7-Zip": re.compile(rb"7z\xbc\xaf\x27\x1c"),
}

_SUFFIX = re.compile(r"\.(gz|gzip|zst|zstd)$", re.IGNORECASE)


@contextmanager
def unpacked(path: Path, scratch: Path, *, max_bytes: int) -> Iterator[tuple[Path, Compression | None]]:
    """Yield the plain file and how it came: `path` itself, or `scratch`, which is gone when the block is left.

    Several streams one after the other are one file, as gzip and zstd say themselves.
    Raises: DatasetError (a stream that is cut off, broken or followed by other bytes; an archive), DatasetTooLarge as soon
            as more than `max_bytes` have come out.
    """
    compression = _sniff(path)
    if compression is None:
        yield path, None
        return
    try:
        _unpack(path, scratch, compression, max_bytes)
        if _sniff(scratch) is not None:
            raise _refused("The file is compressed twice.")
        yield scratch, compression
    finally:
        scratch.unlink(missing_ok=True)


def plain_name(name: str) -> str:
    """The name that the file has without its compression."""
    return _SUFFIX.sub("", name)


def _sniff(path: Path) -> Compression | None:
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for what, pattern in _REFUSED.items():
        if pattern.match(head):
            raise _refused(f"The file is {what}; send it plain, or as one gzip or zstd stream.")
    return next((kind for magic, kind in _STREAMS.items() if head.startswith(magic)), None)


def _unpack(path: Path, to: Path, compression: Compression, max_bytes: int) -> None:
    import pyarrow  # a quarter of a second, and only compressed files need it

    # Streams that ask for a window above 128 MiB are refused by the zstd library itself.
    with pyarrow.OSFile(str(path)) as raw, pyarrow.CompressedInputStream(raw, compression) as stream:
        size = 0
        with to.open("wb") as file:
            while chunk := _read(stream, compression):
                size += len(chunk)
                if size > max_bytes:
                    raise DatasetTooLarge(f"The file unpacks to more than {max_bytes} bytes.", limit=max_bytes)
                file.write(chunk)


def _read(stream: object, compression: Compression) -> bytes:
    try:
        chunk: bytes = stream.read(_CHUNK_BYTES)  # type: ignore[attr-defined]  # pyarrow has no types
    except OSError as error:
        if error.errno is not None:  # the disk's fault, not the stream's
            raise
        cut = "Truncated" in str(error)
        text = "is cut off" if cut else "is broken, or is followed by bytes that are none of it"
        raise _refused(f"The {compression} stream {text}.") from error
    return chunk


def _refused(text: str) -> DatasetError:
    return DatasetError(text, errors=[ErrorDetail(code="dataset.compression", message=text)])
