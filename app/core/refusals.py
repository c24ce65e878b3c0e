"""Files that were checked and refused: what is wrong with them, all of it, as a report that stays for some days.

The faults of a report are one object of the store, a JSON object a line, in the order of the file; the ledger has their counts.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from app.access_errors import StorageFull
from app.blobs import BlobStore
from app.core.quotas import allow_storage
from app.core.sources import Provenance
from app.db.engine import Engine
from app.db.reports import insert_report
from app.settings import Settings
from p2d.errors import DatasetError, ErrorDetail
from p2d.faults import fault_line, read_faults


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """What was found wrong with the file of one dataset."""

    name: str
    """As its user calls it."""
    error: DatasetError
    listed: Path
    """A JSON object for each fault, at their places in the request."""
    size_bytes: int
    """Of the file as sent."""
    mapping: Mapping[str, str]
    provenance: Provenance | None
    """Where it was fetched."""

    @property
    def by_code(self) -> Mapping[str, int]:
        """How many faults of each code; of a file that could not be read to its end those that its error names."""
        error = self.error
        found: Mapping[str, int] | None = error.facts.get("errors_by_code")
        return found or Counter([fault.code for fault in error.errors] or [error.code])


def refusal_of(
    error: DatasetError,
    listed: Path,
    place: Callable[[ErrorDetail], ErrorDetail],
    *,
    name: str,
    size_bytes: int,
    mapping: Mapping[str, str],
    provenance: Provenance | None,
) -> Refusal:
    """Put all faults of a file at their places in the request: those of the error, and those on the disk.

    Args:   listed: the list of the check, which is replaced; there may be none.
    """
    whole = "errors_by_code" in error.facts  # else the check stopped, and its list is of the rows before that alone
    if not error.errors:
        fault = place(ErrorDetail(code=error.code, message=error.text))
        faults: Iterable[ErrorDetail] = [fault]
        if fault.pointer is not None:
            error.errors, error.errors_total = (fault,), 1
    else:
        error.errors = tuple(map(place, error.errors))
        faults = map(place, read_faults(listed)) if whole else error.errors
    moved = listed.with_name(listed.name + ".moved")
    with moved.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(map(fault_line, faults))
    moved.replace(listed)
    return Refusal(name=name, error=error, listed=listed, size_bytes=size_bytes, mapping=mapping, provenance=provenance)


def keep_report(engine: Engine, blobs: BlobStore, settings: Settings, refused: Sequence[Refusal]) -> str | None:
    """Store one report on the files of a request that were refused; its id, or None where the project may store no more."""
    listed = refused[0].listed
    if len(refused) > 1:
        listed = listed.with_name(listed.name + ".all")
        with listed.open("wb") as file:
            for refusal in refused:
                with refusal.listed.open("rb") as part:
                    shutil.copyfileobj(part, file)
    with listed.open("rb") as file:
        count = sum(1 for _ in file)
    blob = blobs.put_file(listed)
    by_code = sum((Counter(refusal.by_code) for refusal in refused), Counter[str]())
    found = {
        "format": _one({refusal.error.facts.get("format") for refusal in refused}),
        "rows": sum(refusal.error.facts.get("good_rows", 0) for refusal in refused),
        "size_bytes": sum(refusal.size_bytes for refusal in refused),
        "mapping": dict(refused[0].mapping),
        "source": asdict(refused[0].provenance) if refused[0].provenance else None,
        "errors_total": by_code.total(),
        "errors_listed": count,
        "errors_by_code": dict(by_code),
    }
    try:
        with engine.begin() as conn:
            allow_storage(conn, settings, size_bytes=blob.size_bytes)
            report = insert_report(
                conn,
                name=", ".join(refusal.name for refusal in refused),
                code=_one({refusal.error.code for refusal in refused}) or DatasetError.code,
                detail=" ".join(refusal.error.text for refusal in refused),
                report=found,
                sha256=blob.sha256,
                stored_bytes=blob.size_bytes,
                kept_d=settings.reports_kept_d,
            )
            return report.id
    except StorageFull:  # the file is refused all the same, with its first faults
        return None


def _one(values: set[str | None]) -> str | None:
    """The value that all have."""
    return next(iter(values)) if len(values) == 1 else None
