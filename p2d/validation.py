"""Check a whole dataset file and report on it: every bad line, duplicates, sizes. Reads no model and no tokenizer.

How a row is read is `rows.py`'s business; whether rows fit a model's context is the validate step's.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from p2d.columns import ACCEPTED, Columns
from p2d.compression import Compression, plain_name, unpacked
from p2d.errors import DatasetEmpty, DatasetError, DatasetTooLarge, ErrorDetail
from p2d.formats import column_names
from p2d.row_keys import RowKeys
from p2d.rows import MAX_ROW_BYTES, Format, Row, extra_fields, hash_row, read_rows, sniff_format, write_rows
from p2d.wording import counted

MAX_LISTED = 10_000
"""Bad lines listed at most; `errors_total` and the counts by code go on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetLimits:
    """Caps on what is read from one file."""

    max_bytes: int = 1 << 30
    max_rows: int = 1_000_000
    max_row_bytes: int = MAX_ROW_BYTES


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetReport:
    """What a good file holds. Never row text."""

    format: Format
    rows: int
    size_bytes: int
    """Of the file as sent."""
    content_hash: str
    """Sha256 over prompts and answers; equal content in another format has the same."""
    longest_row_chars: int
    duplicates: int
    """Rows whose prompt and answer were seen before."""
    duplicate_lines: tuple[int, ...]
    """Lines of the first 100 of them."""
    warnings: tuple[str, ...]
    compression: Compression | None = None
    """How the file came; lines are those of the unpacked file."""
    mapping: Mapping[str, str] = field(default_factory=dict)
    """What the user said of its columns: field -> column."""


def check_file(
    path: Path,
    file_name: str,
    limits: DatasetLimits | None = None,
    *,
    normalised: Path,
    columns: Columns = ACCEPTED,
) -> DatasetReport:
    """`validate_file` for a file as users send it: of any format, plain or compressed. Limits hold for the unpacked bytes.

    Args:   file_name: as its user calls it, which tells CSV from the rest. normalised: see `validate_file`; what is
            unpacked lies beside it for so long.
    Raises: as `validate_file`; DatasetError for a stream that cannot be unpacked; MappingInvalid where mapped columns are
            in none of the first hundred rows.
    """
    limits = limits or DatasetLimits()
    scratch = normalised.with_name(normalised.name + ".unpacked")
    with unpacked(path, scratch, max_bytes=limits.max_bytes) as (plain, compression):
        format = sniff_format(plain, plain_name(file_name))
        if columns.mapping and (names := column_names(plain, format, limits.max_row_bytes, rows=100)):
            columns.check(names)  # where there is no name at all, the rows say what is wrong
        report = validate_file(plain, format, limits, normalised=normalised, columns=columns)
    return replace(report, size_bytes=path.stat().st_size, compression=compression, mapping=columns.mapping)


def validate_file(
    path: Path,
    format: Format,
    limits: DatasetLimits | None = None,
    *,
    normalised: Path | None = None,
    columns: Columns = ACCEPTED,
) -> DatasetReport:
    """Read every row once; write the normalised form to `normalised` where given.

    Raises: DatasetEmpty, DatasetTooLarge, or DatasetError (`dataset.invalid`) with every bad line in errors[].
    """
    limits = limits or DatasetLimits()
    size_bytes = path.stat().st_size
    if size_bytes > limits.max_bytes:
        raise DatasetTooLarge(
            f"The file has {size_bytes} bytes; the limit is {limits.max_bytes}.",
            size_bytes=size_bytes,
            limit=limits.max_bytes,
        )
    reading = _Reading(limits)
    rows = reading.good(read_rows(path, format, max_row_bytes=limits.max_row_bytes, columns=columns))
    if normalised is None:
        for _ in rows:
            pass
    else:
        write_rows(normalised, rows)
    reading.raise_if_bad()
    warnings = []
    if reading.duplicates:
        warnings.append(counted(reading.duplicates, "row repeats an earlier row.", "rows repeat an earlier row."))
    if extra := extra_fields(path, format, columns):
        warnings.append(f"Fields that are not used: {', '.join(extra[:20])}.")
    return DatasetReport(
        format=format,
        rows=reading.rows,
        size_bytes=size_bytes,
        content_hash=reading.digest.hexdigest(),
        longest_row_chars=reading.longest_row_chars,
        duplicates=reading.duplicates,
        duplicate_lines=tuple(reading.duplicate_lines),
        warnings=tuple(warnings),
    )


class _Reading:
    """What is counted while the rows go by."""

    def __init__(self, limits: DatasetLimits) -> None:
        self.limits = limits
        self.digest = hashlib.sha256()
        self.rows = self.longest_row_chars = self.duplicates = 0
        self.duplicate_lines: list[int] = []
        self._seen = RowKeys()
        self._errors: list[ErrorDetail] = []
        self._by_code: Counter[str] = Counter()

    def good(self, rows: Iterator[Row | ErrorDetail]) -> Iterator[Row]:
        """Pass the good rows on, keep the bad ones."""
        for number, row in enumerate(rows, start=1):
            if number > self.limits.max_rows:  # bad ones count too: a file of commas has a million bad rows a megabyte
                raise DatasetTooLarge(
                    f"The file has more than {self.limits.max_rows} rows.", limit=self.limits.max_rows
                )
            if isinstance(row, ErrorDetail):
                self._by_code[row.code] += 1
                if len(self._errors) < MAX_LISTED:
                    self._errors.append(row)
                continue
            self.rows += 1
            self._count(row)
            yield row

    def raise_if_bad(self) -> None:
        """Raise DatasetError with all faults, or DatasetEmpty."""
        total = self._by_code.total()
        if total:
            text = counted(total, "line of the dataset cannot be used.", "lines of the dataset cannot be used.")
            if total > MAX_LISTED:
                text += f" The first {MAX_LISTED:,} are listed."
            raise DatasetError(
                text,
                errors=self._errors,
                errors_total=total,
                errors_by_code=dict(self._by_code),
                good_rows=self.rows,
            )
        if not self.rows:
            raise DatasetEmpty("The dataset has no rows.")

    def _count(self, row: Row) -> None:
        hash_row(self.digest, row)
        self.longest_row_chars = max(self.longest_row_chars, len(row.prompt) + len(row.answer))
        if not self._seen.add(row):
            self.duplicates += 1
            if len(self.duplicate_lines) < 100:
                self.duplicate_lines.append(row.line)
