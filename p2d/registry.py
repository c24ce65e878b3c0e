"""Load a registered implementation by name.

A registry is a table of text, `{name: "module:attribute"}`, so that the API can list names without importing torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

from p2d.errors import ErrorDetail, UnknownName


def check_name(table: Collection[str], name: str, *, what: str, pointer: str) -> None:
    """Raise UnknownName (`config.unknown_name`), with the nearest known names, unless `name` is in `table`."""
    if name in table:
        return
    near = difflib.get_close_matches(name, table, n=1)
    text = f"There is no {what} {name!r}; known: {', '.join(sorted(table))}."
    if near:
        text += f" Did you mean {near[0]!r}?"
    fault = ErrorDetail(
        code=UnknownName.code,
        message=text,
        pointer=pointer,
        expected=f"one of {', '.join(sorted(table))}",
        got=repr(name[:40]),
    )
    raise UnknownName(text, errors=[fault])


def load(table: Mapping[str, str], name: str, *, what: str, pointer: str) -> Any:
    """Import and return what `table[name]` points at. Raises UnknownName."""
    check_name(table, name, what=what, pointer=pointer)
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)
