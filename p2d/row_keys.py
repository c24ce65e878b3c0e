"""Which rows were seen, in some 11 bytes a row: for repeated rows, and for held-out rows that training rows repeat."""

from __future__ import annotations

import hashlib

from p2d.rows import Row, hash_row

BUCKETS = 1 << 12
STORED_BYTES = 8
"""With the bucket 76 bits of a hash: among 10^6 different rows two agree once in 10^11 datasets."""


class RowKeys:
    """A set of rows that holds no row. A set of digests would take 80 bytes a row; numpy is not at hand in the API."""

    def __init__(self) -> None:
        self._buckets: list[bytearray | None] = [None] * BUCKETS

    def add(self, row: Row) -> bool:
        """Remember a row; whether it is new."""
        bucket, key = _place(row)
        stored = self._buckets[bucket]
        if stored is None:
            self._buckets[bucket] = bytearray(key)
            return True
        if _holds(stored, key):
            return False
        stored += key
        return True

    def __contains__(self, row: Row) -> bool:
        bucket, key = _place(row)
        stored = self._buckets[bucket]
        return stored is not None and _holds(stored, key)


def _place(row: Row) -> tuple[int, bytes]:
    digest = hashlib.blake2b(digest_size=2 + STORED_BYTES)
    hash_row(digest, row)
    whole = digest.digest()
    return int.from_bytes(whole[:2], "little") % BUCKETS, whole[2:]


def _holds(stored: bytearray, key: bytes) -> bool:
    """Whether the key stands in a bucket at a place where a key begins."""
    found = stored.find(key)
    while found > 0 and found % STORED_BYTES:
        found = stored.find(key, found + 1)
    return found >= 0
