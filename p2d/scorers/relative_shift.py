"""Head scorer `relative_shift`: how far each head's slices moved in the proxy, measured by their own size."""

from __future__ import annotations

import torch
from torch import Tensor

from p2d.scorers import ScorerInput, per_head


def relative_shift(given: ScorerInput) -> Tensor:
    """Score each query head by the L2 norm of its weight change over the L2 norm of its base weights.

    Over the trained projections alone, in both norms. The squares of a KV group's k and v are split evenly over the group's
    heads, as in `shift`, so that a head of large weights does not win by them.

    Returns: scores_LH fp32, >= 0, a share; 0 for a head whose base slices are all 0.
    Source:  ours.
    """
    proxy, info = given.trained_proxy, given.info
    change_LH, size_LH = torch.zeros(2, info.n_layers, info.n_heads)
    for layer in range(info.n_layers):
        for projection in proxy.projections:
            base_UED = proxy.base(layer, projection)
            change_UED = proxy.trained(layer, projection) - base_UED
            change_LH[layer] += per_head(info, projection, change_UED.square()).cpu()
            size_LH[layer] += per_head(info, projection, base_UED.square()).cpu()
    return torch.where(size_LH > 0, (change_LH / size_LH).sqrt(), 0.0)
