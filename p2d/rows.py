"""Read a user's dataset file as a stream of rows, name every bad line, and write or load the one normalised form.

How the bytes of each format become fields is `formats.py`'s business; whether the rows are enough or too many is
`validation.py`'s question; tokens are the engine's. No torch here. Messages never hold row text: they end in logs and in
the database.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from p2d.columns import ACCEPTED, Columns, is_plain, shown
from p2d.errors import ErrorDetail
from p2d.formats import READERS, BadRow, Format, column_names, sniff_format, too_large, wrong_type

__all__ = [
    "MAX_ROW_BYTES",
    "Format",
    "Row",
    "Turn",
    "content_hash",
    "load_rows",
    "read_rows",
    "sniff_format",
    "write_rows",
]

MAX_ROW_BYTES = 1 << 20
"""Longest raw row read, in bytes; a longer one is a named error, so that no line can fill the memory."""


ROLES = ("system", "user", "assistant")
"""Who may speak in a conversation."""


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: what the model is shown and what it should answer."""

    prompt: str
    """The question; of a conversation the last one."""
    answer: str
    """What is trained; of a conversation its last turn alone."""
    line: int
    """1-based line of the user's file where the row starts; the row's number for a JSON array and Parquet."""
    before: tuple[Turn, ...] = ()
    """What was said before the prompt: perhaps a system turn, then turns of user and assistant in pairs."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All that the model is shown, and the answer as the last."""
        return (*(turn.content for turn in self.before), self.prompt, self.answer)


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
            row = row_of(fields, line, columns)
        except BadRow as bad:
            yield bad.at(line)
            continue
        if (
            sum(len(text.encode(errors="surrogatepass")) for text in row.texts) > max_row_bytes
        ):  # Parquet has no raw line to measure
            yield too_large(max_row_bytes).at(line)
            continue
        yield row


def extra_fields(path: Path, format: Format, columns: Columns = ACCEPTED) -> list[str]:
    """Name the fields of the first row that are not read, for the report's warning."""
    names = column_names(path, format, MAX_ROW_BYTES, rows=1)
    used = columns.used(names)
    return [name for name in names if name not in used and is_plain(name)]


# --- the normalised form ---------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON Lines `{"prompt", "answer", "line"}`, the form that is stored and read by the engine.

    Before these a conversation has `before`, its earlier turns as `{"role", "content"}`.
    """
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(row_line(row))
            count += 1
    return count


def row_line(row: Row) -> str:
    """One line of the normalised form."""
    fields = {**turns_json(row.before), "prompt": row.prompt, "answer": row.answer, "line": row.line}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n"


def turns_json(before: Iterable[Turn]) -> dict[str, list[dict[str, str]]]:
    """Earlier turns as the field `before`; nothing where there are none."""
    turns = [turn._asdict() for turn in before]
    return {"before": turns} if turns else {}


def conversation(row: Row) -> bytes:
    """A row as a line of a dataset file, `{"messages": [...]}`."""
    turns = [*row.before, Turn("user", row.prompt), Turn("assistant", row.answer)]
    messages = [turn._asdict() for turn in turns]
    return json.dumps({"messages": messages}, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def stored_row(fields: Mapping[str, Any]) -> Row:
    """The row that a line of the normalised form holds."""
    before = tuple(Turn(**turn) for turn in fields.get("before") or ())
    return Row(fields["prompt"], fields["answer"], fields["line"], before)


def load_rows(path: Path) -> list[Row]:
    """Load what `write_rows` wrote. The file is ours, so a broken line is a bug and raises."""
    with path.open(encoding="utf-8", newline="\n") as file:
        return [stored_row(json.loads(line)) for line in file]


def hash_row(digest: Any, row: Row) -> None:
    """Feed one row into a content hash: its texts and their roles, so that the format of the file does not matter."""
    content = [row.prompt, row.answer, *([row.before] if row.before else [])]
    digest.update(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def content_hash(rows: Iterable[Row]) -> str:
    """Sha256 over prompts and answers in order; equal for a CSV and a JSON Lines file of the same rows."""
    digest = hashlib.sha256()
    for row in rows:
        hash_row(digest, row)
    return digest.hexdigest()


# --- one row's fields -> a row ---------------------------------------------------------------------------------------


def row_of(fields: Mapping[str, Any], line: int, columns: Columns = ACCEPTED) -> Row:
    """The row that the fields make, checked. Raises BadRow."""
    if columns.messages in fields:
        assert columns.messages is not None
        *before, question, reply = _turns(fields[columns.messages], pointer_to(columns.messages))
        return Row(question.content, reply.content, line, tuple(before))
    for shape in columns.shapes:
        if shape.prompt in fields and shape.answer in fields:
            prompt = _text(fields, shape.prompt)
            answer = _text(fields, shape.answer)
            if shape.more and fields.get(shape.more) not in (None, ""):
                prompt = f"{prompt}\n\n{_text(fields, shape.more)}"
            return Row(prompt, answer, line)
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
        raise wrong_type("text", value, pointer)
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


def _turns(messages: Any, pointer: str) -> list[Turn]:
    """The turns of a conversation: perhaps a system turn, then user and assistant by turns, the last one an answer."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise wrong_type("a list of {role, content}", messages, pointer)
    turns: list[Turn] = []
    for number, turn in enumerate(messages):
        role, place = turn.get("role"), f"{pointer}/{number}"
        if role not in ROLES:  # what else stands there is a stranger's text
            expected = f"one of the roles {', '.join(ROLES)}"
            raise BadRow("row.role", f"Expected {expected}.", f"{place}/role", expected=expected)
        if wrong := _out_of_turn(role, turns[-1].role if turns else None):
            raise BadRow("row.messages", wrong, f"{place}/role")
        try:
            turns.append(Turn(role, _text({"content": turn.get("content")}, "content")))
        except BadRow as bad:
            raise BadRow(bad.code, bad.message, f"{place}/content", **bad.known) from None
    if not turns or turns[-1].role != "assistant":
        text = "Expected the last turn to be the assistant's: it is what is trained."
        raise BadRow("row.messages", text, f"{pointer}/{len(turns) - 1}/role" if turns else pointer)
    return turns


def _out_of_turn(role: str, before: str | None) -> str | None:
    """What is wrong with a turn of this role behind one of another, None = behind none."""
    if role == "system" and before is not None:
        return "A system turn may only be the first."
    if role == "assistant" and before != "user":
        return "An assistant turn must follow a user's."
    if role == "user" and before == "user":
        return "Two user turns stand in a row; templates take them by turns with the assistant's."
    return None
