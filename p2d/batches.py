"""Rendered rows -> padded batches, and the loss of a batch on its answer tokens only.

Rows are padded on the right. Attention is causal, so no token of a row ever sees the padding behind it and the loss
needs no attention mask (SDPA then takes its faster mask-free kernel). Order of rows is the caller's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from p2d.models import BaseModel
from p2d.rendering import RenderedRow, Renderer


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows side by side."""

    input_ids_BT: Tensor
    attention_mask_BT: Tensor
    """1 on a row's own tokens, 0 on padding."""
    answer_mask_BT: Tensor
    """True on answer tokens. The logits that predict the token at t stand at t - 1."""
    rows: list[int]
    """Indices of the rows in the caller's list."""

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return int(self.attention_mask_BT.sum())

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = (self.input_ids_BT.to(device), self.attention_mask_BT.to(device), self.answer_mask_BT.to(device))
        return Batch(*moved, rows=self.rows)


def collate(renderer: Renderer, rendered: Sequence[RenderedRow], indices: Sequence[int]) -> Batch:
    """Batch `rendered[i] for i in indices`, each as `prefix + prompt + answer`."""
    rows = [rendered[index] for index in indices]
    lengths = [renderer.length(row) for row in rows]
    width = max(lengths)
    ids = torch.full((len(rows), width), renderer.pad_id, dtype=torch.long)
    answer = torch.zeros((len(rows), width), dtype=torch.bool)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ids[place, :length] = torch.tensor([*renderer.prefix_ids, *row.prompt_ids, *row.answer_ids])
        answer[place, length - len(row.answer_ids) : length] = True
    attention = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return Batch(ids, attention, answer, rows=list(indices))


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


def answer_nll(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each row's answer, and how many tokens it has.

    Returns: nll_B fp32, summed over answer tokens, in nats, differentiable where something in the model is; tokens_B.
             Logits are computed at answer positions alone.
    """
    batch = batch.to(base.device)
    h_BTD = base.hidden(batch.input_ids_BT)
    mask_BT = batch.answer_mask_BT[:, 1:]
    logits_NV = base.logits(h_BTD[:, :-1][mask_BT]).float()
    nll_N = functional.cross_entropy(logits_NV, batch.input_ids_BT[:, 1:][mask_BT], reduction="none")
    row_N = mask_BT.nonzero()[:, 0]
    nll_B = torch.zeros(len(batch.rows), device=base.device).index_add(0, row_N, nll_N)
    return nll_B, mask_BT.sum(dim=1)


def mean_answer_nll(base: BaseModel, rendered: Sequence[RenderedRow], *, token_budget: int = TOKEN_BUDGET) -> float:
    """Mean negative log-likelihood per answer token over rows, in nats, without gradients."""
    total, tokens = 0.0, 0
    lengths = [base.renderer.length(row) for row in rendered]
    with torch.no_grad():
        for indices in token_budget_batches(lengths, token_budget):
            nll_B, tokens_B = answer_nll(base, collate(base.renderer, rendered, indices))
            total += float(nll_B.double().sum())
            tokens += int(tokens_B.sum())
    return total / tokens
