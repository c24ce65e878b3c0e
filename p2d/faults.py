"""What is wrong with the rows of a file: all of it counted, the first of it in memory, a long list of it on the disk.

So a file of a million bad rows costs no more memory than one of a hundred. What is wrong with a row, `rows.py` says. No torch here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from p2d.errors import ErrorDetail

SHOWN = 100
"""Faults that an error names itself."""

MAX_LISTED = 100_000
"""Faults that a list on the disk holds, some 15 MB of them; the counts go on."""


class FaultList:
    """The faults of one dataset, in the order of its rows. A context manager: the list on the disk is whole when it is left."""

    def __init__(self, path: Path | None = None) -> None:
        """Args: path: where the list is written, a JSON object a line, if there is a fault; None = nowhere."""
        self.first: list[ErrorDetail] = []
        self.by_code: Counter[str] = Counter()
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def total(self) -> int:
        """All faults so far."""
        return self.by_code.total()

    def add(self, fault: ErrorDetail) -> None:
        """Count a fault, and list it while there is room."""
        if self.total < SHOWN:
            self.first.append(fault)
        if self.total < MAX_LISTED and self._path is not None:
            self._file = self._file or self._path.open("w", encoding="utf-8", newline="\n")
            self._file.write(fault_line(fault))
        self.by_code[fault.code] += 1


def fault_line(fault: ErrorDetail) -> str:
    """One line of a list."""
    said = {name: value for name, value in asdict(fault).items() if value is not None}
    return json.dumps(said, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_faults(path: Path) -> Iterator[ErrorDetail]:
    """The faults of a list, one at a time. The file is ours, so a broken line is a bug and raises."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield ErrorDetail(**json.loads(line))
