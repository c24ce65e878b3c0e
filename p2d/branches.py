"""Several continuations of one shared beginning in one forward pass: a trunk, computed once, and branches after it.

A tree is one line of tokens: the trunk, then the branches one after another. Each branch sees the trunk and itself, at the
positions that it would have right behind the trunk; so its numbers are those of the whole sequence `trunk + branch`,
without computing the trunk again and without a copy of its keys per branch that outlives one layer. No [T, T] mask over the
line is ever built. `p2d.attention` asks for the active tree in every layer.

Legend: T token of the line, H query head, G KV group, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from p2d.packing import Attend, seen_keys
from p2d.probe import Span


@dataclass(frozen=True, slots=True)
class Tree:
    """Where trunk and branches stand in the line."""

    trunk: int
    """Tokens of the trunk; it begins the line."""
    branches: tuple[Span, ...]

    def positions(self, device: torch.device) -> Tensor:
        """Position of every token of the line, [1, T]: each branch goes on where the trunk ends."""
        starts = [0, *(self.trunk for _ in self.branches)]
        sizes = [self.trunk, *(stop - start for start, stop in self.branches)]
        parts = [torch.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        return torch.cat(parts)[None].to(device)

    def sees(self, branch: int) -> tuple[Span, Span]:
        """What the tokens of a branch see, apart from being causal."""
        return (0, self.trunk), self.branches[branch]

    def attend(self, q_1HTE: Tensor, k_1GTE: Tensor, v_1GTE: Tensor, window: int | None, attend: Attend) -> Tensor:
        """Attention of the whole line, [1, T, H, E].

        Args: window: most keys that a token sees, itself included; None = all before it.
        """
        q, k, v = (t[:, :, : self.trunk] for t in (q_1HTE, k_1GTE, v_1GTE))
        narrow = window is not None and window < self.trunk
        parts = [attend(q, k, v, seen_keys(0, self.trunk, window, q.device) if narrow else None)]
        for branch in self.branches:
            own = slice(*branch)
            keys, values = (torch.cat([t[:, :, : self.trunk], t[:, :, own]], dim=2) for t in (k_1GTE, v_1GTE))
            mask = seen_keys(self.trunk, branch[1] - branch[0], window, q.device)
            parts.append(attend(q_1HTE[:, :, own], keys, values, mask))
        return torch.cat(parts, dim=1)


def plant(trunk: int, branches: Sequence[int]) -> Tree:
    """The tree of a trunk and branches of these lengths."""
    spans, start = [], trunk
    for length in branches:
        spans.append((start, start + length))
        start += length
    return Tree(trunk, tuple(spans))


_TREE: ContextVar[Tree | None] = ContextVar("p2d_tree", default=None)


def active_tree() -> Tree | None:
    """The tree that the running forward pass is made of."""
    return _TREE.get()


@contextmanager
def branching(tree: Tree) -> Iterator[None]:
    """Within the block, forward passes are over one line made like this tree; `use_attention` comes before."""
    token = _TREE.set(tree)
    try:
        yield
    finally:
        _TREE.reset(token)
