"""Why a row has its score: what each chosen head responds to it, and how that adds up. Arithmetic on one shard, no torch.

The sum is the score's own: fp16 responses add up exactly in float64, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from p2d.guide_scale import GuideScale, bar_of, guide_scale
from p2d.head_maps import Head
from p2d.response_matrix import Combine, ResponseShard


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadResponse:
    """One chosen head's response to the row."""

    layer: int
    head: int
    response: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReason:
    """What a row's score is made of."""

    combine: Combine
    heads: tuple[HeadResponse, ...]
    """Of the chosen heads that were scored, best head first."""
    stand_ins: int
    """Chosen heads in layers that were not scored; `stand_in` is added for each."""
    stand_in: float
    """Mean of all scored heads' responses to the row; 0 where none stands in."""
    response: float
    """Sum over `heads`, and `stand_ins * stand_in`."""
    quality: float | None
    guide: GuideScale | None
    """What both are measured by; None where the guide was not rated."""
    unscored: str | None = None
    """Why the row was not scored, has none of these parts, and is kept or not all the same: TRUSTED or UNLIKE."""

    @property
    def bar(self) -> float | None:
        """Score from which on chance has decided; None where it never does."""
        return bar_of(self.guide, self.combine)

    @property
    def formula(self) -> str:
        """How the score is made of these parts, or why there is none."""
        return self.unscored or FORMULAS[self.combine]


FORMULAS: dict[Combine, str] = {
    "response": "score = response",
    "product": "score = response * quality",
    "quality": "score = quality",
    "pass": "score = quality, which is 1 where the row passes and else 0, and a number drawn from 0 to 1",
    "guide": "score = the lesser of (response - response_median) / response_spread and (quality - quality_median) / "
    "quality_spread, but from the bar on, or for all rows where the pool is like the guide, the bar and a number drawn from 0 to 1",
    "worse_rank": "score = (scored - 1) - (the worse of response_rank and quality_rank) - (the better one) / scored",
    "rank": "score = (scored - 1) - (response_rank + quality_rank) / 2",
}
"""How a score is made of its parts; `p2d.selection.combine` does it for all rows at once."""

TRUSTED = "score = the bar and a number drawn from 0 to 1: the row was not scored, for a random sample beside it is like the guide"
"""The same of a row that has no parts."""

UNLIKE = (
    "no score: by its words the row is not like the guide's, and of a random sample the rows that are like it by their words "
    "were taken to be all that is"
)
"""The same of a row that is left out."""


def _unscored(shard: ResponseShard, heads: Sequence[Head], why: str) -> RowReason:
    return RowReason(
        combine=shard.combine,
        heads=(),
        stand_ins=0,
        stand_in=0.0,
        response=0.0,
        quality=None,
        guide=guide_scale(shard, heads),
        unscored=why,
    )


def explain(shard: ResponseShard, row: int, heads: Sequence[Head]) -> RowReason | None:
    """What the row's score is made of, or why it was not scored; None where it merely was not.

    Args:   shard: the one whose span has the row. heads: the chosen ones, best first.
    """
    assert row in shard.span
    place = int(np.searchsorted(shard.row_R, row))
    if place == len(shard.row_R) or shard.row_R[place] != row:
        if not shard.rest_like_guide:
            return None
        left_out = shard.unlike_R is not None and row in shard.unlike_R
        return _unscored(shard, heads, UNLIKE if left_out else TRUSTED)
    response_N = shard.response_RN[place].astype(np.float64)
    scored = [
        HeadResponse(
            layer=layer, head=head, response=float(response_N[(layer - shard.layers.start) * shard.n_heads + head])
        )
        for layer, head in heads
        if layer in shard.layers
    ]
    stand_ins = len(heads) - len(scored) if len(shard.layers) else 0
    stand_in = float(response_N.mean()) if stand_ins else 0.0
    return RowReason(
        combine=shard.combine,
        heads=tuple(scored),
        stand_ins=stand_ins,
        stand_in=stand_in,
        response=sum(head.response for head in scored) + stand_ins * stand_in,
        quality=None if shard.quality_R is None else float(shard.quality_R[place]),
        guide=guide_scale(shard, heads),
    )
