"""Rendered rows -> batches, packed in one line or padded side by side, and the loss of a batch on its answer tokens only.

Padded rows are filled up on the right. Attention is causal, so no token of a row ever sees the padding behind it and the
loss needs no attention mask (SDPA then takes its faster mask-free kernel). In a line nothing is padding: positions begin
anew in each row, and `p2d.packing` keeps rows apart. Order of rows is the caller's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from p2d.activation_cache import active_frozen_layers
from p2d.loss import token_nll
from p2d.models import BaseModel
from p2d.packing import packed_rows
from p2d.rendering import RenderedRow, Renderer


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows side by side, or one after another in one line."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    """1 on a row's own tokens, 0 on padding."""
    answer_mask_BT: Tensor
    """True on answer tokens. The logits that predict the token at t stand at t - 1."""
    rows: list[int]
    """Indices of the rows in the caller's list."""
    lengths: tuple[int, ...]
    """Tokens of each row."""
    answer_lengths: tuple[int, ...]
    """Answer tokens of each row."""
    packed: bool = False
    """Whether the rows stand in one line, [1, sum of lengths]."""

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)

    def row_spans(self) -> list[tuple[int, int, int]]:
        """(place in the batch, first token, end) of each row: the same rows in both forms."""
        if not self.packed:
            return [(place, 0, length) for place, length in enumerate(self.lengths)]
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [(0, end - length, end) for end, length in zip(ends, self.lengths, strict=True)]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = (self.input_ids_BT.to(device), self.attention_mask_BT.to(device), self.answer_mask_BT.to(device))
        return Batch(*moved, self.rows, self.lengths, self.answer_lengths, self.packed)


def collate(renderer: Renderer, rendered: Sequence[RenderedRow], indices: Sequence[int]) -> Batch:
    """Batch `rendered[i] for i in indices`, each as `prefix + prompt + answer`."""
    rows = [rendered[index] for index in indices]
    lengths = [renderer.length(row) for row in rows]
    width = max(lengths)
    ids = torch.full((len(rows), width), renderer.pad_id, dtype=torch.long)
    answer = torch.zeros((len(rows), width), dtype=torch.bool)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[place, :length] = torch.tensor([*renderer.asked(row), *row.answer_ids])
        answer[place, length - len(row.answer_ids) : length] = True
    attention = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return Batch(ids, attention, answer, list(indices), tuple(lengths), _answer_lengths(rows))


def pack(renderer: Renderer, rendered: Sequence[RenderedRow], indices: Sequence[int]) -> Batch:
    """The rows `rendered[i] for i in indices` in one line, each as `prefix + prompt + answer`, without padding."""
    rows = [rendered[index] for index in indices]
    ids = [token for row in rows for token in (*renderer.asked(row), *row.answer_ids)]
    lengths = tuple(renderer.length(row) for row in rows)
    answer = torch.zeros((1, len(ids)), dtype=torch.bool)
    end = 0
    for row, length in zip(rows, lengths, strict=True):
        end += length
        answer[0, end - len(row.answer_ids) : end] = True
    ids_BT = torch.tensor([ids])
    return Batch(ids_BT, torch.ones_like(ids_BT), answer, list(indices), lengths, _answer_lengths(rows), packed=True)


def _answer_lengths(rows: Sequence[RenderedRow]) -> tuple[int, ...]:
    return tuple(len(row.answer_ids) for row in rows)


TOKEN_BUDGET = 4096
"""Tokens of one batch, padding counted: bounds the memory of activations and logits. A guess."""

MAX_PADDING = 1.25
"""Longest row of a batch over its shortest. On a CPU padding costs its full time (measured on GSM8K: 8 random rows are
1.9 times as wide as they are long in sum), while small batches lose little."""


def token_budget_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut indices into batches of similar lengths, each at most `budget` tokens wide (padding counted), longest first.

    Deterministic: ties keep the given order. A row longer than the budget gets a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        width = lengths[batches[-1][0]] if batches else 0
        if batches and width * (len(batches[-1]) + 1) <= budget and width <= MAX_PADDING * lengths[index]:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def packed_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut indices into lines of at most `budget` tokens, longest rows first.

    Deterministic: ties keep the given order. A row longer than the budget gets a line of its own.
    """
    batches: list[list[int]] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens += lengths[index]
        if batches and tokens <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            tokens = lengths[index]
    return batches


def hidden(base: BaseModel, batch: Batch) -> Tensor:
    """Last hidden states of a batch on the model's device, [B, T, D] (packed: [1, sum of lengths, D]).

    While `p2d.activation_cache.remember_below` is on, the layers below run once for each row; padding is then zeros.
    """
    frozen = active_frozen_layers(base)
    if frozen is None:
        return _forward(base, batch)
    rows = [frozen.below(batch.input_ids_BT[place, start:end]) for place, start, end in batch.row_spans()]
    h_BTD = torch.cat(rows)[None] if batch.packed else pad_sequence(rows, batch_first=True)
    with frozen.above(h_BTD):
        return _forward(base, batch)


def _forward(base: BaseModel, batch: Batch) -> Tensor:
    if not batch.packed:
        return base.hidden(batch.input_ids_BT)
    position_1S = torch.cat([torch.arange(length) for length in batch.lengths])[None].to(base.device)
    with packed_rows(batch.lengths, base.device):
        return base.hidden(batch.input_ids_BT, position_ids=position_1S)


def answer_nll(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row's answer, and how many tokens it has; the same for packed and padded rows.

    Returns: nll_B fp32, summed over answer tokens, in nats, differentiable where something in the model is; tokens_B.
             Logits are computed at answer positions alone, and not kept (`p2d.loss`).
    """
    batch = batch.to(base.device)
    h_BTD = hidden(base, batch)
    mask_BT = batch.answer_mask_BT[:, 1:]
    head = base.module.get_submodule(base.spec.lm_head)
    nll_N = token_nll(head, h_BTD[:, :-1][mask_BT], batch.input_ids_BT[:, 1:][mask_BT])
    tokens_B = torch.tensor(batch.answer_lengths, device=base.device)
    # Each row's tokens in their order: an `index_add` would take them in any order on a GPU, and differ from run to run.
    nll_B = torch.segment_reduce(nll_N, "sum", lengths=tokens_B, unsafe=True)
    return nll_B, tokens_B


def answer_nlls(
    base: BaseModel, rendered: Sequence[RenderedRow], *, token_budget: int = TOKEN_BUDGET, packed: bool = True
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Pass over rows without gradients, batch by batch: indices of its rows, and what `answer_nll` gives for them.

    Args: packed: whether rows stand in one line; else side by side.
    """
    lengths = [base.renderer.length(row) for row in rendered]
    cut, make = (packed_batches, pack) if packed else (token_budget_batches, collate)
    for indices in cut(lengths, token_budget):
        with torch.no_grad():
            nll_B, tokens_B = answer_nll(base, make(base.renderer, rendered, indices))
        yield indices, nll_B, tokens_B


def mean_answer_nll(base: BaseModel, rendered: Sequence[RenderedRow], *, token_budget: int = TOKEN_BUDGET) -> float:
    """Mean negative log-likelihood per answer token over rows, in nats, without gradients."""
    total, tokens = 0.0, 0
    for _, nll_B, tokens_B in answer_nlls(base, rendered, token_budget=token_budget):
        total += float(nll_B.double().sum())
        tokens += int(tokens_B.sum())
    return total / tokens
