"""Head scorer `uniform`: every head alike, for jobs that train them all. The default where there is nothing to choose."""

from __future__ import annotations

import torch
from torch import Tensor

from p2d.scorers import ScorerInput


def uniform(given: ScorerInput) -> Tensor:
    """Score each query head by 1; looks at nothing, so that nothing is paid for a choice that is none.

    A ratio below 1 would keep the first heads of the map, by layer and head.

    Returns: scores_LH fp32, all 1.
    Source:  ours: jobs with rank 8 in all heads end below those with whole slices of the best 10 % (docs/results/quality.md).
    """
    return torch.ones(given.info.n_layers, given.info.n_heads)
