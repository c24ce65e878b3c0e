"""Whether the values of a dataclass have the types that its annotations name: what mypy sees, for callers who do not run it.

Knows the annotations that configs use: text, numbers, None, words (Literal), tuples of one kind, unions, further dataclasses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from p2d.errors import ErrorDetail

_NAMES = {str: "text", int: "a whole number", float: "a number", NoneType: "None"}


def wrong_types(value: object, kind: type, pointer: str = "") -> Iterator[ErrorDetail]:
    """Every field of `value`, a dataclass of this kind, whose type is wrong, by JSON pointer; dataclasses within it too."""
    if not isinstance(value, kind):
        yield _wrong(value, kind, pointer)
        return
    for name, hint in _hints(kind).items():
        given, place = getattr(value, name), f"{pointer}/{name}"
        if isinstance(hint, type) and is_dataclass(hint):
            yield from wrong_types(given, hint, place)
        elif not _fits(given, hint):
            yield _wrong(given, hint, place)


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: object, hint: Any, *, alone: bool = True) -> bool:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one, alone=False) for one in get_args(hint))
    if origin is Literal:
        # Where words are all that a field takes, a wrong one is a wrong value; beside numbers ("auto") it is a wrong type.
        return isinstance(value, str) if alone else isinstance(value, str) and value in get_args(hint)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, get_args(hint)[0]) for one in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _wrong(value: object, hint: Any, pointer: str) -> ErrorDetail:
    expected, got = _named(hint), type(value).__name__
    if isinstance(value, (str, int, float)):
        got += f" {value!r:.40}"
    message = f"Expected {expected}, got {got}."
    return ErrorDetail(code="config.wrong_type", message=message, pointer=pointer, expected=expected, got=got)


def _named(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return " or ".join(_named(one) for one in get_args(hint))
    if origin is Literal:
        return " or ".join(repr(word) for word in get_args(hint))
    if origin is tuple:
        return f"a tuple of {_named(get_args(hint)[0])}"
    return _NAMES.get(hint) or str(hint.__name__)
