"""Head scorers: how task-sensitive each head is, judged from the base weights and a proxy-trained copy.

One file each, `(ScorerInput) -> scores_LH` in fp32, higher = more sensitive; names stand in `p2d.config.HEAD_SCORERS`.
Training the proxy and averaging two halves is `p2d.identify`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from p2d.arch.spec import HEAD_WISE, heads_per_group
from p2d.config import Projection
from p2d.model_info import ModelInfo

Scorer = Callable[["ScorerInput"], Tensor]
"""What every scorer is; returns scores_LH."""

WITH_GRADIENTS = frozenset({"attribution"})
"""Scorers that ask for held-out gradients at both ends of the proxy's path: these then come with the losses."""


@dataclass(frozen=True, slots=True)
class PathPoint:
    """Held-out loss and its gradient at one point between the base (0) and the trained (1) weights."""

    loss: float
    """Nats per answer token."""
    gradients: Mapping[str, Tensor]
    """Slice key -> fp32 gradient of every trained projection, [U, E, D]."""


class Proxy(Protocol):
    """A proxy-trained model, seen from its scorer. All tensors are fp32 [U, E, D] with every unit of a projection (query
    heads of q and o, KV groups of k and v), head width E and model width D; one layer is enough in memory at a time."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """What was trained (on every head)."""

    def base(self, layer: int, projection: Projection) -> Tensor:
        """Base weight of a projection, trained or not."""

    def trained(self, layer: int, projection: Projection) -> Tensor:
        """The same after the proxy."""

    def moved(self, layer: int, projection: Projection, start: float, end: float) -> Tensor:
        """Change between two points of the path as the weights hold it: under bf16, rounded. What loss has seen."""

    def at(self, fraction: float) -> PathPoint:
        """Held-out loss and gradient part of the way from base to trained; each point is computed once."""


@dataclass(frozen=True, slots=True)
class ScorerInput:
    """What a scorer may look at."""

    info: ModelInfo
    proxy: Proxy | None
    """None for the scorers in WITHOUT_PROXY."""
    seed: int
    """Differs between the two half-proxies."""

    @property
    def trained_proxy(self) -> Proxy:
        """The proxy of a scorer that needs one."""
        assert self.proxy is not None, "this scorer needs a proxy"
        return self.proxy


def per_head(info: ModelInfo, projection: Projection, values_UED: Tensor) -> Tensor:
    """Sum values over each head's slice -> [H]; a group's k/v sum is split evenly over its heads."""
    sum_U = values_UED.sum(dim=(1, 2))
    if projection in HEAD_WISE:
        return sum_U
    share = heads_per_group(info)
    return torch.repeat_interleave(sum_U / share, share)
