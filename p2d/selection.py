"""Stage 2, second half: which rows to keep. Arithmetic on the response matrix, no model and no torch.

score of a row = sum over the chosen heads of the row's responses, combined with the row's quality as the scorer says;
the top `ceil(ratio * rows)` are kept, ties by row order. Another head set or ratio costs no model pass.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from p2d.config import top_count
from p2d.errors import EngineError
from p2d.response_matrix import Combine, ResponseShard
from p2d.rows import Row

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """A score for every row, and the view that a ratio takes of it."""

    score_R: Floats
    quality_R: Floats | None
    rank_R: npt.NDArray[np.int64]
    """0 = best."""
    kept: int
    scorer: str
    combine: Combine
    heads: int

    @property
    def kept_rows(self) -> list[int]:
        """Indices of the kept rows, in row order."""
        return [int(row) for row in np.flatnonzero(self.rank_R < self.kept)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionSummary:
    """What the report says about a selection; holds no row text."""

    rows: int
    kept: int
    scorer: str
    combine: Combine
    heads: int
    score_quantiles: list[float]
    """Of all rows: minimum, quarter, median, three quarters, maximum."""
    kept_score_min: float


def select_rows(shards: Sequence[ResponseShard], heads: Sequence[tuple[int, int]], ratio: float) -> Selection:
    """Score every row by what the chosen heads respond, and keep the best.

    Args:    shards: all of one matrix, in row order. heads: (layer, head) pairs. ratio: share of rows kept, (0, 1].
    Raises:  EngineError if a score is not finite.
    """
    first = shards[0]
    columns = np.array([layer * first.n_heads + head for layer, head in heads], dtype=np.intp)
    # float64 sums: fp16 values of 27 heads added in fp16 would tie.
    response_R = np.concatenate([shard.response_RN[:, columns].sum(axis=1, dtype=np.float64) for shard in shards])
    qualities = [shard.quality_R for shard in shards if shard.quality_R is not None]
    quality_R = np.concatenate(qualities).astype(np.float64) if qualities else None
    score_R = combine(response_R, quality_R, first.combine)
    bad = np.flatnonzero(~np.isfinite(score_R))
    if len(bad):
        raise EngineError(f"The scores of {len(bad)} rows are not finite.", rows=[int(row) for row in bad[:20]])
    return Selection(
        score_R=score_R,
        quality_R=quality_R,
        rank_R=ranks(-score_R),
        kept=top_count(ratio, len(score_R)),
        scorer=first.scorer,
        combine=first.combine,
        heads=len(heads),
    )


def combine(response_R: Floats, quality_R: Floats | None, how: Combine) -> Floats:
    """One score per row from the heads' response and the row's quality; higher is better."""
    if how == "response":
        return response_R
    assert quality_R is not None
    if how == "product":
        return response_R * quality_R
    worst = len(response_R) - 1
    return worst - (ranks(-response_R) + ranks(-quality_R)) / 2


def ranks(values_R: Floats) -> npt.NDArray[np.int64]:
    """Rank of each value, 0 = smallest; ties by row order."""
    rank_R = np.empty(len(values_R), dtype=np.int64)
    rank_R[np.argsort(values_R, kind="stable")] = np.arange(len(values_R))
    return rank_R


def summarise(selection: Selection) -> SelectionSummary:
    """The facts of a selection for the report."""
    kept = selection.score_R[selection.rank_R < selection.kept]
    return SelectionSummary(
        rows=len(selection.score_R),
        kept=selection.kept,
        scorer=selection.scorer,
        combine=selection.combine,
        heads=selection.heads,
        score_quantiles=[float(q) for q in np.quantile(selection.score_R, [0, 0.25, 0.5, 0.75, 1])],
        kept_score_min=float(kept.min()),
    )


# --- selection.jsonl -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SelectedRow:
    """One line of selection.jsonl."""

    row: int
    line: int
    """Line of the user's file."""
    score: float
    quality: float | None
    rank: int
    """0 = best."""
    kept: bool
    prompt: str | None = None
    """Only of kept rows, as is `answer`."""
    answer: str | None = None


def write_selection(path: Path, selection: Selection, rows: Sequence[Row]) -> None:
    """Write selection.jsonl: a line for every row, in row order; the text only of the kept ones."""
    assert len(rows) == len(selection.score_R)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for index, row in enumerate(rows):
            kept = bool(selection.rank_R[index] < selection.kept)
            line: dict[str, str | float | bool | None] = {
                "row": index,
                "line": row.line,
                "score": float(selection.score_R[index]),
                "quality": None if selection.quality_R is None else float(selection.quality_R[index]),
                "rank": int(selection.rank_R[index]),
                "kept": kept,
            }
            if kept:
                line |= {"prompt": row.prompt, "answer": row.answer}
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")


def read_selection(path: Path) -> Iterator[SelectedRow]:
    """Stream what `write_selection` wrote."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield SelectedRow(**json.loads(line))


def load_kept(path: Path) -> list[Row]:
    """The kept rows of a selection.jsonl, in row order."""
    kept = [line for line in read_selection(path) if line.kept]
    assert kept, "a selection keeps at least one row"
    return [Row(line.prompt or "", line.answer or "", line.line) for line in kept]
