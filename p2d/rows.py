"""Read a user's dataset file as a stream of rows, name every bad line, and write or load the one normalised form.

Formats: JSON Lines, a JSON array, CSV with a header, Parquet. Memory is bounded by one row (Parquet: one batch), whatever
the size of the file. Whether the rows are enough or too many is `validation.py`'s question; tokens are the engine's.
No torch here. Messages never hold row text: they end in logs and in the database.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from p2d.errors import DatasetError, DatasetTooLarge, ErrorDetail

Format = Literal["jsonl", "json", "csv", "parquet"]

MAX_ROW_BYTES = 1 << 20
"""Longest raw row read, in bytes; a longer one is a named error, so that no line can fill the memory."""

_BOM = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 16
_MAX_ROW_GROUP_BYTES = 1 << 30  # Parquet unpacks by row group: a small file may claim a huge one


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: what the model is shown and what it should answer."""

    prompt: str
    answer: str
    line: int
    """1-based line of the user's file where the row starts; the row's number for a JSON array and Parquet."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Field names that make a row: `prompt` and `answer` are required, `more` is appended to the prompt where present."""

    prompt: str
    answer: str
    more: str | None = None


SHAPES = (
    Shape("question", "answer"),
    Shape("prompt", "completion"),
    Shape("prompt", "answer"),
    Shape("instruction", "output", more="input"),
)
"""Accepted field names; the first shape whose fields are all there is taken. Beside them: `messages`, two turns."""

EXPECTED = "question + answer, prompt + completion, prompt + answer, instruction (+ input) + output, or messages"
"""What a row may look like, in words."""


class _Bad(Exception):
    """A row that cannot be used; never leaves this file."""

    def __init__(self, code: str, message: str, pointer: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.pointer = code, message, pointer

    def at(self, line: int) -> ErrorDetail:
        return ErrorDetail(code=self.code, message=self.message, pointer=self.pointer, line=line)


def read_rows(path: Path, format: Format, *, max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Row | ErrorDetail]:
    """Yield a Row for every good row and an ErrorDetail for every bad one, in file order.

    Raises: DatasetError (`dataset.invalid`) if the file as a whole is not of that format (Parquet that cannot be opened).
    """
    for line, fields in READERS[format](path, max_row_bytes):
        if isinstance(fields, _Bad):
            yield fields.at(line)
            continue
        try:
            prompt, answer = row_texts(fields)
        except _Bad as bad:
            yield bad.at(line)
            continue
        if len(prompt) + len(answer) > max_row_bytes:  # Parquet has no raw line to measure
            yield _too_large(max_row_bytes).at(line)
            continue
        yield Row(prompt, answer, line)


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


def extra_fields(path: Path, format: Format) -> list[str]:
    """Name the fields of the first row that no shape uses, for the report's warning."""
    for _, fields in READERS[format](path, MAX_ROW_BYTES):
        if isinstance(fields, _Bad):
            continue
        used = {"messages"} if "messages" in fields else set()
        shape = next((shape for shape in SHAPES if shape.prompt in fields and shape.answer in fields), None)
        if shape is not None:
            used = {shape.prompt, shape.answer, *([shape.more] if shape.more else [])}
        return [name for name in fields if name not in used and _NAME.fullmatch(name)]
    return []


# --- the normalised form ---------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON Lines `{"prompt", "answer", "line"}`, the form that is stored and read by the engine."""
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(row_line(row))
            count += 1
    return count


def row_line(row: Row) -> str:
    """One line of the normalised form."""
    return json.dumps(asdict(row), ensure_ascii=False, separators=(",", ":")) + "\n"


def load_rows(path: Path) -> list[Row]:
    """Load what `write_rows` wrote. The file is ours, so a broken line is a bug and raises."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [Row(**json.loads(line)) for line in file]


def hash_row(digest: Any, row: Row) -> None:
    """Feed one row into a content hash: prompt and answer only, so that the format of the file does not matter."""
    digest.update(json.dumps([row.prompt, row.answer], ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def content_hash(rows: Iterable[Row]) -> str:
    """Sha256 over prompts and answers in order; equal for a CSV and a JSON Lines file of the same rows."""
    digest = hashlib.sha256()
    for row in rows:
        hash_row(digest, row)
    return digest.hexdigest()


# --- one row's fields -> prompt and answer ---------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}")
"""What a field name looks like. A CSV without a header has row text where names should be: that is never repeated."""


def row_texts(fields: Mapping[str, Any]) -> tuple[str, str]:
    """Return prompt and answer of one row, checked. Raises _Bad."""
    if "messages" in fields:
        return _message_texts(fields["messages"])
    for shape in SHAPES:
        if shape.prompt in fields and shape.answer in fields:
            prompt = _text(fields, shape.prompt)
            answer = _text(fields, shape.answer)
            if shape.more and fields.get(shape.more) not in (None, ""):
                prompt = f"{prompt}\n\n{_text(fields, shape.more)}"
            return prompt, answer
    for shape in SHAPES:  # half a shape is there: say which field is missing
        for here, missing in ((shape.prompt, shape.answer), (shape.answer, shape.prompt)):
            if here in fields:
                raise _Bad("row.missing_field", f"The field {missing!r} is missing; {_seen(fields)}.", f"/{missing}")
    raise _Bad("row.wrong_fields", f"Expected {EXPECTED}; {_seen(fields)}.")


def _seen(fields: Mapping[str, Any]) -> str:
    names = [name for name in fields if _NAME.fullmatch(name)][:10]
    return f"found {', '.join(names)}" if names else f"found {len(fields)} other field(s)"


def _text(fields: Mapping[str, Any], name: str) -> str:
    value, pointer = fields[name], f"/{name}"
    if not isinstance(value, str):
        raise _Bad("row.wrong_type", f"Expected text, got {_json_type(value)}.", pointer)
    if not value.strip():
        raise _Bad("row.empty", f"The field {name!r} is empty.", pointer)
    if "\x00" in value:
        raise _Bad("row.nul", "The text holds a NUL character.", pointer)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Bad(
            "row.surrogate", "The text holds half of a surrogate pair, which is no character.", pointer
        ) from None
    return value


def _message_texts(messages: Any) -> tuple[str, str]:
    """Take a conversation of one user turn and one assistant turn; more turns would lose their order in a flat prompt."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise _Bad("row.wrong_type", "Expected a list of {role, content}.", "/messages")
    if [turn.get("role") for turn in messages] != ["user", "assistant"]:
        raise _Bad("row.messages", "Expected exactly one user turn and then one assistant turn.", "/messages")
    for number, turn in enumerate(messages):
        try:
            _text({"content": turn.get("content")}, "content")
        except _Bad as bad:
            raise _Bad(bad.code, bad.message, f"/messages/{number}/content") from None
    return messages[0]["content"], messages[1]["content"]


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, list):
        return "a list"
    return "an object" if isinstance(value, dict) else "text" if isinstance(value, str) else "another type"


def _too_large(max_row_bytes: int) -> _Bad:
    return _Bad("row.too_large", f"The row is longer than {max_row_bytes} bytes.")


# --- formats ---------------------------------------------------------------------------------------------------------

Fields = Iterator[tuple[int, "dict[str, Any] | _Bad"]]


def _jsonl_fields(path: Path, max_row_bytes: int) -> Fields:
    blank_from = 0  # blank lines are harmless at the end of a file, so they are named only when a row follows
    with path.open("rb") as file:
        for line, raw in _lines(file, max_row_bytes):
            if isinstance(raw, bytes) and not raw.strip():
                blank_from = blank_from or line
                continue
            if blank_from:
                yield from (
                    (number, _Bad("row.blank_line", "The line is blank.")) for number in range(blank_from, line)
                )
                blank_from = 0
            yield line, raw if isinstance(raw, _Bad) else _parse(raw)


def _json_fields(path: Path, max_row_bytes: int) -> Fields:
    with path.open("rb") as file:
        for number, raw in enumerate(_elements(file, max_row_bytes), start=1):
            yield number, raw if isinstance(raw, _Bad) else _parse(raw)


def _csv_fields(path: Path, max_row_bytes: int) -> Fields:
    # Process-wide, but only ever raised: the default of 128 KiB a cell is less than one long-context row.
    csv.field_size_limit(max(csv.field_size_limit(), max_row_bytes))
    header: list[str] | None = None
    with path.open("rb") as file:
        for line, raw in _csv_records(file, max_row_bytes):
            cells = raw if isinstance(raw, _Bad) else _csv_cells(raw)
            if isinstance(cells, _Bad):
                yield line, cells
            elif header is None:
                if len(set(cells)) < len(cells):
                    yield line, _Bad("row.duplicate_key", "Two columns of the header have the same name.")
                    return
                header = cells
            elif len(cells) != len(header):
                yield line, _Bad("row.cells", f"Expected {len(header)} cells as in the header, got {len(cells)}.")
            else:
                yield line, dict(zip(header, cells, strict=True))
            if header is None:
                return  # without a readable header every later row would be an error


def _parquet_fields(path: Path, max_row_bytes: int) -> Fields:
    import pyarrow  # a quarter of a second, and only Parquet needs it
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        wanted = [name for shape in SHAPES for name in (shape.prompt, shape.answer, shape.more) if name] + ["messages"]
        columns = [name for name in dict.fromkeys(wanted) if name in names]
        # Dictionary-encoded text stays so: decoded, one long string in every row would fill the memory.
        kinds = {name: file.schema_arrow.field(name).type for name in columns}
        flat = [
            name for name, kind in kinds.items() if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        ]
        groups = [file.metadata.row_group(index).total_byte_size for index in range(file.metadata.num_row_groups)]
        if max(groups, default=0) > _MAX_ROW_GROUP_BYTES:
            raise DatasetTooLarge(
                f"A row group holds {max(groups)} bytes unpacked; the limit is {_MAX_ROW_GROUP_BYTES}."
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
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            "The file is not readable as Parquet.",
            errors=[ErrorDetail(code="dataset.not_parquet", message=f"Parquet reader: {type(error).__name__}.")],
        ) from error


READERS: dict[Format, Callable[[Path, int], Fields]] = {
    "jsonl": _jsonl_fields,
    "json": _json_fields,
    "csv": _csv_fields,
    "parquet": _parquet_fields,
}
"""Row formats: name -> reader that yields (line, fields or fault)."""


def _lines(file: IO[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | _Bad]]:
    """Yield numbered lines without their end; one that is too long is a fault and is skipped, never held."""
    line = 0
    while raw := file.readline(max_bytes + 2):
        line += 1
        if line == 1:
            raw = raw.removeprefix(_BOM)
        if len(raw.rstrip(b"\r\n")) > max_bytes:
            while not raw.endswith(b"\n") and (raw := file.readline(_CHUNK_BYTES)):
                pass
            yield line, _too_large(max_bytes)
        else:
            yield line, raw.rstrip(b"\r\n")


def _parse(raw: bytes) -> dict[str, Any] | _Bad:
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except _Bad as bad:
        return bad
    except UnicodeDecodeError as error:
        return _Bad("row.not_utf8", f"The line is not UTF-8 (byte {error.start + 1}).")
    except RecursionError:
        return _Bad("row.too_deep", "The row is nested too deeply.")
    except json.JSONDecodeError as error:
        return _Bad("row.not_json", f"Not JSON: {error.msg} (column {error.colno}).")
    except ValueError:
        return _Bad("row.not_json", "Not JSON: a number has too many digits.")
    if not isinstance(value, dict):
        return _Bad("row.not_object", f"Expected an object with named fields, got {_json_type(value)}.")
    return cast("dict[str, Any]", value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _Bad("row.duplicate_key", "A field is given twice.")
    return fields


def _no_constant(name: str) -> Any:
    raise _Bad("row.not_finite", f"{name} is not a JSON number.")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise _Bad("row.not_finite", "A number is too large.")
    return value


_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|"|[{}\[\],]', re.DOTALL)  # possessive: linear in a cut-off string


def _elements(file: IO[bytes], max_bytes: int) -> Iterator[bytes | _Bad]:
    """Yield the raw elements of a top-level JSON array. After a fault in the array itself nothing more can be told apart."""
    buffer = file.read(_CHUNK_BYTES).removeprefix(_BOM).lstrip()
    if not buffer:
        return
    if not buffer.startswith(b"["):
        yield _Bad("row.not_json", "Expected a JSON array.")
        return
    start, first = 1, True
    while True:
        end = _element_end(buffer, start)
        while end is None:
            if len(buffer) - start > max_bytes:
                yield _too_large(max_bytes)
                return
            if not (more := file.read(_CHUNK_BYTES)):
                yield _Bad("row.not_json", "The file ends in the middle of the array.")
                return
            buffer, start = buffer[start:] + more, 0
            end = _element_end(buffer, start)
        element, mark, start = buffer[start:end].strip(), buffer[end : end + 1], end + 1
        if mark not in b",]":
            yield _Bad("row.not_json", "A bracket is closed that was not opened.")
            return
        if element or mark == b"," or not first:
            yield _too_large(max_bytes) if len(element) > max_bytes else element
        first = False
        if mark == b"]":
            if (buffer[start:] + file.read(_CHUNK_BYTES)).strip():
                yield _Bad("row.not_json", "There is text after the end of the array.")
            return


def _element_end(buffer: bytes, start: int) -> int | None:
    """Offset of the comma or bracket that ends the element at `start`; None if it is not all there."""
    depth = 0
    for match in _TOKEN.finditer(buffer, start):
        token = match.group()
        if token == b'"':  # a string that does not end inside the buffer
            return None
        if token in (b"{", b"["):
            depth += 1
        elif token in (b"}", b"]"):
            if depth == 0:
                return match.start()
            depth -= 1
        elif token == b"," and depth == 0:
            return match.start()
    return None


def _csv_records(file: IO[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | _Bad]]:
    """Join physical lines into records: a quoted cell may span lines, and an odd number of quotes says that it does."""
    start, parts, size, quotes = 0, list[bytes](), 0, 0
    for line, raw in _lines(file, max_bytes):
        if isinstance(raw, _Bad):
            yield start or line, raw
            start, parts, size, quotes = 0, [], 0, 0
            continue
        if not parts and not raw.strip():
            continue  # csv.reader skips blank lines too
        start, size, quotes = start or line, size + len(raw) + 1, quotes + raw.count(b'"')
        parts.append(raw)
        if size > max_bytes + 1:
            yield start, _Bad("row.too_large", f"The row is longer than {max_bytes} bytes, or a quote is never closed.")
            return
        if quotes % 2 == 0:
            yield start, b"\n".join(parts)
            start, parts, size, quotes = 0, [], 0, 0
    if parts:
        yield start, _Bad("row.not_csv", "A quote is never closed.")


def _csv_cells(raw: bytes) -> list[str] | _Bad:
    try:
        records = list(csv.reader(io.StringIO(raw.decode(), newline=""), strict=True))
    except UnicodeDecodeError as error:
        return _Bad("row.not_utf8", f"The row is not UTF-8 (byte {error.start + 1}).")
    except csv.Error as error:
        return _Bad("row.not_csv", f"Not CSV: {error}.")
    return records[0] if len(records) == 1 else _Bad("row.not_csv", "Not one CSV row.")
