"""Which columns of a file make a row: the accepted names, or a user's own names for them. Reads no file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from p2d.errors import ErrorDetail, MappingInvalid
from p2d.wording import counted

MAX_COLUMN_CHARS = 200
"""Longest name of a column that a mapping may give."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Names that make a row: `prompt` and `answer` are required, `more` is appended to the prompt where present."""

    prompt: str
    answer: str
    more: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (self.prompt, self.answer, *([self.more] if self.more else []))


SHAPES = (
    Shape("question", "answer"),
    Shape("prompt", "completion"),
    Shape("prompt", "answer"),
    Shape("instruction", "output", more="input"),
)
"""Accepted names; the first shape whose required ones are all there is taken. Beside them: `messages`, two turns."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where the rows of one file stand."""

    shapes: tuple[Shape, ...] = SHAPES
    messages: str | None = "messages"
    """The column of conversations; None: this file has none."""
    mapping: Mapping[str, str] = field(default_factory=dict)
    """What the user said: field -> column."""

    @property
    def names(self) -> set[str]:
        """Every column that can be part of a row; no other one is worth reading."""
        return {name for shape in self.shapes for name in shape.names} | ({self.messages} if self.messages else set())

    @property
    def expected(self) -> str:
        """What a row may look like, in words."""
        ways = [_words(shape) for shape in self.shapes] + ([self.messages] if self.messages else [])
        return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])}, or {ways[-1]}"

    def used(self, names: Collection[str]) -> set[str]:
        """Those of a row's columns that are read."""
        if self.messages in names:
            return {name for name in [self.messages] if name}
        shape = next((shape for shape in self.shapes if shape.prompt in names and shape.answer in names), None)
        return set(shape.names) if shape else set()

    def check(self, names: Collection[str]) -> None:
        """Raise MappingInvalid for every mapped column that is not among the columns of the file."""
        missing = {field: column for field, column in self.mapping.items() if column not in names}
        if missing:
            has = shown(names)
            faults = [
                ErrorDetail(code="mapping.no_such_column", message=f"{field!r}: the file has no column {column!r}.")
                for field, column in missing.items()
            ]
            columns = ", ".join(repr(column) for column in missing.values())
            raise MappingInvalid(f"The file has no column {columns}; it has {has}.", errors=faults)


ACCEPTED = Columns()
"""The columns of a file without a mapping."""

FIELDS = sorted(ACCEPTED.names)
"""What a mapping may map."""

_NAME = re.compile(r"[^\W\d][\w.-]{0,39}")
"""What a column's name looks like. A CSV without a header has row text where names should be: that is never repeated."""


def shown(names: Collection[str], *, most: int = 10) -> str:
    """The names that may be repeated, in words, and how many others there are."""
    plain = [name for name in names if is_plain(name)][:most]
    others = len(names) - len(plain)
    said = ", ".join(plain)
    if not others:
        return said or "no columns"
    if said:
        return f"{said} and {counted(others, 'other', 'others')}"
    return counted(others, "other column", "other columns")


def is_plain(name: str) -> bool:
    """Whether a column's name may be repeated in a message."""
    return _NAME.fullmatch(name) is not None


def mapped(mapping: Mapping[str, str]) -> Columns:
    """The columns of a file whose user gives some of them other names; what is not mapped keeps its own.

    Args:   mapping: field -> column, for example `{"prompt": "Frage", "completion": "Antwort"}`.
    Raises: MappingInvalid with every fault: an unknown field, a column named twice or not at all, fields of no one shape.
    """
    if not mapping:
        return ACCEPTED
    faults = [
        _fault(name, f"There is no field {name[:40]!r}; the fields are {', '.join(FIELDS)}.")
        for name in mapping
        if name not in FIELDS
    ]
    for name, column in mapping.items():
        if not column.strip() or len(column) > MAX_COLUMN_CHARS:
            faults.append(_fault(name, f"Expected a column's name of 1 to {MAX_COLUMN_CHARS} characters."))
        elif list(mapping.values()).count(column) > 1:
            faults.append(_fault(name, f"The column {column!r} is given twice."))
    shapes = [_renamed(shape, mapping) for shape in SHAPES if set(mapping) <= set(shape.names)]
    # {"question": "answer"} would read one column twice.
    shapes = [shape for shape in shapes if len(set(shape.names)) == len(shape.names)]
    alone = set(mapping) == {"messages"}
    if not faults and not shapes and not alone:
        faults = [
            _fault(name, f"These columns make no row together; rows are {ACCEPTED.expected}.") for name in mapping
        ]
    if faults:
        raise MappingInvalid(" ".join(dict.fromkeys(fault.message for fault in faults)), errors=faults)
    if alone:
        return Columns((), mapping["messages"], dict(mapping))
    return Columns(tuple(shapes), None, dict(mapping))


def _renamed(shape: Shape, mapping: Mapping[str, str]) -> Shape:
    prompt, answer, *more = (mapping.get(name, name) for name in shape.names)
    return Shape(prompt, answer, *more)


def _words(shape: Shape) -> str:
    return shape.prompt + (f" (+ {shape.more})" if shape.more else "") + f" + {shape.answer}"


def _fault(field: str, message: str) -> ErrorDetail:
    # An unknown field is a stranger's text: its place is said only when it looks like a name.
    return ErrorDetail(
        code="mapping.invalid", message=message, pointer=f"/mapping/{field}" if is_plain(field) else "/mapping"
    )
