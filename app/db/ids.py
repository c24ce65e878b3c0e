"""Ids that sort by time: `job_` + a UUIDv7 (RFC 9562) in Crockford base32, made in Python so that any PostgreSQL serves.

Not a secret and not a sequence: never count or compare them across clocks for order that must hold.
"""

from __future__ import annotations

import re
import secrets
import time

ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base32 in lower case: its characters sort like the digits they stand for."""

ID_PATTERN = re.compile(r"^[a-z]{2,4}_[0-9a-hjkmnp-tv-z]{26}$")


def new_id(prefix: str) -> str:
    """A new id such as `job_01jd8m4q6t...`: prefix, underscore, 26 characters."""
    return f"{prefix}_{_base32(_uuid7())}"


def first_id(prefix: str, *, ago_s: float) -> str:
    """The least id that could have been made so many seconds ago: a bound for what is newer, by this machine's clock."""
    return f"{prefix}_{_base32((time.time_ns() // 1_000_000 - round(1000 * ago_s) & (1 << 48) - 1) << 80)}"


def _uuid7() -> int:
    # 48 bits of milliseconds, then 12 bits of the fraction of the millisecond (RFC 9562, method 3): ids made by one
    # process in one millisecond still sort in the order they were made, to about 250 ns.
    ms, rest_ns = divmod(time.time_ns(), 1_000_000)
    fraction = (rest_ns * 4096) // 1_000_000
    return (ms & (1 << 48) - 1) << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | secrets.randbits(62)


_PAIRS = [first + second for first in ALPHABET for second in ALPHABET]


def _base32(number: int) -> str:
    return "".join([_PAIRS[number >> shift & 1023] for shift in range(120, -1, -10)])
