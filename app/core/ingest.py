"""From an uploaded file to a dataset: check all of it, normalise, store the bytes, record the row. Nothing is half-stored.

`inspect` and `store` touch no database, `record` nothing else, so that no transaction spans reading or storing. How the
bytes arrived is app.api's business; how a row is read is p2d.rows'; in which process, app.core.reader's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from pydantic import JsonValue

from app.blobs import Blob, BlobStore
from app.core.disk_space import need_space
from app.core.egress import Egress
from app.core.quotas import allow_storage
from app.core.reader import check_apart
from app.core.refusals import Refusal, refusal_of
from app.core.sources import Provenance, fetch_source
from app.db.datasets import Dataset, insert_dataset, same_dataset
from app.db.engine import Connection
from app.schemas import RowsBody, SourceBody
from app.settings import Settings
from p2d.columns import Columns, mapped
from p2d.errors import DatasetError, ErrorDetail, P2DError
from p2d.validation import DataFile, DatasetReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A file that was checked and found good, not stored yet."""

    name: str
    report: DatasetReport
    normalised: Path
    provenance: Provenance | None = None
    raw_sha256: str | None = None
    """Of the bytes as they came, before they were unpacked; None where there was no file."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.report.rows

    @property
    def stored_bytes(self) -> int:
        """Size of the normalised rows."""
        return self.normalised.stat().st_size

    @property
    def content_hash(self) -> str:
        """Sha256 over prompts and answers."""
        return self.report.content_hash


def inspect(
    files: Sequence[DataFile],
    name: str,
    settings: Settings,
    columns: Columns,
    refused: list[Refusal],
    *,
    place: Callable[[ErrorDetail], ErrorDetail] = lambda fault: fault,
    provenance: Provenance | None = None,
    raw_sha256: str | None = None,
) -> Candidate:
    """Check every row and write the normalised form beside the first file.

    Args:   files: those of one dataset, in order. name: a label for it.
            columns: where the rows stand.
            refused: takes what was found, if the files are refused.
            place: says of a fault in the files where it is in the request.
            provenance: where the file was fetched. raw_sha256: of the bytes as they came.
    Raises: DatasetError with the first bad lines, DatasetEmpty, DatasetTooLarge, DatasetTooCostly, DatasetReaderDied,
            MappingInvalid, DiskFull.
    """
    first = files[0].path
    normalised, listed = (first.with_name(first.name + ending) for ending in (".rows", ".faults"))
    try:
        report = check_apart(files, settings, normalised=normalised, listed=listed, columns=columns)
    except DatasetError as error:
        refused.append(
            refusal_of(
                error,
                listed,
                place,
                name=name,
                size_bytes=sum(file.path.stat().st_size for file in files),
                mapping=columns.mapping,
                provenance=provenance,
            )
        )
        raise
    return Candidate(name=name, report=report, normalised=normalised, provenance=provenance, raw_sha256=raw_sha256)


def inspect_file(
    file: DataFile,
    settings: Settings,
    columns: Columns,
    refused: list[Refusal],
    *,
    raw_sha256: str,
    pointer: str = "",
) -> Candidate:
    """`inspect` for a file that came with a request, as the part at `pointer` where it has several."""
    place = partial(_below, pointer)
    return inspect([file], file.name, settings, columns, refused, place=place, raw_sha256=raw_sha256)


def inspect_given(
    given: SourceBody | RowsBody,
    settings: Settings,
    egress: Egress,
    to: Path,
    columns: Columns,
    refused: list[Refusal],
    *,
    pointer: str = "",
) -> Candidate:
    """`inspect` for data that a request's JSON names, or holds.

    Args:   to: a file to be written; the normalised form lies beside it.
            columns: where the rows stand, unless the data come with a mapping of their own.
            pointer: where they stand in the request. Bad rows in it are named by their place there, without a line.
    Raises: as `inspect` and `fetch_source`.
    """
    need_space(settings)
    if given.mapping:
        columns = _pointed(pointer, given.mapping)
    if isinstance(given, RowsBody):
        return _inspect_rows(given.rows, settings, to, columns, refused, pointer)
    try:
        found = fetch_source(settings, egress, given.source.model_dump(), to)
    except P2DError as error:
        _move(error, f"{pointer}/source")
        raise
    place, came = partial(_below, pointer), found.provenance
    return inspect(
        found.files, found.name, settings, columns, refused, place=place, provenance=came, raw_sha256=came.sha256
    )


def _pointed(pointer: str, mapping: Mapping[str, str]) -> Columns:
    try:
        return mapped(mapping)
    except DatasetError as error:
        _move(error, pointer)
        raise


def _inspect_rows(
    rows: Sequence[JsonValue], settings: Settings, to: Path, columns: Columns, refused: list[Refusal], pointer: str
) -> Candidate:
    def place(fault: ErrorDetail) -> ErrorDetail:
        if fault.line is not None:
            fault = replace(fault, pointer=f"/{fault.line - 1}{fault.pointer or ''}", line=None)
        return _below(f"{pointer}/rows", fault)

    # Half a surrogate pair has no UTF-8; the reader finds its bytes and says so.
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    to.write_bytes(f"[{lines}]".encode("utf-8", "surrogatepass"))
    return inspect([DataFile(path=to, name="rows")], "rows", settings, columns, refused, place=place)


def _below(pointer: str, fault: ErrorDetail) -> ErrorDetail:
    """The fault with `pointer` before its own."""
    return replace(fault, pointer=pointer + (fault.pointer or "")) if pointer else fault


def _move(error: P2DError, pointer: str) -> None:
    """Put `pointer` before the pointers of an error's faults; an error that lists none is itself the fault there."""
    if not pointer:
        return
    error.errors = tuple(_below(pointer, fault) for fault in error.errors)
    if not error.errors:
        error.errors = (ErrorDetail(code=error.code, message=error.text, pointer=pointer),)
        error.errors_total = 1


def store(blobs: BlobStore, candidate: Candidate) -> Blob:
    """Put the normalised rows into the store. Bytes that nobody refers to do no harm."""
    return blobs.put_file(candidate.normalised)


def record(
    conn: Connection, candidate: Candidate, blob: Blob, settings: Settings, *, freed_bytes: int = 0
) -> tuple[Dataset, bool]:
    """Return the dataset of this content and whether it is new; the same content is one dataset. Raises StorageFull.

    Args:   freed_bytes: of the upload that ends with it, whose room the dataset takes.
    """
    known = same_dataset(conn, candidate.content_hash)
    if known is not None:
        return known, False
    report = candidate.report
    allow_storage(conn, settings, size_bytes=blob.size_bytes, rows=report.rows, freed_bytes=freed_bytes)
    dataset = insert_dataset(
        conn,
        name=candidate.name,
        format=report.format,
        rows=report.rows,
        size_bytes=report.size_bytes,
        raw_sha256=candidate.raw_sha256,
        content_hash=report.content_hash,
        sha256=blob.sha256,
        stored_bytes=blob.size_bytes,
        report={**asdict(report), "source": asdict(candidate.provenance) if candidate.provenance else None},
    )
    return dataset, True
