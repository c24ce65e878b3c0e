"""A whole selection.jsonl as arrays: every row's score, rank and place in the file, for views that need no model. No torch.

A ratio is a view: it keeps the best rows by rank, whatever the selection itself kept. 52 bytes a row; no row text.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2d.config import top_count
from p2d.guide_scale import Floats
from p2d.response_matrix import Combine
from p2d.selection import ranks

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionTable:
    """Every row of a selection; R rows, in row order."""

    line_R: Ints
    """Line of the user's file."""
    score_R: Floats
    """NaN where the row was not scored, as `quality_R` where the scorer has none."""
    quality_R: Floats
    rank_R: Ints
    """0 = best."""
    repeats_R: npt.NDArray[np.int32]
    """The better-scored row that a row nearly repeats; -1 where there is none, or the file is older than this."""
    start_R: Ints
    """Byte of selection.jsonl at which the row's line begins."""
    row_by_rank: Ints
    kept: int
    """Rows that the selection itself keeps."""
    scored: int
    size_bytes: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.rank_R)

    def kept_at(self, ratio: float | None) -> int:
        """How many rows a ratio keeps, (0, 1]; without one, how many the selection does."""
        return self.kept if ratio is None else min(top_count(ratio, self.rows), self.scored)

    def span(self, row: int) -> tuple[int, int]:
        """The bytes of the row's line, without the newline."""
        end = self.start_R[row + 1] if row + 1 < self.rows else self.size_bytes
        return int(self.start_R[row]), int(end) - 1

    def rank_parts(self, row: int, combine: Combine) -> tuple[int, int]:
        """Ranks by response and by quality of a scored row, 0 = best, where the score is made of these ranks.

        The quality is in the file, and what the score leaves of it is the other rank: see `p2d.selection_reasons.FORMULAS`.
        """
        place_R = np.flatnonzero(~np.isnan(self.score_R))
        by_quality = int(ranks(-self.quality_R[place_R])[np.searchsorted(place_R, row)])
        below_best = self.scored - 1 - float(self.score_R[row])
        if combine == "rank":
            return round(2 * below_best) - by_quality, by_quality
        better = round(self.scored * (below_best % 1))
        worse = round(below_best - better / self.scored)
        return (worse if by_quality == better else better), by_quality


def read_table(lines: Iterable[bytes]) -> SelectionTable:
    """The table of a selection.jsonl, from its lines in order, each without its newline."""
    line_no, rank, start, repeats = array("q"), array("q"), array("q"), array("i")
    score, quality = array("d"), array("d")
    kept = place = 0
    for line in lines:
        row = json.loads(line)
        line_no.append(row["line"])
        rank.append(row["rank"])
        score.append(np.nan if row["score"] is None else row["score"])
        quality.append(np.nan if row["quality"] is None else row["quality"])
        repeats.append(row.get("repeats", -1))
        start.append(place)
        kept += row["kept"]
        place += len(line) + 1
    rank_R = np.asarray(rank, dtype=np.int64)
    score_R = np.asarray(score, dtype=np.float64)
    return SelectionTable(
        line_R=np.asarray(line_no, dtype=np.int64),
        score_R=score_R,
        quality_R=np.asarray(quality, dtype=np.float64),
        rank_R=rank_R,
        repeats_R=np.asarray(repeats, dtype=np.int32),
        start_R=np.asarray(start, dtype=np.int64),
        row_by_rank=np.argsort(rank_R),
        kept=kept,
        scored=int((~np.isnan(score_R)).sum()),
        size_bytes=place,
    )
