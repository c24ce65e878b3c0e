"""How much attention chosen token positions pay to chosen spans of keys, read inside the model's own forward pass.

`p2d.attention` shows the probe every layer's queries and keys. Only the probed rows of the attention matrix are formed. What
the mass means is the scorer's business.

Legend: B batch, T token, H query head, G KV group, E head width, Q probed position, S span of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbePlan:
    """What one forward pass should read."""

    position_BQ: Tensor
    """Positions, within this pass, of the tokens whose attention is read; padded with 0."""
    valid_BQ: Tensor
    """False where `position_BQ` is padding."""
    past: int
    """Keys that stand in the cache before this pass."""
    spans: tuple[tuple[int, int], ...]
    """[start, stop) of each span in key columns, cache included."""


@dataclass(slots=True)
class Probe:
    """Collects masses while it is on; give it a plan before each forward pass to be read."""

    n_layers: int
    plan: ProbePlan | None = None
    _mass: dict[int, Tensor] = field(default_factory=dict)

    def take(self) -> Tensor:
        """The masses of the last pass, [L, B, H, S] fp32: mean over the probed tokens of the probability on each span.

        Clears the plan. That every layer called the probe is asserted: a family that keeps its own attention function
        would otherwise give silence instead of numbers.
        """
        assert sorted(self._mass) == list(range(self.n_layers)), f"the probe saw layers {sorted(self._mass)}"
        mass_LBHS = torch.stack([self._mass[layer] for layer in range(self.n_layers)])
        self._mass, self.plan = {}, None
        return mass_LBHS

    def read(self, layer: int, query_BHTE: Tensor, key_BGTE: Tensor, scaling: float) -> None:
        """Note the masses of one layer."""
        assert self.plan is not None
        self._mass[layer] = span_mass(query_BHTE, key_BGTE, scaling, self.plan)


_ACTIVE: ContextVar[Probe | None] = ContextVar("p2d_attention_probe", default=None)


def active_probe() -> Probe | None:
    """The probe that wants to see the pass that is running."""
    probe = _ACTIVE.get()
    return probe if probe is not None and probe.plan is not None else None


@contextmanager
def probe_attention(n_layers: int) -> Iterator[Probe]:
    """A probe that reads every forward pass of the block that it has a plan for; `use_attention` comes before."""
    probe = Probe(n_layers=n_layers)
    token = _ACTIVE.set(probe)
    try:
        yield probe
    finally:
        _ACTIVE.reset(token)


def span_mass(query_BHTE: Tensor, key_BGTE: Tensor, scaling: float, plan: ProbePlan) -> Tensor:
    """Mean attention probability that the probed tokens put on each span, [B, H, S] fp32.

    Only the probed rows of the attention matrix are formed. Sequences are padded on the right, so that being causal is
    the whole mask.
    """
    b, h, _, e = query_BHTE.shape
    groups, keys = key_BGTE.shape[1:3]
    index = plan.position_BQ[:, None, :, None].expand(b, h, -1, e)
    # fp32: a bf16 score of 10 is rounded by up to 0.03, which is 3 % of its probability.
    picked_BHQE = query_BHTE.gather(2, index).float()
    score = picked_BHQE.reshape(b, groups, -1, e) @ key_BGTE.float().mT * scaling
    score_BHQT = score.reshape(b, h, -1, keys)
    column_T = torch.arange(keys, device=score.device)
    future_BQT = column_T > (plan.position_BQ + plan.past)[:, :, None]
    prob_BHQT = score_BHQT.masked_fill(future_BQT[:, None], float("-inf")).softmax(-1)
    mass_BHQS = torch.stack([prob_BHQT[..., start:stop].sum(-1) for start, stop in plan.spans], dim=-1)
    weight_BQ = plan.valid_BQ / plan.valid_BQ.sum(1, keepdim=True)
    return torch.einsum("bhqs,bq->bhs", mass_BHQS, weight_BQ.float())
