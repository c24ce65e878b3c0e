"""Errors of dataset files that the service meets while it takes or fetches them, or reads them apart. Branches of the trees in
p2d.errors and app.errors."""

from __future__ import annotations

from typing import ClassVar

from app.errors import Conflict, ServiceError, Unavailable
from p2d.errors import DatasetError, Fault


class DatasetTooCostly(DatasetError):
    """A file that took more time or memory to read than one may: a huge row group, deep nesting, a trap."""

    code, hint = (
        "dataset.too_costly",
        "Send the rows as plain JSON Lines or in smaller files (Parquet: in smaller row groups), "
        "or ask the operator to raise P2D_CHECK_MAX_S or P2D_CHECK_MEMORY_BYTES.",
    )


class DatasetReaderDied(DatasetError):
    """A file that broke the process which read it."""

    code, hint = "dataset.reader_died", "Write the file anew with a current library, or send the rows as JSON Lines."

    def __init__(self, *, signal: str) -> None:
        super().__init__(f"The process that read the file ended with {signal}.", signal=signal)


class TooManyVersions(Conflict):
    """A part of an upload that was sent again with ever other bytes."""

    code, hint = "upload.too_many_versions", "Delete the upload, begin a new one and send the file as it is to be."

    def __init__(self, *, number: int, limit: int) -> None:
        super().__init__(f"Part {number} came with {limit} different contents already.", number=number, limit=limit)


class EgressOff(DatasetError):
    """Data by reference, where the operator lets the service fetch nothing."""

    code, hint = (
        "source.egress_off",
        "Send the file itself, or ask the operator to set P2D_EGRESS (or P2D_SOURCE_BUCKETS).",
    )

    def __init__(self) -> None:
        super().__init__("This service fetches no data from elsewhere.")


class SourceInvalid(DatasetError):
    """A source that names no file that could be fetched."""

    code, hint = (
        "source.invalid",
        "Give an https URL without credentials, or a config and split or a file that the repository has.",
    )


class SourceRefused(DatasetError):
    """A host or bucket that is not allowed, or not on the open Internet; also where a redirect leads."""

    code, hint = (
        "source.refused",
        "Send the file itself, or ask the operator to allow it in P2D_EGRESS or P2D_SOURCE_BUCKETS.",
    )


class SourceFailed(ServiceError):
    """A host that does not answer, or not with the file, in time."""

    code, hint = "source.failed", "Check the URL and that it is public; try again later, or send the file itself."
    fault: ClassVar[Fault] = "dependency"


class IntakeFull(Unavailable):
    """As many files are fetched and checked as the process does at once, or as it does for one project."""

    code, hint = (
        "service.intake_full",
        "Try again after the seconds of Retry-After; what is stored already can be named by its id.",
    )
    fault: ClassVar[Fault] = "capacity"

    def __init__(self) -> None:
        super().__init__("Too many files are being fetched and checked.")
