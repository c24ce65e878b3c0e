"""Head scorer `shift`: how far each head's slices moved in the proxy."""

from __future__ import annotations

import torch
from torch import Tensor

from p2d.scorers import ScorerInput, per_head


def shift(given: ScorerInput) -> Tensor:
    """Score each query head by the L2 norm of its weight change.

    The squared change of a KV group's k and v is split evenly over the group's heads. All trained projections count:
    with the paper's slices those are q, k and v.

    Returns: scores_LH fp32, >= 0, in weight units: compare within one model only.
    Source:  ours, not the paper's PAD: top-27 overlap of two proxies 21 on one task, 5 across tasks (docs/LOG.md).
    """
    proxy, info = given.trained_proxy, given.info
    scores_LH = torch.zeros(info.n_layers, info.n_heads)
    for layer in range(info.n_layers):
        for projection in proxy.projections:
            # fp32 before the difference: in bf16 the norms of 270 heads fall on 6 values.
            change = proxy.trained(layer, projection) - proxy.base(layer, projection)
            scores_LH[layer] += per_head(info, projection, change.square()).cpu()
    return scores_LH.sqrt()
