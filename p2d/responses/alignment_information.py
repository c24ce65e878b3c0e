"""`alignment` for the heads and `information` for the row, joined by the worse of their ranks.

Each is blind where the other sees: alignment to a wrong answer in the right style, information to rows of another task.
The conditional likelihood comes out of alignment's own forward pass, so that information costs one short pass more.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from p2d import flops
from p2d.config import alignment_layers, alignment_projections
from p2d.response_matrix import ResponseShard
from p2d.responses import ResponseInput, Responses
from p2d.responses.alignment import align
from p2d.responses.information import answer_nats, saved_nats, without_prompts


def alignment_information(given: ResponseInput) -> Responses:
    """Cosines and information of every wanted row. Raises Diverged if a gradient or a likelihood is not finite."""
    base, row_R = given.base, given.wanted()
    first = len(given.guide) + len(row_R)
    total = first + len(row_R)
    found = align(
        replace(given, progress=lambda done, _, metrics: given.progress(done, total, metrics)),
        alignment_layers(base.info.n_layers),
        alignment_projections(given.slices),
    )
    bare = without_prompts(base, found.rows)
    bare_R = answer_nats(base, bare, lambda done: given.progress(first + done, total, {}))
    shard = ResponseShard(
        span=given.span,
        row_R=row_R,
        layers=found.layers,
        n_heads=base.info.n_heads,
        response_RN=found.cosine_RN.astype(np.float16),
        quality_R=saved_nats(bare_R, found.nll_R, row_R),
        scorer="alignment_information",
        combine="worse_rank",
    )
    sizes = [(base.renderer.length(row), len(row.answer_ids)) for row in bare]
    operations = found.flops + flops.forward(base.info, flops.work_of(sizes))
    return Responses(shard=shard, tokens=found.tokens + sum(length for length, _ in sizes), flops=round(operations))
