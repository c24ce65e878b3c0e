"""Rows in one line without padding: while a line is on, each of its rows attends to itself alone.

`p2d.batches` makes the line and switches it on around a forward pass; `p2d.attention` asks for it in every layer. No
[T, T] mask over the line is ever built: attention runs over groups of rows of similar length, on a CPU without any padding.

Legend: B rows of one group, T token, K key, H query head, G KV group, E head width, S tokens of the whole line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

GROUP_PADDING = {"cpu": 1.0}
"""Longest row over shortest of the rows that attention takes together, by device type. On a CPU each length by itself."""
OTHER_GROUP_PADDING = 1.25
"""For devices where a launch costs more than some padding. A guess."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of q [B, H, T, E] over k, v [B, G, K, E] under a mask [T, K], True where seen (None = causal): [B, T, H, E]."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that attention takes together: their tokens' places in the line, padded with the row's last token."""

    place_BT: Tensor
    own_BT: Tensor
    """False on padding."""
    start: int | None
    """Where the row begins, if it is the only one: it is then a view of the line."""


@dataclass(frozen=True, slots=True)
class Line:
    """How a line is made of rows."""

    groups: tuple[_Group, ...]
    back_S: Tensor | None
    """Place of each of the line's tokens in the groups' outputs one after another; None if they are in order."""

    def attend(self, q_1HSE: Tensor, k_1GSE: Tensor, v_1GSE: Tensor, window: int | None, attend: Attend) -> Tensor:
        """Attention of every row over itself, [1, S, H, E].

        Args: window: most tokens that one token sees, itself included; None = all before it.
        """
        outs: list[Tensor] = []
        for group in self.groups:
            q, k, v = (_rows(tensor, group) for tensor in (q_1HSE, k_1GSE, v_1GSE))
            tokens = q.shape[2]
            mask = window_mask(tokens, window, q.device) if window is not None and tokens > window else None
            out_BTHE = attend(q, k, v, mask)
            outs.append(out_BTHE[0] if group.start is not None else out_BTHE[group.own_BT])
        out_SHE = torch.cat(outs)
        return (out_SHE if self.back_S is None else out_SHE[self.back_S])[None]


def line_of(lengths: Sequence[int], device: torch.device) -> Line:
    """Cut a line's rows into groups of similar length."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    ratio = GROUP_PADDING.get(device.type, OTHER_GROUP_PADDING)
    cut: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if cut and lengths[cut[-1][0]] <= ratio * lengths[row]:
            cut[-1].append(row)
        else:
            cut.append([row])
    groups = tuple(_group([(starts[row], lengths[row]) for row in rows], device) for rows in cut)
    order_S = torch.cat([group.place_BT[group.own_BT] for group in groups])
    in_order = bool((order_S.diff() > 0).all())
    return Line(groups, None if in_order else order_S.argsort())


def _group(spans: list[tuple[int, int]], device: torch.device) -> _Group:
    start_B1 = torch.tensor([[start] for start, _ in spans], device=device)
    length_B1 = torch.tensor([[length] for _, length in spans], device=device)
    step_T = torch.arange(max(length for _, length in spans), device=device)
    place_BT = start_B1 + step_T.minimum(length_B1 - 1)
    return _Group(place_BT, step_T < length_B1, start=spans[0][0] if len(spans) == 1 else None)


def _rows(line_1HSE: Tensor, group: _Group) -> Tensor:
    """A group's rows side by side, [B, H, T, E]."""
    if group.start is not None:
        return line_1HSE.narrow(2, group.start, group.place_BT.shape[1])
    return line_1HSE[0][:, group.place_BT].transpose(0, 1)


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
