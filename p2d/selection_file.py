"""selection.jsonl: a line for every row, with its score and rank; the text only of the kept ones. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from p2d.errors import ConfigError, ErrorDetail
from p2d.guide_scale import Floats
from p2d.row_files import RowFile, line_starts
from p2d.row_keys import RowKeys
from p2d.rows import Row, stored_row, turns_json
from p2d.selection import Selection


@dataclass(frozen=True, slots=True)
class SelectedRow:
    """One line of selection.jsonl."""

    row: int
    line: int
    """Line of the user's file."""
    score: float | None
    """None where the row was not scored, as `quality` where the scorer has none."""
    quality: float | None
    rank: int
    """0 = best."""
    kept: bool
    repeats: int | None = None
    """The better-scored row that it nearly repeats; not in files that are older than this."""
    prompt: str | None = None
    """Only of kept rows, as is `answer`."""
    answer: str | None = None
    before: Sequence[Mapping[str, str]] = ()
    """Of kept rows that are conversations: the turns before the prompt, as `p2d.rows` stores them."""

    @property
    def kept_row(self) -> Row:
        """A kept row itself."""
        return stored_row(asdict(self))


def write_selection(path: Path, selection: Selection, rows: Sequence[Row]) -> None:
    """Write selection.jsonl: a line for every row, in row order; the text only of the kept ones."""
    assert len(rows) == len(selection.score_R)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for index, row in enumerate(rows):
            kept = bool(selection.rank_R[index] < selection.kept)
            line: dict[str, Any] = {
                "row": index,
                "line": row.line,
                "score": _number(selection.score_R, index),
                "quality": _number(selection.quality_R, index),
                "rank": int(selection.rank_R[index]),
                "kept": kept,
            }
            if selection.repeats_R[index] >= 0:
                line["repeats"] = int(selection.repeats_R[index])
            if kept:
                line |= {"prompt": row.prompt, "answer": row.answer, **turns_json(row.before)}
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")


def _number(value_R: Floats | None, row: int) -> float | None:
    return None if value_R is None or np.isnan(value_R[row]) else float(value_R[row])


def read_selection(path: Path) -> Iterator[SelectedRow]:
    """Stream what `write_selection` wrote."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield SelectedRow(**json.loads(line))


def check_selection(path: Path, rows: Sequence[Row]) -> None:
    """Make sure that a file is a selection over these training rows. Raises ConfigError (`config.invalid`)."""
    known = RowKeys()
    for row in rows:
        known.add(row)
    kept = strangers = 0
    try:
        for line in read_selection(path):
            kept += line.kept
            strangers += line.kept and line.kept_row not in known
    except (ValueError, TypeError):
        raise _unusable("The file is not a selection.") from None
    if strangers or not kept:
        text = (
            f"{strangers} of the {kept} rows that the selection keeps are not among the training rows: it is of another"
        )
        raise _unusable(f"{text} dataset, or of another seed, which holds other rows out.")


def _unusable(text: str) -> ConfigError:
    return ConfigError(text, errors=[ErrorDetail(code="config.selection", message=text, pointer="/data/selection")])


_KEPT = re.compile(rb'"kept"\s*:\s*true')
"""The field, without parsing the line: inside a row's text the quotes are escaped."""


def load_kept(path: Path) -> RowFile:
    """The kept rows of a selection.jsonl, in row order, each read when it is looked at."""
    starts = line_starts(path, _is_kept)
    assert starts, "a selection keeps at least one row"
    return RowFile(path, starts, _kept_row)


def _is_kept(line: bytes) -> bool:
    return _KEPT.search(line) is not None


def _kept_row(line: bytes) -> Row:
    return stored_row(json.loads(line))
