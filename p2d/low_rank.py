"""A low-rank update inside each slice: per unit `base + SCALE * B A`, the factors being what is trained.

The update lives in the weight like any other trained value (`p2d.slices`), so the forward pass is that of the base. Values
are always base plus product, in fp32: rounding into a bf16 weight never accumulates.

Legend: U chosen unit, E head width, D model width, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SCALE = 2.0
"""What the product is multiplied with: LoRA's alpha / rank at alpha = 2 rank."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The trained numbers of one sliced projection."""

    B_UER: nn.Parameter
    A_URD: nn.Parameter

    def update(self) -> Tensor:
        """What the slices have moved by, fp32 [U, E, D]."""
        return SCALE * (self.B_UER.detach() @ self.A_URD.detach())

    def gradients(self, g_UED: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the slices as gradients of B and A: the chain rule through the product."""
        g_UED = SCALE * g_UED
        return g_UED @ self.A_URD.detach().transpose(1, 2), self.B_UER.detach().transpose(1, 2) @ g_UED


def fresh_factors(like_UED: Tensor, rank: int, *, is_input: bool, generator: torch.Generator) -> Factors:
    """Factors of an update of nothing, ready to train.

    The factor at the projection's input is uniform within 1 / sqrt(inputs), the other zero, as in LoRA.

    Args: like_UED: gives sizes and device. is_input: whether E is the input side (o) or the output side (q, k, v).
    """
    U, E, D = like_UED.shape
    B_UER, A_URD = torch.zeros(U, E, rank), torch.zeros(U, rank, D)
    random, inputs = (B_UER, E) if is_input else (A_URD, D)
    random.uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
    return Factors(nn.Parameter(B_UER.to(like_UED.device)), nn.Parameter(A_URD.to(like_UED.device)))
