"""Read a user's dataset file as a stream of rows, name every bad line, and write or load the one normalised form.

How the bytes of each format become fields is `formats.py`'s business; whether the rows are enough or too many is
`validation.py`'s question; tokens are the engine's. No torch here. Messages never hold row text: they end in logs and in
the database.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p2d.columns import ACCEPTED, Columns, is_plain, shown
from p2d.errors import ErrorDetail
from p2d.formats import READERS, BadRow, Format, column_names, json_type, sniff_format, too_large

__all__ = [
    "MAX_ROW_BYTES",
    "Format",
    "Row",
    "content_hash",
    "load_rows",
    "read_rows",
    "sniff_format",
    "write_rows",
]

MAX_ROW_BYTES = 1 << 20
"""Longest raw row read, in bytes; a longer one is a named error, so that no line can fill the memory."""


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: what the model is shown and what it should answer."""

    prompt: str
    answer: str
    line: int
    """1-based line of the user's file where the row starts; the row's number for a JSON array and Parquet."""


def read_rows(
    path: Path, format: Format, *, max_row_bytes: int = MAX_ROW_BYTES, columns: Columns = ACCEPTED
) -> Iterator[Row | ErrorDetail]:
    """Yield a Row for every good row and an ErrorDetail for every bad one, in file order.

    Raises: DatasetError (`dataset.invalid`) if the file as a whole is not of that format (Parquet that cannot be opened).
    """
    for line, fields in READERS[format](path, max_row_bytes, columns.names):
        if isinstance(fields, BadRow):
            yield fields.at(line)
            continue
        try:
            prompt, answer = row_texts(fields, columns)
        except BadRow as bad:
            yield bad.at(line)
            continue
        if len(prompt) + len(answer) > max_row_bytes:  # Parquet has no raw line to measure
            yield too_large(max_row_bytes).at(line)
            continue
        yield Row(prompt, answer, line)


def extra_fields(path: Path, format: Format, columns: Columns = ACCEPTED) -> list[str]:
    """Name the fields of the first row that are not read, for the report's warning."""
    names = column_names(path, format, MAX_ROW_BYTES, rows=1)
    used = columns.used(names)
    return [name for name in names if name not in used and is_plain(name)]


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


def row_texts(fields: Mapping[str, Any], columns: Columns = ACCEPTED) -> tuple[str, str]:
    """Return prompt and answer of one row, checked. Raises BadRow."""
    if columns.messages in fields:
        assert columns.messages is not None
        return _message_texts(fields[columns.messages], pointer_to(columns.messages))
    for shape in columns.shapes:
        if shape.prompt in fields and shape.answer in fields:
            prompt = _text(fields, shape.prompt)
            answer = _text(fields, shape.answer)
            if shape.more and fields.get(shape.more) not in (None, ""):
                prompt = f"{prompt}\n\n{_text(fields, shape.more)}"
            return prompt, answer
    for shape in columns.shapes:  # half a shape is there: say which field is missing
        for here, missing in ((shape.prompt, shape.answer), (shape.answer, shape.prompt)):
            if here in fields:
                text = f"The field {missing!r} is missing; found {shown(fields)}."
                raise BadRow("row.missing_field", text, pointer_to(missing))
    raise BadRow("row.wrong_fields", f"Expected {columns.expected}; found {shown(fields)}.")


def pointer_to(name: str) -> str:
    """JSON pointer to a field of a row."""
    return "/" + name.replace("~", "~0").replace("/", "~1")


def _text(fields: Mapping[str, Any], name: str) -> str:
    value, pointer = fields[name], pointer_to(name)
    if not isinstance(value, str):
        raise BadRow("row.wrong_type", f"Expected text, got {json_type(value)}.", pointer)
    if not value.strip():
        raise BadRow("row.empty", f"The field {name!r} is empty.", pointer)
    if "\x00" in value:
        raise BadRow("row.nul", "The text holds a NUL character.", pointer)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(
            "row.surrogate", "The text holds half of a surrogate pair, which is no character.", pointer
        ) from None
    return value


def _message_texts(messages: Any, pointer: str) -> tuple[str, str]:
    """Take a conversation of one user turn and one assistant turn; more turns would lose their order in a flat prompt."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise BadRow("row.wrong_type", "Expected a list of {role, content}.", pointer)
    if [turn.get("role") for turn in messages] != ["user", "assistant"]:
        raise BadRow("row.messages", "Expected exactly one user turn and then one assistant turn.", pointer)
    for number, turn in enumerate(messages):
        try:
            _text({"content": turn.get("content")}, "content")
        except BadRow as bad:
            raise BadRow(bad.code, bad.message, f"{pointer}/{number}/content") from None
    return messages[0]["content"], messages[1]["content"]
