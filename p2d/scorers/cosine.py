"""Head scorer `cosine`: how far each head's combined weights turned in the proxy."""

from __future__ import annotations

import torch
from torch import Tensor

from p2d.scorers import ScorerInput
from p2d.scorers.combined import Combined, scores_of


def cosine(given: ScorerInput) -> Tensor:
    """Score each query head by `1 - cos(W^h, W'^h)` of its combined weights `W_q^h (W_k^g)^T W_v^g` as one long vector.

    A change of scale alone scores 0: only the direction counts.

    Returns: scores_LH fp32, 0 to 2; 0 where q, k and v stood still and for a head whose combined weights are all 0.
    Source:  ours; the combined weights are ALPS's Eq. 5 (arXiv 2505.18799).
    """
    return scores_of(given, _turn)


def _turn(combined: Combined) -> Tensor:
    """`(|a - b|^2 - (|a| - |b|)^2) / (2 |a| |b|)`: one minus a cosine near 1 would keep no digit of a small turn."""
    before_SC, change_SC = combined.base_SC.double(), combined.change_SC.double()
    square_S, along_S, change_square_S = (
        torch.linalg.vecdot(one, other)
        for one, other in ((before_SC, before_SC), (before_SC, change_SC), (change_SC, change_SC))
    )
    after_square_S = square_S + 2 * along_S + change_square_S
    size_S, after_size_S = square_S.sqrt(), after_square_S.clamp(min=0).sqrt()
    product_S = size_S * after_size_S
    growth_S = (2 * along_S + change_square_S) / (size_S + after_size_S)
    turn_S = (change_square_S - growth_S.square()) / (2 * product_S)
    return torch.where(product_S > 0, turn_S.clamp(min=0), 0.0)
