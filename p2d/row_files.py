"""Files of rows as sequences: a row is parsed when it is looked at, so a dataset of any size costs 8 bytes of memory a row.

Beside `rows.jsonl` may stand `rows.index`, the place of every line: then a shard that needs 2,000 rows of a million reads
those alone, and the 8 bytes stay on disk. Reading a user's own file is `rows.py`'s business. No torch, no numpy here.
"""

from __future__ import annotations

import json
import mmap
import sys
import weakref
from array import array
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from p2d.rows import Row, row_line, stored_row
from p2d.sequences import MadeSequence


class RowFile(MadeSequence[Row]):
    """Rows of a JSON Lines file, in the order of `starts`. The file must not change meanwhile.

    It is read, not mapped: the pages of a map would count as this process's memory, and grow with the file.
    """

    def __init__(self, path: Path, starts: Sequence[int], parse: Callable[[bytes], Row]) -> None:
        """Args: starts: byte at which each row's line begins. parse: makes the row of a line."""
        self._starts, self._parse = starts, parse
        self._file = path.open("rb")
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self._starts)

    def at(self, place: int) -> Row:
        self._file.seek(self._starts[place])
        return self._parse(self._file.readline())


class RowView(MadeSequence[Row]):
    """Some rows of a sequence of rows, by their indices; holds no row."""

    def __init__(self, rows: Sequence[Row], indices: Sequence[int]) -> None:
        self._rows, self._indices = rows, indices

    def __len__(self) -> int:
        return len(self._indices)

    def at(self, place: int) -> Row:
        return self._rows[self._indices[place]]


def open_rows(path: Path) -> RowFile:
    """The rows of a file that `write_rows` or `write_row_file` wrote."""
    index = _index_of(path)
    if not index.is_file():
        return RowFile(path, line_starts(path), _parse_row)
    with path.open("rb") as file:
        starts = _load_index(index)
        file.seek(starts[-1])
        file.readline()
        assert file.tell() == path.stat().st_size, f"{index.name} is of another {path.name}"
    return RowFile(path, starts, _parse_row)


def write_row_file(path: Path, rows: Iterable[Row]) -> int:
    """Write the rows as `p2d.rows.write_rows` does, and the index of their places beside them; how many."""
    count = place = 0
    with path.open("wb") as file, _index_of(path).open("wb") as index:
        for row in rows:
            line = row_line(row).encode()
            file.write(line)
            index.write(place.to_bytes(8, sys.byteorder))
            place += len(line)
            count += 1
    return count


def line_starts(path: Path, wanted: Callable[[bytes], bool] = lambda line: True) -> array[int]:
    """Where the lines of a file begin that are wanted."""
    starts, place = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            if wanted(line):
                starts.append(place)
            place += len(line)
    return starts


def _index_of(path: Path) -> Path:
    return path.with_suffix(".index")


def _load_index(path: Path) -> Sequence[int]:
    """The index as a map of the file: a reader touches the pages of its own rows alone."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return memoryview(mapped).cast("q")


def _parse_row(line: bytes) -> Row:
    return stored_row(json.loads(line))
