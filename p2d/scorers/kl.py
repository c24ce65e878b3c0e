"""Head scorer `kl`: `pad`'s distributions, compared by Kullback-Leibler divergence instead of Wasserstein distance."""

from __future__ import annotations

import torch
from torch import Tensor

from p2d.scorers import ScorerInput
from p2d.scorers.combined import Combined, distributions, scores_of


def kl(given: ScorerInput) -> Tensor:
    """Score each query head by `KL(P || P') = sum of P log(P / P')`, P and P' as in `p2d.scorers.pad`.

    Unlike `pad` it does not depend on the order of the entries, which an index support gives a meaning that it has not.

    Returns: scores_LH fp32, nats, >= 0; 0 where q, k and v stood still.
    Source:  the distributions are ALPS's (arXiv 2505.18799, Eq. 5 and 6), the divergence is ours.
    """
    return scores_of(given, _divergence)


def _divergence(combined: Combined) -> Tensor:
    """`sum of P (P'/P - 1 - log(P'/P))`: the same sum, as `P' - P` adds to 0, but every term is >= 0 and none cancels."""
    at = distributions(combined, torch.float64)
    mean_S1 = at.mean_growth_S[:, None]
    log_ratio_SC = combined.change_SC.double().sub_(mean_S1.log1p())
    ratio_minus_1_SC = at.growth_SC.sub_(mean_S1).div_(1 + mean_S1)
    divergence_S: Tensor = torch.linalg.vecdot(at.P_SC, ratio_minus_1_SC.sub_(log_ratio_SC))
    return divergence_S
