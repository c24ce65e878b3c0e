"""Rows in one line without padding: while a line is on, each of its rows attends to itself alone.

`p2d.batches` makes the line and switches it on around a forward pass; `p2d.attention` asks for it in every layer. No
[T, T] mask over the line is ever built: attention runs over groups of rows of similar length, on a CPU without any padding.

Legend: B rows of one group, T token, K key, H query head, G KV group, E head width, S tokens of the whole line, N places of all
groups, padding counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

GROUP_PADDING = {"cpu": 1.0}
"""Longest row over shortest of the rows that attention takes together, by device type. On a CPU each length by itself."""
OTHER_GROUP_PADDING = 1.25
"""For devices where a launch costs more than some padding. A guess."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of q [B, H, T, E] over k, v [B, G, K, E] under a mask [T, K], True where seen (None = causal): [B, T, H, E]."""


class _Gather(torch.autograd.Function):
    """`values[:, index]` where `back` finds each of values' own places again: its gradient is then a gather, too.

    autograd's own is a sum of atomic additions, whose order differs from run to run on a GPU. What is gathered twice is padding,
    which gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int, index: Tensor, back: Tensor, own: Tensor | None) -> Tensor:
        ctx.dim, ctx.own = dim, own
        ctx.save_for_backward(back)
        return values.index_select(dim, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = grads[0].index_select(ctx.dim, back)
        return (grad if ctx.own is None else grad * ctx.own), None, None, None, None


@dataclass(frozen=True, slots=True)
class _Padding:
    """How a line's tokens stand in the groups one after another, N places in all."""

    place_N: Tensor
    """Token of the line at each place; on padding the row's last."""
    back_S: Tensor
    """Place of each token of the line."""
    own_N11: Tensor
    """1 where a place is a token's own, 0 on padding."""

    def spread(self, line_1HSE: Tensor) -> Tensor:
        apply: Any = _Gather.apply
        side_1HNE: Tensor = apply(line_1HSE, 2, self.place_N, self.back_S, None)
        return side_1HNE

    def gather(self, side_NHE: Tensor) -> Tensor:
        apply: Any = _Gather.apply
        out_SHE: Tensor = apply(side_NHE, 0, self.back_S, self.place_N, self.own_N11)
        return out_SHE


@dataclass(frozen=True, slots=True)
class Line:
    """How a line is made of rows."""

    groups: tuple[tuple[int, int], ...]
    """Rows that attention takes together: how many, and the tokens of the longest."""
    padding: _Padding | None
    """None where the groups one after another are the line."""

    def attend(self, q_1HSE: Tensor, k_1GSE: Tensor, v_1GSE: Tensor, window: int | None, attend: Attend) -> Tensor:
        """Attention of every row over itself, [1, S, H, E].

        Args: window: most tokens that one token sees, itself included; None = all before it.
        """
        sides = [q_1HSE, k_1GSE, v_1GSE]
        if self.padding is not None:
            sides = [self.padding.spread(side) for side in sides]
        # One split each: its gradient is one concatenation, where slices would fill a line of zeros for every group.
        sizes = [rows * tokens for rows, tokens in self.groups]
        parts = zip(self.groups, *(side.squeeze(0).split(sizes, dim=1) for side in sides), strict=True)
        outs: list[Tensor] = []
        for (rows, tokens), *of_group in parts:
            q, k, v = (part.unflatten(1, (rows, tokens)).transpose(0, 1) for part in of_group)
            mask = window_mask(tokens, window, q.device) if window is not None and tokens > window else None
            outs.append(attend(q, k, v, mask).flatten(0, 1))
        out_NHE = torch.cat(outs) if len(outs) > 1 else outs[0]
        return (out_NHE if self.padding is None else self.padding.gather(out_NHE))[None]


def line_of(lengths: Sequence[int], device: torch.device) -> Line:
    """Cut a line's rows into groups of similar length."""
    ratio = GROUP_PADDING.get(device.type, OTHER_GROUP_PADDING)
    cut: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if cut and lengths[cut[-1][0]] <= ratio * lengths[row]:
            cut[-1].append(row)
        else:
            cut.append([row])
    groups = tuple((len(rows), lengths[rows[0]]) for rows in cut)
    return Line(groups, _padding(lengths, cut, device))


def _padding(lengths: Sequence[int], cut: Sequence[Sequence[int]], device: torch.device) -> _Padding | None:
    starts = [0, *accumulate(lengths)]
    place: list[int] = []
    own: list[bool] = []
    back = [0] * starts[-1]
    for rows in cut:
        width = lengths[rows[0]]
        for row in rows:
            start, length, missing = starts[row], lengths[row], width - lengths[row]
            back[start : start + length] = range(len(place), len(place) + length)
            place += [*range(start, start + length), *[start + length - 1] * missing]
            own += [True] * length + [False] * missing
    if place == list(range(starts[-1])):
        return None
    # Made on the host and moved once: no layer waits for the device to say which tokens are padding.
    own_N11 = torch.tensor(own, device=device)[:, None, None]
    return _Padding(torch.tensor(place, device=device), torch.tensor(back, device=device), own_N11)


def seen_keys(before: int, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """True where a key is seen: [tokens, before + tokens], each of `tokens` standing behind all `before`.

    Args: window: most keys that a token sees, itself included; None = all before it.
    """
    from_T1 = torch.arange(before, before + tokens, device=device)[:, None]
    key_K = torch.arange(before + tokens, device=device)
    seen_TK = key_K <= from_T1
    return seen_TK if window is None else seen_TK & (key_K > from_T1 - window)


@lru_cache(maxsize=64)
def window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """`seen_keys` of a whole row, kept: the same few lengths come in every layer."""
    return seen_keys(0, tokens, window, device)


_LINE: ContextVar[Line | None] = ContextVar("p2d_packed_line", default=None)


def active_line() -> Line | None:
    """The line that the running forward pass is made of."""
    return _LINE.get()


@contextmanager
def packed_rows(lengths: Sequence[int], device: torch.device) -> Iterator[None]:
    """Within the block, forward passes are over one line of rows of these lengths; `use_attention` comes before."""
    token = _LINE.set(line_of(lengths, device))
    try:
        yield
    finally:
        _LINE.reset(token)
