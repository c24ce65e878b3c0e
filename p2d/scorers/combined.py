"""A head's combined weights `W^h = W_q^h (W_k^g)^T W_v^g` before the proxy and how they changed: for `pad`, `kl` and `cosine`.

Legend: S query heads of one KV group, U unit, E head width, D model width, C = D * E entries of a combined weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from p2d.arch.spec import heads_per_group
from p2d.config import Projection
from p2d.scorers import ScorerInput

COMBINED: tuple[Projection, ...] = ("q", "k", "v")
"""What the combined weights are made of; o is never read."""


@dataclass(frozen=True, slots=True)
class Combined:
    """The combined weights of the query heads of one KV group, fp32."""

    layer: int
    heads: slice
    base_SC: Tensor
    change_SC: Tensor
    """After minus before, from the changes of q, k and v: as a difference of two products half its digits would go."""


def combined_weights(given: ScorerInput) -> Iterator[Combined]:
    """The KV groups whose combined weights may have moved, one at a time. One layer's q, k and v are in memory.

    A layer is read once: the base weights of q, k and v, and the trained ones of those that the proxy trained.
    """
    moving = [projection for projection in COMBINED if projection in given.trained_proxy.projections]
    for layer in range(given.info.n_layers if moving else 0):
        yield from _of_layer(given, layer, moving)  # a frame of its own: its weights are gone before the next are read


def _of_layer(given: ScorerInput, layer: int, moving: list[Projection]) -> Iterator[Combined]:
    """Right to left: k^T v is [E, E] and the same for the whole group, where left to right would be [D, D] per head."""
    proxy, info = given.trained_proxy, given.info
    base = {projection: proxy.base(layer, projection) for projection in COMBINED}
    change = {projection: proxy.trained(layer, projection) - base[projection] for projection in moving}
    share = heads_per_group(info)
    for group in range(info.n_kv_groups):
        heads = slice(group * share, (group + 1) * share)
        q_SED, k_ED, v_ED = base["q"][heads], base["k"][group], base["v"][group]
        kv_EE = k_ED @ v_ED.t()
        kv_change_EE = torch.zeros_like(kv_EE)
        if "k" in change:
            kv_change_EE += change["k"][group] @ v_ED.t()
            k_ED = k_ED + change["k"][group]
        if "v" in change:
            kv_change_EE += k_ED @ change["v"][group].t()
        change_SDE = q_SED.mT @ kv_change_EE
        if "q" in change:
            change_SDE += change["q"][heads].mT @ (kv_EE + kv_change_EE)
        yield Combined(layer, heads, (q_SED.mT @ kv_EE).flatten(1), change_SDE.flatten(1))


def scores_of(given: ScorerInput, score: Callable[[Combined], Tensor]) -> Tensor:
    """scores_LH fp32 of a function that scores the heads of one KV group [S]; 0 where nothing moved."""
    scores_LH = torch.zeros(given.info.n_layers, given.info.n_heads)
    for combined in combined_weights(given):
        scores_LH[combined.layer, combined.heads] = score(combined).float().cpu()
    return scores_LH


@dataclass(frozen=True, slots=True)
class Distributions:
    """`P = softmax(W)` before and `P'` after (tau = 1), kept so that a tiny change of P loses no digits."""

    P_SC: Tensor
    growth_SC: Tensor
    """`exp(W' - W) - 1`."""
    mean_growth_S: Tensor
    """Its mean under P, so that `P' - P = P (growth - mean_growth) / (1 + mean_growth)`."""


def distributions(combined: Combined, dtype: torch.dtype) -> Distributions:
    """The distributions of ALPS Eq. 6. P' - P is near 1e-10: as a difference of two softmaxes, fp32 would hold nothing of it.

    In fp32 they take the place of `combined`: memory for a copy costs more time than the arithmetic.
    """
    P_SC = combined.base_SC.to(dtype)
    P_SC.sub_(P_SC.amax(1, keepdim=True)).exp_()
    P_SC.div_(P_SC.sum(1, keepdim=True))
    growth_SC = combined.change_SC.to(dtype).expm1_()
    return Distributions(P_SC, growth_SC, torch.linalg.vecdot(P_SC, growth_SC))
