"""`alignment` for the heads and the likelihood of the answer for the row, joined by the mean of their ranks.

Alignment's own forward pass knows how likely each answer is, so the second opinion costs nothing. Each is blind where the
other sees: alignment hardly tells a wrong answer in the right style, and likelihood is fooled by answers that repeat their
prompt (docs/LOG.md).
"""

from __future__ import annotations

import numpy as np

from p2d.config import alignment_layers, alignment_projections
from p2d.errors import Diverged
from p2d.response_matrix import ResponseShard
from p2d.responses import ResponseInput, Responses
from p2d.responses.alignment import align


def alignment_likelihood(given: ResponseInput) -> Responses:
    """Cosines of every wanted row, and the log-likelihood of its answer in nats per token.

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
        quality_R=likelihood_R.astype(np.float32),
        scorer="alignment_likelihood",
        combine="rank",
    )
    return Responses(shard=shard, tokens=found.tokens, flops=round(found.flops))
