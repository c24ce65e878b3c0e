"""Numbers in sentences: one thing, two things."""

from __future__ import annotations


def counted(number: int, one: str, many: str) -> str:
    """`1 line is ...` or `2 lines are ...`: the number before the words that fit it."""
    return f"{number:,} {one if number == 1 else many}"
