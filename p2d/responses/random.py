"""Random responses: the control arm that a real data scorer has to beat. Costs nothing and looks at nothing."""

from __future__ import annotations

import hashlib

import numpy as np

from p2d.response_matrix import ResponseShard
from p2d.responses import ResponseInput, Responses


def random(given: ResponseInput) -> Responses:
    """Draw one number per row and give it to every head, so that any head set keeps the same random rows."""
    seed, info, row_R = given.config.training.seed, given.base.info, given.wanted()
    # A hash of the row's number, not a generator: row 317 draws the same number in whatever shard it is.
    drawn = [int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:2], "big") / 65536 for row in row_R]
    shard = ResponseShard(
        span=given.span,
        row_R=row_R,
        layers=range(info.n_layers),
        n_heads=info.n_heads,
        response_RN=np.repeat(np.array(drawn, dtype=np.float16)[:, None], info.n_layers * info.n_heads, axis=1),
        scorer="random",
        combine="response",
    )
    return Responses(shard=shard, tokens=0)
