"""Dataset files as a stream of fields: JSON Lines, a JSON array, CSV with a header, Parquet.

Each reader yields (line, fields of one row) or (line, what is wrong with it) and holds one row at a time (Parquet: one
batch), whatever the size of the file. Which fields make a row is `rows.py`'s business. No torch here.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Any, Literal, cast

from p2d.errors import DatasetError, DatasetTooLarge, ErrorDetail

Format = Literal["jsonl", "json", "csv", "parquet"]

_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 16
MAX_ROW_GROUP_BYTES = 1 << 30  # Parquet unpacks by row group: a small file may claim a huge one


class BadRow(Exception):
    """A row that cannot be used; `rows.py` makes an ErrorDetail of it."""

    def __init__(self, code: str, message: str, pointer: str | None = None, **known: Any) -> None:
        """Args: known: `column`, `expected` and `got` of the ErrorDetail."""
        super().__init__(message)
        self.code, self.message, self.pointer, self.known = code, message, pointer, known

    def at(self, line: int) -> ErrorDetail:
        """The fault at its place in the file."""
        return ErrorDetail(code=self.code, message=self.message, pointer=self.pointer, line=line, **self.known)


def wrong_type(expected: str, value: Any, pointer: str | None = None) -> BadRow:
    """The fault of a value of another type."""
    text = f"Expected {expected}, got {json_type(value)}."
    return BadRow("row.wrong_type", text, pointer, expected=expected, got=json_type(value))


def json_type(value: Any) -> str:
    """What JSON calls the value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else "text" if isinstance(value, str) else "another type"


def too_large(max_row_bytes: int) -> BadRow:
    """The fault of a row above the limit."""
    text = f"The row is longer than {max_row_bytes} bytes."
    return BadRow("row.too_large", text, expected=f"at most {max_row_bytes} bytes")


def sniff_format(path: Path, file_name: str = "") -> Format:
    """Tell the format from the first bytes; the file's name decides only between CSV and the rest."""
    with path.open("rb") as file:
        head = file.read(_CHUNK_BYTES)
    if head.startswith(b"PAR1"):
        return "parquet"
    if file_name.lower().endswith(".csv"):
        return "csv"
    start = head.removeprefix(_BOM).lstrip()[:1]
    if start == b"[":
        return "json"
    if start == b"{" or file_name.lower().endswith((".jsonl", ".ndjson", ".json")) or not start:
        return "jsonl"
    return "csv"


Fields = Iterator[tuple[int, "dict[str, Any] | BadRow"]]
"""(line, fields of the row or what is wrong with it)."""


def _jsonl_fields(path: Path, max_row_bytes: int, wanted: Collection[str]) -> Fields:
    blank_from = 0  # blank lines are harmless at the end of a file, so they are named only when a row follows
    with path.open("rb") as file:
        for line, raw in _lines(file, max_row_bytes):
            if isinstance(raw, bytes) and not raw.strip():
                blank_from = blank_from or line
                continue
            if blank_from:
                yield from (
                    (number, BadRow("row.blank_line", "The line is blank.")) for number in range(blank_from, line)
                )
                blank_from = 0
            yield line, raw if isinstance(raw, BadRow) else _parse(raw)


def _json_fields(path: Path, max_row_bytes: int, wanted: Collection[str]) -> Fields:
    with path.open("rb") as file:
        for number, raw in enumerate(_elements(file, max_row_bytes), start=1):
            row = raw if isinstance(raw, BadRow) else _parse(raw)
            if isinstance(row, BadRow):
                row.known.pop("column", None)  # of a line, and rows of an array are not lines
            yield number, row


def _csv_fields(path: Path, max_row_bytes: int, wanted: Collection[str]) -> Fields:
    # Process-wide, but only ever raised: the default of 128 KiB a cell is less than one long-context row.
    csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
    header: list[str] | None = None
    with path.open("rb") as file:
        for line, raw in _csv_records(file, max_row_bytes):
            cells = raw if isinstance(raw, BadRow) else _csv_cells(raw)
            if isinstance(cells, BadRow):
                yield line, cells
            elif header is None:
                if len(set(cells)) < len(cells):
                    yield line, BadRow("row.duplicate_key", "Two columns of the header have the same name.")
                    return
                header = cells
            elif len(cells) != len(header):
                text = f"Expected {len(header)} cells as in the header, got {len(cells)}."
                sizes = {"expected": f"{len(header)} cells", "got": f"{len(cells)} cells"}
                yield line, BadRow("row.cells", text, **sizes)
            else:
                yield line, dict(zip(header, cells, strict=True))
            if header is None:
                return  # without a readable header every later row would be an error


def _parquet_fields(path: Path, max_row_bytes: int, wanted: Collection[str]) -> Fields:
    import pyarrow  # a quarter of a second, and only Parquet needs it
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns = [name for name in names if name in wanted]
        # Dictionary-encoded text stays so: decoded, one long string in every row would fill the memory.
        kinds = {name: file.schema_arrow.field(name).type for name in columns}
        flat = [
            name for name, kind in kinds.items() if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        ]
        groups = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
        if max(groups, default=0) > MAX_ROW_GROUP_BYTES:
            raise DatasetTooLarge(
                f"A row group holds {max(groups)} bytes unpacked; the limit is {MAX_ROW_GROUP_BYTES}."
            )
        file = pyarrow.parquet.ParquetFile(path, read_dictionary=flat)
        total, number = file.metadata.num_rows, 0
        if not columns:
            yield from ((1, dict.fromkeys(names)) for _ in range(min(total, 1)))  # one error says it for the whole file
            return
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for index in range(batch.num_rows):
                number += 1
                yield number, {name: batch.column(name)[index].as_py() for name in columns}
    except MemoryError:  # pyarrow's own is an ArrowException too, but says nothing about the file
        raise
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            "The file is not readable as Parquet.",
            errors=[ErrorDetail(code="dataset.not_parquet", message=f"Parquet reader: {type(error).__name__}.")],
        ) from error


READERS: dict[Format, Callable[[Path, int, Collection[str]], Fields]] = {
    "jsonl": _jsonl_fields,
    "json": _json_fields,
    "csv": _csv_fields,
    "parquet": _parquet_fields,
}
"""Row formats: name -> reader of (file, longest row in bytes, fields that matter: Parquet reads no other column)."""


def column_names(path: Path, format: Format, max_row_bytes: int, *, rows: int) -> list[str]:
    """Names of the columns in the first `rows` readable rows, each once; in CSV and Parquet every row has the same."""
    found: dict[str, None] = {}
    readable = (fields for _, fields in READERS[format](path, max_row_bytes, ()) if not isinstance(fields, BadRow))
    for fields in itertools.islice(readable, rows):
        found |= dict.fromkeys(fields)
    return list(found)


def _lines(file: IO[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | BadRow]]:
    """Yield numbered lines without their end; one that is too long is a fault and is skipped, never held."""
    line = 0
    while raw := file.readline(max_bytes + 2):
        line += 1
        if line == 1:
            raw = raw.removeprefix(_BOM)
        if len(raw.rstrip(b"\r\n")) > max_bytes:
            while not raw.endswith(b"\n") and (raw := file.readline(_CHUNK_BYTES)):
                pass
            yield line, too_large(max_bytes)
        else:
            yield line, raw.rstrip(b"\r\n")


def _parse(raw: bytes) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except BadRow as bad:
        return bad
    except UnicodeDecodeError as error:
        return BadRow("row.not_utf8", f"The line is not UTF-8 (byte {error.start + 1}).")
    except RecursionError:
        return BadRow("row.too_deep", "The row is nested too deeply.")
    except json.JSONDecodeError as error:
        return BadRow("row.not_json", f"Not JSON: {error.msg} (column {error.colno}).", column=error.colno)
    except ValueError:
        return BadRow("row.not_json", "Not JSON: a number has too many digits.")
    if not isinstance(value, dict):
        text = f"Expected an object with named fields, got {json_type(value)}."
        return BadRow("row.not_object", text, expected="an object", got=json_type(value))
    return cast("dict[str, Any]", value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise BadRow("row.duplicate_key", "A field is given twice.")
    return fields


def _no_constant(name: str) -> Any:
    raise BadRow("row.not_finite", f"{name} is not a JSON number.")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise BadRow("row.not_finite", "A number is too large.")
    return value


_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|"|[{}\[\],]', re.DOTALL)  # possessive: linear in a cut-off string


def _elements(file: IO[bytes], max_bytes: int) -> Iterator[bytes | BadRow]:
    """Yield the raw elements of a top-level JSON array. After a fault in the array itself nothing more can be told apart."""
    buffer = file.read(_CHUNK_BYTES).removeprefix(_BOM).lstrip()
    if not buffer:
        return
    if not buffer.startswith(b"["):
        yield BadRow("row.not_json", "Expected a JSON array.")
        return
    first, element = True, _Element(1)
    while True:
        while not element.find_end(buffer):
            if len(buffer) - element.start > max_bytes:
                yield too_large(max_bytes)
                return
            if not (more := file.read(_CHUNK_BYTES)):
                yield BadRow("row.not_json", "The file ends in the middle of the array.")
                return
            buffer = buffer[element.start :] + more
            element.shift()
        raw, mark = buffer[element.start : element.end].strip(), buffer[element.end : element.end + 1]
        element = _Element(element.end + 1)
        if mark not in b",]":
            yield BadRow("row.not_json", "A bracket is closed that was not opened.")
            return
        if raw or mark == b"," or not first:
            yield too_large(max_bytes) if len(raw) > max_bytes else raw
        first = False
        if mark == b"]":
            if (buffer[element.start :] + file.read(_CHUNK_BYTES)).strip():
                yield BadRow("row.not_json", "There is text after the end of the array.")
            return


class _Element:
    """Where one element of the array starts and ends in the buffer; what was scanned is not scanned again."""

    def __init__(self, start: int) -> None:
        self.start, self.end = start, -1
        self._scanned, self._depth = start, 0

    def find_end(self, buffer: bytes) -> bool:
        """Look for the comma or bracket that ends the element; False if it is not in the buffer yet."""
        for match in _TOKEN.finditer(buffer, self._scanned):
            token = match.group()
            if token == b'"':  # a string that does not end inside the buffer
                self._scanned = match.start()
                return False
            if token in (b"{", b"["):
                self._depth += 1
            elif self._depth == 0 and token in (b"}", b"]", b","):
                self.end = match.start()
                return True
            elif token in (b"}", b"]"):
                self._depth -= 1
            self._scanned = match.end()
        return False

    def shift(self) -> None:
        """The buffer now begins where the element does."""
        self._scanned -= self.start
        self.start = 0


def _csv_records(file: IO[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | BadRow]]:
    """Join physical lines into records: a quoted cell may span lines, and an odd number of quotes says that it does."""
    start, parts, size, quotes = 0, list[bytes](), 0, 0
    for line, raw in _lines(file, max_bytes):
        if isinstance(raw, BadRow):
            yield start or line, raw
            start, parts, size, quotes = 0, [], 0, 0
            continue
        if not parts and not raw.strip():
            continue  # csv.reader skips blank lines too
        start, size, quotes = start or line, size + len(raw) + 1, quotes + raw.count(b'"')
        parts.append(raw)
        if size > max_bytes + 1:
            yield (
                start,
                BadRow("row.too_large", f"The row is longer than {max_bytes} bytes, or a quote is never closed."),
            )
            return
        if quotes % 2 == 0:
            yield start, b"\n".join(parts)
            start, parts, size, quotes = 0, [], 0, 0
    if parts:
        yield start, BadRow("row.not_csv", "A quote is never closed.")


def _csv_cells(raw: bytes) -> list[str] | BadRow:
    try:
        records = list(csv.reader(io.StringIO(raw.decode(), newline=""), strict=True))
    except UnicodeDecodeError as error:
        return BadRow("row.not_utf8", f"The row is not UTF-8 (byte {error.start + 1}).")
    except csv.Error as error:
        return BadRow("row.not_csv", f"Not CSV: {error}.")
    return records[0] if len(records) == 1 else BadRow("row.not_csv", "Not one CSV row.")
