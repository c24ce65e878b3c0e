"""Receive a body: JSON under a small cap, files as a stream to the disk under a large one. Never a file in memory.

Starlette's own form parser caps fields but not files, so the multipart parser's callbacks are used directly. What the
bytes of a file mean is not decided here.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.core.disk_space import need_space
from app.errors import DiskFull, PartWrong, RequestError, RequestTooLarge, UnsupportedMediaType
from app.problems import body_faults, invalid
from app.settings import Settings
from p2d.errors import DatasetTooLarge, ErrorDetail, P2DError
from p2d.validation import DataFile

BUFFER_BYTES = 1 << 20
"""Bytes gathered before they are parsed and written, in a thread."""

MAX_PARTS = 16

DRAIN_BYTES, DRAIN_S = 64 << 20, 10.0
"""How much of a refused body is still read: a client that is writing would else meet a reset instead of the answer."""


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """One file of a body."""

    path: Path
    name: str
    """As the client calls it: a label, never a path."""
    sha256: str
    size_bytes: int

    def data(self) -> DataFile:
        """The same as one whose rows are to be checked."""
        return DataFile(path=self.path, name=self.name)


@dataclass(frozen=True, slots=True)
class Received:
    """A whole body."""

    files: dict[str, ReceivedFile] = field(default_factory=dict)
    json: bytes | None = None
    plain: bool = False
    """Whether the body is the JSON alone."""


@contextlib.asynccontextmanager
async def receive(
    request: Request, settings: Settings, *, files: Collection[str], json_part: str | None = None, json: bool = False
) -> AsyncIterator[Received]:
    """Receive a body; its files lie in a folder of their own until the block is left.

    Args:   files: names of the file parts that are taken. json_part: name of the part that holds JSON.
            json: whether a plain JSON body is taken too.
    Raises: UnsupportedMediaType, RequestTooLarge, DatasetTooLarge, RequestError, DiskFull.
    """
    media_type, options = parse_options_header(request.headers.get("content-type"))
    if json and media_type == b"application/json":
        yield Received(json=await _read_json(request, settings.max_json_bytes), plain=True)
    elif media_type == b"multipart/form-data" and options.get(b"boundary"):
        try:
            need_space(settings)
        except DiskFull:
            await drain(request.stream())
            raise
        with work_folder(settings) as folder:
            form = _Form(folder, settings, files, json_part)
            yield await _read_form(request, form, options[b"boundary"])
    else:
        raise UnsupportedMediaType(expected=["multipart/form-data", *(["application/json"] if json else [])])


async def receive_json(request: Request, settings: Settings) -> bytes:
    """A body that is JSON or a JSON merge patch, or nothing. Raises UnsupportedMediaType, RequestTooLarge."""
    media_type, _ = parse_options_header(request.headers.get("content-type"))
    body = await _read_json(request, settings.max_json_bytes)
    if body and media_type not in (b"application/json", b"application/merge-patch+json"):
        raise UnsupportedMediaType(expected=["application/json", "application/merge-patch+json"])
    return body


@contextlib.asynccontextmanager
async def receive_bytes(request: Request, settings: Settings, expect: Callable[[], int]) -> AsyncIterator[ReceivedFile]:
    """Receive a body that is plain bytes; the file lies in a folder of its own until the block is left.

    Args:   expect: gives the size that the body must have, in a thread, before anything is written.
    Raises: PartWrong for another size, whatever `expect` raises, DiskFull.
    """
    stream = request.stream()
    try:
        size = await run_in_threadpool(expect)
        need_space(settings)
        with work_folder(settings) as folder:
            yield await _read_bytes(stream, folder / "part", size)
    except P2DError:
        await drain(stream)
        raise


async def _read_bytes(stream: AsyncIterator[bytes], path: Path, size: int) -> ReceivedFile:
    digest, buffer, total = hashlib.sha256(), bytearray(), 0

    def write() -> None:
        digest.update(buffer)
        file.write(buffer)
        buffer.clear()

    with path.open("wb") as file:
        async for chunk in stream:
            buffer += chunk
            total += len(chunk)
            if total > size:
                break
            if len(buffer) >= BUFFER_BYTES:
                await run_in_threadpool(write)
        await run_in_threadpool(write)
    if total != size:
        got = "more" if total > size else f"{total} bytes"
        text = f"Expected {size} bytes, got {'more' if total > size else total}."
        detail = ErrorDetail(code="upload.part_size", message=text, expected=f"{size} bytes", got=got)
        raise PartWrong(text, errors=[detail], expected=size)
    return ReceivedFile(path, "", digest.hexdigest(), total)


@contextlib.contextmanager
def work_folder(settings: Settings) -> Iterator[Path]:
    """A folder of its own until the block is left. Raises DiskFull."""
    uploads = settings.work_dir / "uploads"
    try:
        uploads.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=uploads) as folder:
            yield Path(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull() from error
        raise


SomeBody = TypeVar("SomeBody")


def read_json(shape: type[SomeBody], content: bytes, *, root: str = "") -> SomeBody:
    """What the JSON says. Raises RequestError for what is no JSON, RequestInvalid for fields that do not fit `shape`.

    Args:   root: put before the pointers of faults, where the JSON is a part of something.
    """
    try:
        return TypeAdapter(shape).validate_json(content)
    except ValidationError as error:
        if broken := next((fault for fault in error.errors() if fault["type"] == "json_invalid"), None):
            raise _no_json(broken, root) from None
        raise invalid(body_faults(error.errors(), root=root)) from None


_JSON_PLACE = re.compile(r"(.*) at line (\d+) column (\d+)")


def _no_json(fault: ErrorDetails, root: str) -> RequestError:
    """The error of JSON that cannot be parsed, with its place: a merge gone wrong is found at once in a long job."""
    place = _JSON_PLACE.fullmatch(fault.get("ctx", {}).get("error", ""))
    if place is None:
        return RequestError("The body is not JSON.")
    why, line, column = place.groups()
    text = f"Not JSON: {why} (line {line}, column {column})."
    detail = ErrorDetail(
        code="request.not_json", message=text, pointer=root or None, line=int(line), column=int(column)
    )
    return RequestError("The body is not JSON.", errors=[detail])


def sweep(settings: Settings) -> None:
    """Remove what a killed process left of its uploads."""
    uploads = settings.work_dir / "uploads"
    for folder in uploads.iterdir() if uploads.is_dir() else ():
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > 24 * 3600:
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()


async def _read_json(request: Request, limit: int) -> bytes:
    body = bytearray()
    stream = request.stream()
    async for chunk in stream:
        body += chunk
        if len(body) > limit:
            await drain(stream)
            raise RequestTooLarge(limit=limit)
    return bytes(body)


async def _read_form(request: Request, form: _Form, boundary: bytes) -> Received:
    stream = request.stream()
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]  # its TypedDict names all keys
        buffer, total = bytearray(), 0
        async for chunk in stream:
            buffer += chunk
            total += len(chunk)
            if total > form.limit:  # parts have caps of their own; this one bounds what lies around them
                raise RequestTooLarge(limit=form.limit)
            if len(buffer) >= BUFFER_BYTES:
                await run_in_threadpool(parser.write, bytes(buffer))
                buffer.clear()
        await run_in_threadpool(parser.write, bytes(buffer))
        parser.finalize()
        return form.received()
    except FormParserError as error:
        await drain(stream)
        raise RequestError("The multipart body cannot be read.") from error
    except P2DError:
        await drain(stream)
        raise
    finally:
        form.close()


async def drain(stream: AsyncIterator[bytes]) -> None:
    """Read on, within bounds, a body that was refused."""
    read, until = 0, time.monotonic() + DRAIN_S
    async for chunk in stream:
        read += len(chunk)
        if read > DRAIN_BYTES or time.monotonic() > until:
            return


class _Form:
    """The multipart parser's callbacks: one part at a time, files to disk, the JSON part to memory."""

    def __init__(self, folder: Path, settings: Settings, files: Collection[str], json_part: str | None) -> None:
        self._folder, self._settings = folder, settings
        self._names, self._json_part = files, json_part
        self.limit = settings.max_upload_bytes * len(files) + settings.max_json_bytes + BUFFER_BYTES
        self._parts, self._ended = 0, False
        self._files: dict[str, ReceivedFile] = {}
        self._json: bytearray | None = None
        self._header = (bytearray(), bytearray())
        self._headers: dict[bytes, bytes] = {}
        self._name, self._file_name, self._size = "", "", 0
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()

    def callbacks(self) -> dict[str, object]:
        """What the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._write,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def received(self) -> Received:
        """The whole body. Raises RequestError if it was cut off."""
        if not self._ended:
            raise RequestError("The multipart body ends before its closing boundary.")
        return Received(self._files, None if self._json is None else bytes(self._json))

    def close(self) -> None:
        """Close the file of a part that was cut off."""
        if self._file is not None:
            self._file.close()

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise RequestError(f"The body has more than {MAX_PARTS} parts.")
        self._headers, self._size = {}, 0

    def _end_header(self) -> None:
        self._headers[bytes(self._header[0]).lower()] = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _open(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        taken = [*self._names, *([self._json_part] if self._json_part else [])]
        if self._name not in taken:
            # The name is a stranger's text: said in the pointer only when it looks like a name.
            pointer = f"/{self._name}" if re.fullmatch(r"\w{1,40}", self._name) else None
            text = f"Expected the parts {', '.join(taken)}."
            raise RequestError(text, errors=[ErrorDetail(code="request.unknown_part", message=text, pointer=pointer)])
        if self._name in self._files or (self._name == self._json_part and self._json is not None):
            raise RequestError(f"The part {self._name!r} is sent twice.")
        if self._name == self._json_part:
            self._json = bytearray()
        else:
            label = options.get(b"filename", b"").decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
            self._file_name = "".join(char for char in label if char.isprintable())[:200]
            self._file = (self._folder / self._name).open("wb")
            self._digest = hashlib.sha256()

    def _write(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        chunk = memoryview(data)[start:end]
        if self._file is None:
            assert self._json is not None
            if self._size > self._settings.max_json_bytes:
                raise RequestTooLarge(limit=self._settings.max_json_bytes)
            self._json += chunk
            return
        limit = self._settings.max_upload_bytes
        if self._size > limit:
            raise DatasetTooLarge(f"The file has more than {limit} bytes.", limit=limit)
        self._digest.update(chunk)
        self._file.write(chunk)

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            path = self._folder / self._name
            self._files[self._name] = ReceivedFile(path, self._file_name, self._digest.hexdigest(), self._size)

    def _finish(self) -> None:
        self._ended = True
