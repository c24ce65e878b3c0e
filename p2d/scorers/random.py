"""Head scorer `random`: the control arm. Any claim about chosen heads is a claim against this."""

from __future__ import annotations

import torch
from torch import Tensor

from p2d.scorers import ScorerInput


def random(given: ScorerInput) -> Tensor:
    """Uniform noise per head, the same for the same seed on every machine; looks at nothing."""
    generator = torch.Generator().manual_seed(given.seed)
    return torch.rand(given.info.n_layers, given.info.n_heads, generator=generator)
