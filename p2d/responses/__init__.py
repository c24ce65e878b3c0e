"""Data scorers: rows -> responses of heads. One file each, named in `p2d.config.DATA_SCORERS`.

A scorer is a function `(ResponseInput) -> Responses`. The shard must be a pure function of the input without `progress`:
the same range gives the same bytes, whichever worker computes it and however often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2d.config import JobConfig, Projection, pool_count
from p2d.models import BaseModel
from p2d.pipeline import Progress, no_progress
from p2d.response_matrix import Combine, ResponseShard
from p2d.rows import Row


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseInput:
    """What a scorer may look at."""

    base: BaseModel
    rows: Sequence[Row]
    """All training rows, not only those of the span: in-context scoring takes its queries from elsewhere."""
    guide: Sequence[Row]
    """Held-out rows of the task; never the rows that the result is evaluated on."""
    span: range
    """The rows that the shard answers for."""
    slices: tuple[Projection, ...]
    """The projections that will be trained."""
    config: JobConfig
    progress: Progress = no_progress

    def wanted(self) -> npt.NDArray[np.int64]:
        """The rows of the span to score, ascending: all of them, or in fast mode those in the pool.

        The pool is drawn over the whole dataset, so that it is the same in every shard.
        """
        row_R = np.arange(self.span.start, self.span.stop)
        count = pool_count(self.config.data, len(self.rows))
        if count == len(self.rows):
            return row_R
        drawn = np.random.default_rng([self.config.training.seed, len(self.rows), count]).permutation(len(self.rows))
        return np.sort(drawn[:count][(drawn[:count] >= self.span.start) & (drawn[:count] < self.span.stop)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Responses:
    """A shard and what it cost."""

    shard: ResponseShard
    tokens: int
    flops: int = 0
    """By `p2d.flops`."""


def of_rows_alone(
    given: ResponseInput, quality_R: npt.NDArray[np.float32], scorer: str, combine: Combine
) -> ResponseShard:
    """The shard of a scorer that looks at no head: each wanted row has its quality, whatever the heads."""
    return ResponseShard(
        span=given.span,
        row_R=given.wanted(),
        layers=range(0),
        n_heads=given.base.info.n_heads,
        response_RN=np.zeros((len(quality_R), 0), dtype=np.float16),
        quality_R=quality_R,
        scorer=scorer,
        combine=combine,
    )


DataScorer = Callable[[ResponseInput], Responses]
