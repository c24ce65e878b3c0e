"""What a set of weights is worth on held-out rows: answer loss, exact match by greedy generation, and the difference
between two sets with its uncertainty. Measures the model as it stands; who changes the weights is `p2d.steps`' business.

Legend: R row, B batch, T token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import DynamicCache

from p2d.batches import answer_nll, collate, row_length, token_budget_batches
from p2d.errors import Diverged
from p2d.metrics import METRICS
from p2d.models import BaseModel
from p2d.rendering import RenderedRow
from p2d.rows import Row

TOKENS = 4096
"""Tokens of one forward batch, padding counted."""

GENERATE_ROWS = 64
"""Most rows generated side by side."""

ANSWER_ROOM = 1.25
"""Generated answers may be this much longer than the longest reference. A guess that stops endless answers early."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Answer loss of each row."""

    nll_R: Floats
    """Nats, summed over the answer's tokens."""
    tokens_R: Floats

    @property
    def mean(self) -> float:
        """Nats per answer token, over all rows together."""
        return float(self.nll_R.sum() / self.tokens_R.sum())


def row_losses(base: BaseModel, rendered: Sequence[RenderedRow]) -> RowLosses:
    """Answer loss of every row under the weights as they stand. Raises Diverged if one is not finite."""
    nll_R, tokens_R = np.zeros(len(rendered)), np.zeros(len(rendered))
    lengths = [row_length(base.renderer, row) for row in rendered]
    with torch.no_grad():
        for indices in token_budget_batches(lengths, TOKENS):
            nll_B, tokens_B = answer_nll(base, collate(base.renderer, rendered, indices))
            nll_R[indices] = nll_B.double().cpu().numpy()
            tokens_R[indices] = tokens_B.cpu().numpy()
    if not np.isfinite(nll_R).all():
        raise Diverged("The loss of a held-out row is not finite.")
    return RowLosses(nll_R, tokens_R)


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Difference of the mean loss between two sets of weights on the same rows; below 0 = better."""

    difference: float
    low: float
    high: float
    """Ends of the 95 % interval."""


def paired_bootstrap(before: RowLosses, after: RowLosses, *, seed: int, draws: int = 10_000) -> Change:
    """How sure the difference is: rows are drawn again with replacement, both losses of a row always together."""
    rows = len(before.nll_R)
    pick = np.random.default_rng(seed).integers(rows, size=(draws, rows))
    tokens = before.tokens_R[pick].sum(axis=1)
    differences = (after.nll_R - before.nll_R)[pick].sum(axis=1) / tokens
    low, high = np.quantile(differences, [0.025, 0.975])
    return Change(difference=after.mean - before.mean, low=float(low), high=float(high))


def task_metric(
    base: BaseModel, rows: Sequence[Row], *, metric: str = "exact_match", on_batch: Callable[[int], None] | None = None
) -> float:
    """Mean of a task metric over rows, each answered by greedy generation from its prompt alone."""
    rendered = [base.renderer.render(row) for row in rows]
    limit = int(ANSWER_ROOM * max(len(row.answer_ids) for row in rendered)) + 1
    score = METRICS[metric]
    total = 0.0
    order = sorted(range(len(rows)), key=lambda index: len(rendered[index].prompt_ids))
    for start in range(0, len(order), GENERATE_ROWS):
        indices = order[start : start + GENERATE_ROWS]
        answers = generate(base, [rendered[index].prompt_ids for index in indices], limit=limit, on_token=on_batch)
        for index, ids in zip(indices, answers, strict=True):
            total += score(base.renderer.decode(ids), rows[index].answer)
    return total / len(rows)


@torch.no_grad()
def generate(
    base: BaseModel, prompts: Sequence[list[int]], *, limit: int, on_token: Callable[[int], None] | None = None
) -> list[list[int]]:
    """Greedy answers to prompts (without the shared prefix, which is put first), each up to its stop token or `limit`.

    One batch with a key-value cache; rows that have stopped leave it. Prompts are padded on the left, so that all rows
    write their next token at the same place.
    """
    prefix, stop = base.renderer.prefix_ids, base.renderer.stop_ids
    width = len(prefix) + max(len(ids) for ids in prompts)
    limit = min(limit, base.info.context_length - width)
    input_ids_BT = torch.full((len(prompts), width), base.renderer.pad_id, device=base.device)
    mask_BT = torch.zeros_like(input_ids_BT)
    for b, ids in enumerate(prompts):
        sequence = [*prefix, *ids]
        input_ids_BT[b, width - len(sequence) :] = torch.tensor(sequence, device=base.device)
        mask_BT[b, width - len(sequence) :] = 1
    answers: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    cache = DynamicCache(config=base.module.config)
    position_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    for step in range(limit):
        h_BTD = base.hidden(input_ids_BT, mask_BT, position_ids=position_BT, past_key_values=cache)
        next_B: Tensor = base.logits(h_BTD[:, -1]).argmax(-1)
        tokens = next_B.tolist()
        going = [place for place, token in enumerate(tokens) if token not in stop]
        for place in going:
            answers[alive[place]].append(tokens[place])
        if on_token is not None:
            on_token(step)
        if not going:
            break
        if len(going) < len(alive):
            keep = torch.tensor(going, device=base.device)
            alive = [alive[place] for place in going]
            cache.batch_select_indices(keep)
            mask_BT, position_BT, next_B = mask_BT[keep], position_BT[keep], next_B[keep]
        input_ids_BT = next_B[:, None]
        position_BT = position_BT[:, -1:] + 1
        mask_BT = torch.cat([mask_BT, torch.ones_like(input_ids_BT)], dim=1)
    return answers
