"""From an uploaded file to a dataset: check all of it, normalise, store the bytes, record the row. Nothing is half-stored.

`inspect` and `store` touch no database, `record` nothing else, so that no transaction spans reading or storing. How the
bytes arrived is app.api's business; how a row is read is p2d.rows'; in which process, app.core.reader's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from app.blobs import Blob, BlobStore
from app.core.quotas import allow_storage
from app.core.reader import check_apart
from app.core.sources import Provenance
from app.db.datasets import Dataset, insert_dataset, same_dataset
from app.db.engine import Connection
from app.settings import Settings
from p2d.columns import Columns
from p2d.errors import DatasetError, ErrorDetail
from p2d.validation import DatasetReport


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A file that was checked and found good, not stored yet."""

    name: str
    report: DatasetReport
    normalised: Path
    provenance: Provenance | None = None

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
    path: Path,
    file_name: str,
    settings: Settings,
    columns: Columns,
    *,
    pointer: str = "",
    provenance: Provenance | None = None,
) -> Candidate:
    """Check every row and write the normalised form beside `path`.

    Args:   columns: where the rows stand.
            provenance: where the file was fetched.
            pointer: put before the pointers of bad lines, where a request holds more than one file.
    Raises: DatasetError with all bad lines, DatasetEmpty, DatasetTooLarge, DatasetTooCostly, DatasetReaderDied,
            MappingInvalid, DiskFull.
    """
    normalised = path.with_name(path.name + ".rows")
    try:
        report = check_apart(path, file_name, settings, normalised=normalised, columns=columns)
    except DatasetError as error:
        if pointer:
            error.errors = tuple(replace(detail, pointer=pointer + (detail.pointer or "")) for detail in error.errors)
        if pointer and not error.errors:
            error.errors = (ErrorDetail(code=error.code, message=error.text, pointer=pointer),)
            error.errors_total = 1
        raise
    return Candidate(name=file_name, report=report, normalised=normalised, provenance=provenance)


def store(blobs: BlobStore, candidate: Candidate) -> Blob:
    """Put the normalised rows into the store. Bytes that nobody refers to do no harm."""
    return blobs.put_file(candidate.normalised)


def record(conn: Connection, candidate: Candidate, blob: Blob, settings: Settings) -> tuple[Dataset, bool]:
    """Return the dataset of this content and whether it is new; the same content is one dataset. Raises StorageFull."""
    known = same_dataset(conn, candidate.content_hash)
    if known is not None:
        return known, False
    report = candidate.report
    allow_storage(conn, settings, size_bytes=blob.size_bytes, rows=report.rows)
    dataset = insert_dataset(
        conn,
        name=candidate.name,
        format=report.format,
        rows=report.rows,
        size_bytes=report.size_bytes,
        content_hash=report.content_hash,
        sha256=blob.sha256,
        stored_bytes=blob.size_bytes,
        report={**asdict(report), "source": asdict(candidate.provenance) if candidate.provenance else None},
    )
    return dataset, True
