"""Errors of dataset files that the service meets while it reads them apart. A branch of the tree in p2d.errors."""

from __future__ import annotations

from p2d.errors import DatasetError


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
