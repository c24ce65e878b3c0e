"""`alignment` for the heads and how plausible the answer is for the row: a row should be as good as held-out rows by both.

Alignment's own forward pass knows how likely each answer is, so the second opinion costs nothing. Each is blind where the
other sees: alignment hardly tells a wrong answer in the right style, and likelihood is fooled by answers that repeat their
prompt. So a row is as good as the worse opinion of it, and an answer much likelier than those of the held-out rows counts as
less plausible, not more: no answer of the task is as easy. Ours, by measurement (docs/decisions/0030).

The guide's own rows are rated like those of the pool, each by the others, and are the measure of both opinions: a row that is
as good as most of them is as good as any (docs/decisions/0031). Fewer than MIN_GUIDE guide rows measure nothing: then the worse of
the two ranks decides.

Where the pool itself is to say how many of its rows are kept, a random sample is rated first, of rows that repeat no other, and
apart from it a few of those that do not read like the guide's, where these are many (docs/decisions/0038). If the pool by this
sample is like the guide, all of it is kept, and no pass is spent on the rest (docs/decisions/0034). If only those of the sample are
that read like the guide's, then so are all other rows that do, and what does not read like it is left out (docs/decisions/0037).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from p2d.arch.spec import every_head
from p2d.config import (
    FEWEST_LEFT,
    LOOK_APART,
    MIN_GUIDE,
    alignment_layers,
    alignment_projections,
    look_count,
    rates_guide,
    samples_first,
)
from p2d.errors import Diverged
from p2d.guide_scale import LIKE_GUIDE, outscored, scores_beside_guide
from p2d.guide_words import unlike_guide
from p2d.near_duplicates import repetitions
from p2d.response_matrix import ResponseShard, median_and_spread
from p2d.responses import ResponseInput, Responses
from p2d.responses.alignment import Aligned, Alignment, Floats, Ints

NAME = "alignment_likelihood"

TOO_LIKELY = 2.0
"""Spreads above the guide's median from which on likelihood speaks against an answer."""
STEEPER = 5.0
"""How many times as fast plausibility falls there as it rose. With 1.5 to 3 spreads and 3 to 10 times, 15 % or less of the kept
half was bad that the mean of ranks left at 31 to 36 (docs/LOG.md), the guide being clean."""

MANY = 1 / 8
"""Share of the rows that repeat no other from which on those that words set apart are asked about by themselves, for fewer hardly
show, nor harm; and least share that must read like the guide for words to leave out the others."""
APART = 0.7
"""Most that the guide's rows may outscore LOOK_APART of these where all rows are to be kept. 8 clean rows, with a standard error of
0.12, are outscored more in 4 % of the cases."""


def alignment_likelihood(given: ResponseInput) -> Responses:
    """Cosines of every wanted row, and the plausibility of its answer in nats per token.

    Raises: Diverged if a gradient or a likelihood is not finite.
    """
    layers, projections = alignment_layers(given.base.info.n_layers), alignment_projections(given.slices)
    alignment = Alignment(given, layers, projections, rate_guide=rates_guide(NAME, len(given.guide)))
    row_R = given.wanted()
    look = _look(given, row_R)
    if look is not None:
        alignment.rate(look.row_R)
        found = alignment.found()
        vouched = _vouched(look, _shard(given, found), every_head(given.base.info))
        if vouched is not None:
            given.progress(len(row_R), len(row_R), {})
            return _responses(found, vouched)
        row_R = np.setdiff1d(row_R, look.row_R)
    alignment.rate(row_R)
    found = alignment.found()
    return _responses(found, _shard(given, found))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Look:
    """A sample of the rows, and what their words say."""

    row_R: Ints
    """The sample, ascending."""
    unlike_R: Ints
    """All rows that do not read like the guide's, in the sample or not; none where that would be nearly all."""
    apart: float | None
    """Their share of the rows that repeat no other, where they are asked about by themselves: in the sample it is another."""


def _look(given: ResponseInput, row_R: Ints) -> _Look | None:
    """A random sample, where the pool may turn out to be like the guide; None where all rows are to be rated at once."""
    if not samples_first(given.config):
        return None
    count = look_count(len(row_R))
    # What repeats another row is kept last: copies of a few rows would speak for what is kept.
    fresh_R = row_R[repetitions(given.rows, row_R) < 0]
    if len(fresh_R) <= count + LOOK_APART:
        return None  # hardly a row would be spared
    unlike_R = row_R[unlike_guide(given.rows, row_R, given.guide)]
    rng = np.random.default_rng([given.config.training.seed, len(given.rows), given.span.start])
    fresh_R = rng.permutation(fresh_R)
    apart_R = np.isin(fresh_R, unlike_R)
    many = max(LOOK_APART, MANY * len(fresh_R))
    if (~apart_R).sum() < max(FEWEST_LEFT, many):  # then words are not heard
        unlike_R, apart_R = unlike_R[:0], np.zeros_like(apart_R)
    if apart_R.sum() < many:
        return _Look(row_R=np.sort(fresh_R[:count]), unlike_R=unlike_R, apart=None)
    sample_R = np.concatenate([fresh_R[~apart_R][:count], fresh_R[apart_R][:LOOK_APART]])
    return _Look(row_R=np.sort(sample_R), unlike_R=unlike_R, apart=float(apart_R.mean()))


def _vouched(look: _Look, shard: ResponseShard, heads: Sequence[tuple[int, int]]) -> ResponseShard | None:
    """The rated sample, if it vouches for the other rows, or for those that read like the guide's; else None."""
    if (scored := scores_beside_guide(shard, heads)) is None:
        return None
    score_G, score_R = scored
    apart_R = np.isin(shard.row_R, look.unlike_R)
    left = outscored(score_G, score_R[~apart_R])
    if look.apart is None:
        whole, apart_are_like = outscored(score_G, score_R), True
    else:
        apart = outscored(score_G, score_R[apart_R])
        whole, apart_are_like = (1 - look.apart) * left + look.apart * apart, apart <= APART
    if apart_are_like and whole <= LIKE_GUIDE:
        return replace(shard, rest_like_guide=True)
    if (~apart_R).sum() >= FEWEST_LEFT and left <= LIKE_GUIDE:
        return replace(shard, rest_like_guide=True, unlike_R=look.unlike_R)
    return None


def _responses(found: Aligned, shard: ResponseShard) -> Responses:
    return Responses(shard=shard, tokens=found.tokens, flops=round(found.flops))


def _shard(given: ResponseInput, found: Aligned) -> ResponseShard:
    """The rated rows; raises Diverged if a likelihood is not finite."""
    likelihood_R, guide_likelihood_G = found.likelihood_R, found.guide_likelihood_G
    if not np.isfinite(likelihood_R).all():
        raise Diverged("The likelihood of an answer is not finite.")
    rated, guide_quality_G = found.guide_cosine_GN, plausibility(guide_likelihood_G, guide_likelihood_G)
    return ResponseShard(
        span=given.span,
        row_R=found.row_R,
        layers=found.layers,
        n_heads=given.base.info.n_heads,
        response_RN=found.cosine_RN.astype(np.float16),
        quality_R=plausibility(likelihood_R, guide_likelihood_G).astype(np.float32),
        guide_response_GN=None if rated is None else rated.astype(np.float16),
        guide_quality_G=None if rated is None else guide_quality_G.astype(np.float32),
        scorer=NAME,
        combine="worse_rank" if rated is None else "guide",
    )


def plausibility(likelihood_R: Floats, guide_likelihood_G: Floats) -> Floats:
    """The likelihood itself, as long as answers of the task are as likely; less of it above, [R].

    Median and median absolute deviation: half of the guide's rows may be bad. A guide of fewer than MIN_GUIDE rows, or of rows
    that are all alike, sets no bound.

    Args:   likelihood_R, guide_likelihood_G: nats per answer token.
    """
    if len(guide_likelihood_G) < MIN_GUIDE:
        return likelihood_R
    median, spread = median_and_spread(guide_likelihood_G)
    if not spread:
        return likelihood_R
    most = median + TOO_LIKELY * spread
    plausible_R: Floats = np.minimum(likelihood_R, most - STEEPER * (likelihood_R - most))
    return plausible_R
