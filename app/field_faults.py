"""What would have been right in a field, and what came instead, of a fault that pydantic found. Never the value of a text.

A text may be a row or a secret, so of one only its type and length are told; a number that is out of bounds is told, and so is
a word that was meant to be one of a few and nearly is.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic_core import ErrorDetails

from p2d.formats import json_type

_TYPES = {
    "bool": "a boolean",
    "dict": "an object",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "model": "an object",
    "model_attributes": "an object",
    "string": "text",
    "tuple": "a list",
    "timezone": "a time with its offset",
    "datetime": "a time as in 2026-11-25T17:05:00Z",
    "datetime_from_date": "a time as in 2026-11-25T17:05:00Z",
}
"""What the first words of pydantic's names of faults of type mean in JSON."""

_BOUNDS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entries",
    "finite_number": "a finite number",
    "int_from_float": "a whole number",
    "literal_error": "{expected}",
    "missing": "a value",
}

_WORD = re.compile(r"'([^']*)'")


def expected_and_got(error: ErrorDetails) -> tuple[str | None, str | None]:
    """Both in a few words; None where the fault's own message says all that can be said."""
    kind, value, known = error["type"], error["input"], error.get("ctx", {})
    if kind in ("too_long", "too_short") and isinstance(value, str):
        kind = f"string_{kind}"  # a text behind a check of our own
    if kind in _BOUNDS:
        expected = _BOUNDS[kind].format(**known)
    else:
        expected = _TYPES.get(re.sub(r"_(type|parsing|naive|aware|inclusive|object_invalid)$", "", kind), "")
    if not expected:
        return None, None
    if kind == "missing":
        return expected, "nothing"
    if kind == "literal_error" and isinstance(value, str):
        words = _WORD.findall(known["expected"])
        return expected, repr(value) if difflib.get_close_matches(value, words, n=1) else json_type(value)
    if kind in _BOUNDS and isinstance(value, int | float):
        return expected, str(value)[:40]
    return expected, _got(value)


def _got(value: Any) -> str:
    if isinstance(value, str):
        return f"text of length {len(value)}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return json_type(value)
