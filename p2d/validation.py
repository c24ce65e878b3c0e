"""Check a whole dataset file and report on it: every bad line, duplicates, sizes. Reads no model and no tokenizer.

How a row is read is `rows.py`'s business; whether rows fit a model's context is the validate step's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from p2d.columns import ACCEPTED, Columns
from p2d.compression import Compression, plain_name, unpacked
from p2d.errors import DatasetEmpty, DatasetError, DatasetTooLarge, ErrorDetail
from p2d.faults import FaultList
from p2d.formats import column_names
from p2d.lengths import Lengths
from p2d.personal_data import PersonalData
from p2d.row_keys import RowKeys
from p2d.rows import MAX_ROW_BYTES, Format, Row, extra_fields, hash_row, read_rows, sniff_format, write_rows
from p2d.wording import counted


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
    prompt_chars: Mapping[str, float]
    """Of prompts, with all turns before: `min`, `mean`, `max`, exact; `p10`, `p50`, `p90`, `p99`, rounded up by 6 % at most."""
    answer_chars: Mapping[str, float]
    """Of answers likewise."""
    personal: Mapping[str, Mapping[str, Any]]
    """What looks like personal data: kind -> `rows` and the `lines` of the first of them."""
    compression: Compression | None = None
    """How the file came; lines are those of the unpacked file."""
    mapping: Mapping[str, str] = field(default_factory=dict)
    """What the user said of its columns: field -> column."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFile:
    """A file as its user sent it."""

    path: Path
    name: str
    """As the user calls it, which tells CSV from the rest."""


def check_files(
    files: Sequence[DataFile],
    limits: DatasetLimits | None = None,
    *,
    normalised: Path,
    columns: Columns = ACCEPTED,
    listed: Path | None = None,
) -> DatasetReport:
    """`validate_file` for files as users send them: of any format, plain or compressed. Limits hold for the unpacked bytes.

    Several files are one dataset, in their order: lines count on from file to file, but a bad line is told as that of its own
    file, which the message names.

    Args:   normalised: see `validate_file`; what is unpacked lies beside it for so long.
            listed: where every bad line is listed (`p2d.faults`); the error holds only the first.
    Raises: as `validate_file`; DatasetError for a stream that cannot be unpacked, or for files of several formats;
            MappingInvalid where mapped columns are in none of the first hundred rows.
    """
    found = _Found(tuple(files), columns, normalised.with_name(normalised.name + ".unpacked"))
    with FaultList(listed) as faults:
        reading = _Reading(limits or DatasetLimits(), faults)
        write_rows(normalised, found.rows(reading))
    assert found.format is not None
    size_bytes = sum(file.path.stat().st_size for file in files)
    report = reading.report(found.format, size_bytes, found.extra)
    return replace(report, compression=found.compression, mapping=columns.mapping)


def validate_file(
    path: Path,
    format: Format,
    limits: DatasetLimits | None = None,
    *,
    normalised: Path | None = None,
    columns: Columns = ACCEPTED,
) -> DatasetReport:
    """Read every row once; write the normalised form to `normalised` where given.

    Raises: DatasetEmpty, DatasetTooLarge, or DatasetError (`dataset.invalid`) with the first bad lines in errors[].
    """
    reading = _Reading(limits or DatasetLimits(), FaultList())
    rows = reading.good(read_plain(path, format, reading, columns))
    if normalised is None:
        for _ in rows:
            pass
    else:
        write_rows(normalised, rows)
    return reading.report(format, path.stat().st_size, extra_fields(path, format, columns))


def read_plain(path: Path, format: Format, reading: _Reading, columns: Columns) -> Iterator[Row | ErrorDetail]:
    """The rows of a file that is not compressed, within the limit on bytes. Raises DatasetTooLarge."""
    reading.take_bytes(path.stat().st_size)
    return read_rows(path, format, max_row_bytes=reading.limits.max_row_bytes, columns=columns)


class _Found:
    """What is met while files are read one after the other."""

    def __init__(self, files: Sequence[DataFile], columns: Columns, scratch: Path) -> None:
        self._files, self._columns, self._scratch = files, columns, scratch
        self.format: Format | None = None
        self.compression: Compression | None = None
        self.extra: list[str] = []

    def rows(self, reading: _Reading) -> Iterator[Row]:
        """The good rows of all files, each under a line of its own."""
        last = 0
        for file in self._files:
            with unpacked(file.path, self._scratch, max_bytes=reading.bytes_left) as (plain, compression):
                format = self._open(plain, file, reading.limits, compression)
                read = read_plain(plain, format, reading, self._columns)
                for row in reading.good(self._told(read, file, last)):
                    last = row.line
                    yield row
                if reading.rows and file is self._files[0]:
                    self.extra = extra_fields(plain, format, self._columns)

    def _open(self, plain: Path, file: DataFile, limits: DatasetLimits, compression: Compression | None) -> Format:
        _refuse_wide(plain)
        format = sniff_format(plain, plain_name(file.name))
        if self._columns.mapping and (names := column_names(plain, format, limits.max_row_bytes, rows=100)):
            self._columns.check(names)  # where there is no name at all, the rows say what is wrong
        if self.format is None:
            self.format, self.compression = format, compression
        elif format != self.format:
            text = f"The files are of several formats: {file.name} is {format}, those before it are {self.format}."
            raise DatasetError(text, errors=[ErrorDetail(code="dataset.formats", message=text)])
        return format

    def _told(self, rows: Iterator[Row | ErrorDetail], file: DataFile, before: int) -> Iterator[Row | ErrorDetail]:
        """The rows of one file of several: good ones counted on, bad ones with the file's name."""
        for row in rows:
            if isinstance(row, ErrorDetail) and len(self._files) > 1:
                yield replace(row, message=f"{file.name}: {row.message}")
            elif isinstance(row, Row) and before:
                yield replace(row, line=before + row.line)
            else:
                yield row


def _refuse_wide(path: Path) -> None:
    """Say once, and not of every line, that a file is none of UTF-8."""
    with path.open("rb") as file:
        head = file.read(4)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head == b"\x00\x00\xfe\xff":
        text = "The file is UTF-16 or UTF-32; save it as UTF-8."
        raise DatasetError(text, errors=[ErrorDetail(code="dataset.encoding", message=text)])


class _Reading:
    """What is counted while the rows go by."""

    def __init__(self, limits: DatasetLimits, faults: FaultList) -> None:
        self.limits, self.bytes_left = limits, limits.max_bytes
        self._faults = faults
        self.digest = hashlib.sha256()
        self.rows = self.longest_row_chars = self.duplicates = 0
        self._read = 0
        self.duplicate_lines: list[int] = []
        self._prompts, self._answers, self._personal = Lengths(), Lengths(), PersonalData()
        self._seen = RowKeys()

    def take_bytes(self, size_bytes: int) -> None:
        """Count the bytes of a file that is about to be read. Raises DatasetTooLarge."""
        self.bytes_left -= size_bytes
        if self.bytes_left < 0:
            limit = self.limits.max_bytes
            text = f"The file has {limit - self.bytes_left} bytes; the limit is {limit}."
            raise DatasetTooLarge(text, size_bytes=limit - self.bytes_left, limit=limit)

    def good(self, rows: Iterator[Row | ErrorDetail]) -> Iterator[Row]:
        """Pass the good rows on, keep the bad ones."""
        for row in rows:
            self._read += 1
            if (
                self._read > self.limits.max_rows
            ):  # bad ones count too: a file of commas has a million bad rows a megabyte
                raise DatasetTooLarge(
                    f"The file has more than {self.limits.max_rows} rows.", limit=self.limits.max_rows
                )
            if isinstance(row, ErrorDetail):
                self._faults.add(row)
                continue
            self.rows += 1
            self._count(row)
            yield row

    def report(self, format: Format, size_bytes: int, extra: Sequence[str]) -> DatasetReport:
        """What was read, once all of it was. Raises DatasetError with the first faults, or DatasetEmpty."""
        self._raise_if_bad(format)
        warnings = []
        if self.duplicates:
            warnings.append(counted(self.duplicates, "row repeats an earlier row.", "rows repeat an earlier row."))
        if extra:
            warnings.append(f"Fields that are not used: {', '.join(extra[:20])}.")
        return DatasetReport(
            format=format,
            rows=self.rows,
            size_bytes=size_bytes,
            content_hash=self.digest.hexdigest(),
            longest_row_chars=self.longest_row_chars,
            duplicates=self.duplicates,
            duplicate_lines=tuple(self.duplicate_lines),
            warnings=(*warnings, *self._personal.warnings()),
            prompt_chars=self._prompts.summary(),
            answer_chars=self._answers.summary(),
            personal=self._personal.found(),
        )

    def _raise_if_bad(self, format: Format) -> None:
        if total := self._faults.total:
            text = counted(total, "line of the dataset cannot be used.", "lines of the dataset cannot be used.")
            raise DatasetError(
                text,
                errors=self._faults.first,
                errors_total=total,
                errors_by_code=dict(self._faults.by_code),
                good_rows=self.rows,
                format=format,
            )
        if not self.rows:
            raise DatasetEmpty("The dataset has no rows.")

    def _count(self, row: Row) -> None:
        hash_row(self.digest, row)
        *shown, _ = map(len, row.texts)
        self.longest_row_chars = max(self.longest_row_chars, sum(shown) + len(row.answer))
        self._prompts.add(sum(shown))
        self._answers.add(len(row.answer))
        self._personal.add(row.line, *row.texts)
        if not self._seen.add(row):
            self.duplicates += 1
            if len(self.duplicate_lines) < 100:
                self.duplicate_lines.append(row.line)
