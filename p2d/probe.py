"""How much attention chosen tokens pay to chosen spans of keys, read inside the model's own forward pass.

`p2d.attention` shows the probe every layer's queries and keys. Only the probed rows of the attention matrix are formed,
one reader and one layer at a time, and only over the keys that the reader sees. What the mass means is the scorer's
business.

Legend: L layer, B line of a batch, T token, H query head, G KV group, E head width, Q probed token, K key that is seen,
N reader, S span of keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

Span = tuple[int, int]
"""[start, stop) among a line's tokens."""


@dataclass(frozen=True, slots=True)
class Reader:
    """Neighbouring tokens whose attention is read and averaged."""

    line: int
    tokens: Span
    sees: tuple[Span, ...]
    """What the model lets them see, in the order of its positions, apart from being causal: the last one holds `tokens`.
    One span in a plain sequence; trunk and own branch in a `p2d.branches.Tree`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbePlan:
    """What one forward pass should read."""

    readers: tuple[Reader, ...]
    spans: tuple[Span, ...]
    """Spans of keys, each inside one of the spans that every reader sees."""
    layers: range


@dataclass(slots=True)
class Probe:
    """Collects masses while it is on; give it a plan before each forward pass to be read."""

    plan: ProbePlan | None = None
    _mass: dict[int, Tensor] = field(default_factory=dict)

    def take(self) -> Tensor:
        """The masses of the last pass, [L, N, H, S] fp32: mean over a reader's tokens of the probability on each span.

        Clears the plan. That every layer of the plan called the probe is asserted: a family that keeps its own attention
        function would otherwise give silence instead of numbers.
        """
        wanted = [] if self.plan is None else list(self.plan.layers)
        assert wanted, "the probe was given no plan"
        assert sorted(self._mass) == wanted, f"the probe saw layers {sorted(self._mass)}"
        mass_LNHS = torch.stack([self._mass[layer] for layer in wanted])
        self._mass, self.plan = {}, None
        return mass_LNHS

    def read(self, layer: int, query_BHTE: Tensor, key_BGTE: Tensor, scaling: float, window: int | None) -> None:
        """Note the masses of one layer, if the plan wants it."""
        assert self.plan is not None
        if layer in self.plan.layers:
            masses = [
                span_mass(query_BHTE, key_BGTE, scaling, window, one, self.plan.spans) for one in self.plan.readers
            ]
            self._mass[layer] = torch.stack(masses)


_ACTIVE: ContextVar[Probe | None] = ContextVar("p2d_attention_probe", default=None)


def active_probe() -> Probe | None:
    """The probe that wants to see the pass that is running."""
    probe = _ACTIVE.get()
    return probe if probe is not None and probe.plan is not None else None


@contextmanager
def probe_attention() -> Iterator[Probe]:
    """A probe that reads every forward pass of the block that it has a plan for; `use_attention` comes before."""
    probe = Probe()
    token = _ACTIVE.set(probe)
    try:
        yield probe
    finally:
        _ACTIVE.reset(token)


def span_mass(
    query_BHTE: Tensor,
    key_BGTE: Tensor,
    scaling: float,
    window: int | None,
    reader: Reader,
    spans: Sequence[Span],
) -> Tensor:
    """Mean attention probability that the reader's tokens put on each span, [H, S] fp32.

    Args: window: most keys that a token sees, itself included; None = all before it.
    """
    heads = query_BHTE.shape[1]
    # fp32: a bf16 score of 10 is rounded by up to 0.03, which is 3 % of its probability.
    query_HQE = query_BHTE[reader.line, :, slice(*reader.tokens)].float() * scaling
    key_GKE = torch.cat([key_BGTE[reader.line, :, slice(*seen)] for seen in reader.sees], dim=1).float()
    groups, keys, e = key_GKE.shape
    # The heads of a group stand below each other, so that its keys are used as they are, not repeated.
    score_HQK = (query_HQE.reshape(groups, -1, e) @ key_GKE.mT).view(heads, -1, keys)
    _hide(score_HQK, reader, window)
    # One exponential for each score; only the spans' columns are ever divided. The maximum keeps it in range.
    score_HQK.sub_(score_HQK.amax(-1, keepdim=True)).exp_()
    total_HQ = score_HQK.sum(-1)
    mass_HQS = torch.stack([score_HQK[..., slice(*_place(span, reader.sees))].sum(-1) for span in spans], dim=-1)
    return (mass_HQS / total_HQ[..., None]).mean(1)


def _hide(score_HQK: Tensor, reader: Reader, window: int | None) -> None:
    """Give every key that a token does not see the score -inf, in place."""
    tokens, keys = score_HQK.shape[1:]
    own = reader.sees[-1]
    first = keys - (own[1] - own[0]) + reader.tokens[0] - own[0]
    """Place of the first probed token among the keys that the reader sees."""
    from_Q = torch.arange(first, first + tokens, device=score_HQK.device)[:, None]
    # Every key before the first probed token is seen by all of them: only the columns from there on are masked.
    key_K = torch.arange(first, keys, device=score_HQK.device)
    score_HQK[..., first:].masked_fill_(key_K > from_Q, float("-inf"))
    if window is not None and first + tokens > window:
        key_K = torch.arange(keys, device=score_HQK.device)
        score_HQK.masked_fill_(key_K <= from_Q - window, float("-inf"))


def _place(span: Span, sees: Sequence[Span]) -> Span:
    """Where a span of the line stands among the keys that a reader sees."""
    before = 0
    for start, stop in sees:
        if start <= span[0] and span[1] <= stop:
            return before + span[0] - start, before + span[1] - start
        before += stop - start
    raise AssertionError(f"the span {span} is not inside what the reader sees, {sees}")
