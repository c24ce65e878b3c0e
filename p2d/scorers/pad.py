"""Head scorer `pad`: ALPS's parameter alignment distribution distance, the score of the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from p2d.scorers import ScorerInput
from p2d.scorers.combined import Combined, distributions, scores_of


def pad(given: ScorerInput) -> Tensor:
    """Score each query head by how far the distribution of its combined weights moved.

    `W^h = W_q^h (W_k^g)^T W_v^g` (Eq. 5, each [D, E]), `P^h = softmax(flatten(W^h) / tau)` (Eq. 6), score = the
    1-Wasserstein distance of P and P' over their index support scaled to [0, 1] = mean |cumsum(P - P')| (Eq. 7).

    Returns: scores_LH fp32, >= 0; 0 where q, k and v stood still (a proxy of o alone moves no head by this score).
    Source:  ALPS (arXiv 2505.18799). Not the score of its repository, which concatenates q, k, v and indexes k/v by query head:
             that one is close to noise (top-27 overlap of two proxies 7 against 19; docs/LOG.md).
    """
    return scores_of(given, _distance)


def _distance(combined: Combined) -> Tensor:
    at = distributions(combined, torch.float32)  # a sum of terms that are all good to 1e-7
    difference_SC = at.growth_SC.sub_(at.mean_growth_S[:, None]).mul_(at.P_SC)
    running_SC = torch.cumsum(difference_SC, dim=1, out=difference_SC)
    return running_SC.abs_().mean(dim=1) / (1 + at.mean_growth_S)
