"""Head scorer `pad`: ALPS's parameter alignment distribution distance, the score of the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from p2d.arch.spec import heads_per_group
from p2d.scorers import ScorerInput

TEMPERATURE = 1.0
"""tau of ALPS Eq. 6."""


def pad(given: ScorerInput) -> Tensor:
    """Score each query head by how far the distribution of its combined weights moved.

    `W_o^h = W_q^h (W_k^g)^T W_v^g` (Eq. 5, each [D, E]), `P^h = softmax(flatten(W_o^h) / tau)` (Eq. 6), score = the
    1-Wasserstein distance of P and P' over their index support scaled to [0, 1] = mean |cumsum(P - P')| (Eq. 7).

    Returns: scores_LH fp32, >= 0.
    Source:  ALPS (arXiv 2505.18799). Not the score of its repository, which concatenates q, k, v and indexes k/v by query head:
             that one is close to noise (top-27 overlap of two proxies 7 against 19; docs/LOG.md).
    """
    proxy, info = given.trained_proxy, given.info
    scores_LH = torch.zeros(info.n_layers, info.n_heads)
    for layer in range(info.n_layers):
        before, after = ([weigh(layer, name) for name in ("q", "k", "v")] for weigh in (proxy.base, proxy.trained))
        for group in range(info.n_kv_groups):
            P = _distribution(group, heads_per_group(info), *before)
            P_after = _distribution(group, heads_per_group(info), *after)
            distance = (P - P_after).cumsum(dim=1).abs().mean(dim=1)
            first = group * heads_per_group(info)
            scores_LH[layer, first : first + heads_per_group(info)] = distance.float().cpu()
    return scores_LH


def _distribution(group: int, share: int, q_HED: Tensor, k_GED: Tensor, v_GED: Tensor) -> Tensor:
    """P of the heads of one KV group, [share, D * E], in fp64: the differences summed here are near 1e-10."""
    # Right to left: k^T v is [E, E] and the same for the whole group; left to right would be [D, D] per head.
    kv_EE = k_GED[group].double() @ v_GED[group].double().t()
    W_HDE = q_HED[group * share : (group + 1) * share].double().transpose(1, 2) @ kv_EE
    return torch.softmax(W_HDE.flatten(1) / TEMPERATURE, dim=1)
