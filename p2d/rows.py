"""Read a user's dataset file as a stream of rows, name every bad line, and write or load the one normalised form.

How the bytes of each format become fields is `formats.py`'s business; whether the rows are enough or too many is
`validation.py`'s question; tokens are the engine's. No torch here. Messages never hold row text: they end in logs and in
the database.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p2d.errors import ErrorDetail
from p2d.formats import READERS, BadRow, Format, json_type, sniff_format, too_large

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

FIELDS = {name for shape in SHAPES for name in (shape.prompt, shape.answer, shape.more) if name} | {"messages"}
"""Every field name that some shape uses."""

EXPECTED = "question + answer, prompt + completion, prompt + answer, instruction (+ input) + output, or messages"
"""What a row may look like, in words."""


def read_rows(path: Path, format: Format, *, max_row_bytes: int = MAX_ROW_BYTES) -> Iterator[Row | ErrorDetail]:
    """Yield a Row for every good row and an ErrorDetail for every bad one, in file order.

    Raises: DatasetError (`dataset.invalid`) if the file as a whole is not of that format (Parquet that cannot be opened).
    """
    for line, fields in READERS[format](path, max_row_bytes, FIELDS):
        if isinstance(fields, BadRow):
            yield fields.at(line)
            continue
        try:
            prompt, answer = row_texts(fields)
        except BadRow as bad:
            yield bad.at(line)
            continue
        if len(prompt) + len(answer) > max_row_bytes:  # Parquet has no raw line to measure
            yield too_large(max_row_bytes).at(line)
            continue
        yield Row(prompt, answer, line)


def extra_fields(path: Path, format: Format) -> list[str]:
    """Name the fields of the first row that no shape uses, for the report's warning."""
    for _, fields in READERS[format](path, MAX_ROW_BYTES, FIELDS):
        if isinstance(fields, BadRow):
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
    """Return prompt and answer of one row, checked. Raises BadRow."""
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
                raise BadRow("row.missing_field", f"The field {missing!r} is missing; {_seen(fields)}.", f"/{missing}")
    raise BadRow("row.wrong_fields", f"Expected {EXPECTED}; {_seen(fields)}.")


def _seen(fields: Mapping[str, Any]) -> str:
    names = [name for name in fields if _NAME.fullmatch(name)][:10]
    return f"found {', '.join(names)}" if names else f"found {len(fields)} other field(s)"


def _text(fields: Mapping[str, Any], name: str) -> str:
    value, pointer = fields[name], f"/{name}"
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


def _message_texts(messages: Any) -> tuple[str, str]:
    """Take a conversation of one user turn and one assistant turn; more turns would lose their order in a flat prompt."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise BadRow("row.wrong_type", "Expected a list of {role, content}.", "/messages")
    if [turn.get("role") for turn in messages] != ["user", "assistant"]:
        raise BadRow("row.messages", "Expected exactly one user turn and then one assistant turn.", "/messages")
    for number, turn in enumerate(messages):
        try:
            _text({"content": turn.get("content")}, "content")
        except BadRow as bad:
            raise BadRow(bad.code, bad.message, f"/messages/{number}/content") from None
    return messages[0]["content"], messages[1]["content"]
