"""`alignment` for the heads and how plausible the answer is for the row, joined by the worse of their ranks.

Alignment's own forward pass knows how likely each answer is, so the second opinion costs nothing. Each is blind where the
other sees: alignment hardly tells a wrong answer in the right style, and likelihood is fooled by answers that repeat their
prompt. So a row is as good as the worse opinion of it, and an answer much likelier than those of the held-out rows counts as
less plausible, not more: no answer of the task is as easy. Ours, by measurement (docs/decisions/0030).
"""

from __future__ import annotations

import numpy as np

from p2d.config import alignment_layers, alignment_projections
from p2d.errors import Diverged
from p2d.response_matrix import ResponseShard
from p2d.responses import ResponseInput, Responses
from p2d.responses.alignment import Floats, align

TOO_LIKELY = 2.0
"""Spreads above the guide's median from which on likelihood speaks against an answer."""
STEEPER = 5.0
"""How many times as fast plausibility falls there as it rose. With 1.5 to 3 spreads and 3 to 10 times, 15 % or less of the kept
half was bad that the mean of ranks left at 31 to 36 (docs/LOG.md), the guide being clean."""
MIN_GUIDE = 8
"""Fewest guide rows that tell how likely answers of the task are. A guess: a spread of fewer is noise."""
MAD_TO_SIGMA = 1.4826
"""Median absolute deviation -> standard deviation, for a normal distribution."""


def alignment_likelihood(given: ResponseInput) -> Responses:
    """Cosines of every wanted row, and the plausibility of its answer in nats per token.

    Raises: Diverged if a gradient or a likelihood is not finite.
    """
    found = align(given, alignment_layers(given.base.info.n_layers), alignment_projections(given.slices))
    likelihood_R = -found.nll_R / [len(row.answer_ids) for row in found.rows]
    if not np.isfinite(likelihood_R).all():
        raise Diverged("The likelihood of an answer is not finite.")
    shard = ResponseShard(
        span=given.span,
        row_R=given.wanted(),
        layers=found.layers,
        n_heads=given.base.info.n_heads,
        response_RN=found.cosine_RN.astype(np.float16),
        quality_R=plausibility(likelihood_R, found.guide_likelihood_G).astype(np.float32),
        scorer="alignment_likelihood",
        combine="worse_rank",
    )
    return Responses(shard=shard, tokens=found.tokens, flops=round(found.flops))


def plausibility(likelihood_R: Floats, guide_likelihood_G: Floats) -> Floats:
    """The likelihood itself, as long as answers of the task are as likely; less of it above, [R].

    Median and median absolute deviation: half of the guide's rows may be bad. A guide of fewer than MIN_GUIDE rows, or of rows
    that are all alike, sets no bound.

    Args:   likelihood_R, guide_likelihood_G: nats per answer token.
    """
    if len(guide_likelihood_G) < MIN_GUIDE:
        return likelihood_R
    median = np.median(guide_likelihood_G)
    spread = MAD_TO_SIGMA * np.median(np.abs(guide_likelihood_G - median))
    if not spread:
        return likelihood_R
    most = median + TOO_LIKELY * spread
    plausible_R: Floats = np.minimum(likelihood_R, most - STEEPER * (likelihood_R - most))
    return plausible_R
