"""Data scorers: rows -> responses of every head. One file each, named in `p2d.config.DATA_SCORERS`.

A scorer is a function `(ResponseInput) -> ResponseShard`. The shard must be a pure function of the input without
`progress`: the same range gives the same bytes, whichever worker computes it and however often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from p2d.config import JobConfig, Projection
from p2d.models import BaseModel
from p2d.pipeline import Progress, no_progress
from p2d.response_matrix import ResponseShard
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
    """The rows to score."""
    slices: tuple[Projection, ...]
    """The projections that will be trained."""
    config: JobConfig
    progress: Progress = no_progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Responses:
    """A shard and what it cost."""

    shard: ResponseShard
    tokens: int
    flops: int = 0
    """By `p2d.flops`."""


DataScorer = Callable[[ResponseInput], Responses]
