"""What a trained model is worth: loss and accuracy on held-out rows, and what it forgot of another task.

Legend: R row, N answer token, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p2d.batches import Batch, hidden, pack, packed_batches
from p2d.errors import Diverged
from p2d.evaluation import row_losses
from p2d.generation import task_metric
from p2d.models import BaseModel
from p2d.rows import Row

CPU_TOKENS, GPU_TOKENS = 1024, 8192
"""Tokens of one batch, of which all logits of answers are held: 49,152 fp32 numbers a token for SmolLM2."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one trained model. Losses are nats per answer token."""

    nll: list[float]
    """Nats of each held-out row's answer."""
    tokens: list[int]
    """Answer tokens of each held-out row."""
    token_accuracy: float
    """Share of held-out answer tokens that are the likeliest, given those before."""
    metric: float | None
    """Mean of the task's metric over answers that the model wrote; None where it was not asked for."""
    other_loss: float | None
    """Loss on rows of the other task; None without one."""
    other_kl: float | None
    """KL divergence of the base model's next token from the trained model's on those rows' answers, nats per token."""

    @property
    def loss(self) -> float:
        """Over all held-out rows together."""
        return sum(self.nll) / sum(self.tokens)


@dataclass(slots=True)
class Measures:
    """Which rows are looked at, and how."""

    held_out: Sequence[Row]
    other: Sequence[Row] = ()
    """Of another task."""
    metric: str | None = None
    """`exact_match` or `rouge_l`, by generation, which costs some hundred times the loss."""
    other_before: float | None = None
    """Loss of the untouched model on `other`; None without such rows, or before `prepare`."""
    _base: list[Tensor] = field(default_factory=list)
    """The base model's log-probabilities on `other`, fp16 [N, V] by batch, made once."""

    @property
    def identity(self) -> str:
        """Hash of what is looked at."""
        facts = repr([(row.prompt, row.answer) for row in (*self.held_out, *self.other)] + [self.metric])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def prepare(self, base: BaseModel) -> None:
        """Note what the untouched model says of the other task."""
        nll = tokens = 0.0
        self._base = []
        for _, log_NV, target_N in _answers(base, self.other):
            self._base.append(log_NV.half())
            nll -= float(log_NV.gather(1, target_N[:, None]).sum())
            tokens += len(target_N)
        self.other_before = nll / tokens if tokens else None

    def loss(self, base: BaseModel, rows: Sequence[Row]) -> float:
        """Mean loss of some rows. Raises Diverged if one is not finite."""
        return row_losses(base, [base.renderer.render(row) for row in rows]).mean

    def all(self, base: BaseModel) -> Measured:
        """Look at everything. Raises Diverged if a loss is not finite."""
        nll_R, tokens_R = [0.0] * len(self.held_out), [0] * len(self.held_out)
        right = 0
        for batch, log_NV, target_N in _answers(base, self.held_out):
            right += int((log_NV.argmax(-1) == target_N).sum())
            of_rows = (-log_NV.gather(1, target_N[:, None])[:, 0]).split(batch.answer_lengths)
            for row, nll_N in zip(batch.rows, of_rows, strict=True):
                nll_R[row], tokens_R[row] = float(nll_N.double().sum()), len(nll_N)
        if not all(map(math.isfinite, nll_R)):
            raise Diverged("The loss of a held-out row is not finite.")
        other_loss, other_kl = self._forgotten(base) if self.other else (None, None)
        return Measured(
            nll=[round(nll, 4) for nll in nll_R],
            tokens=tokens_R,
            token_accuracy=right / sum(tokens_R),
            metric=None
            if self.metric is None
            else task_metric(base, self.held_out, metric=self.metric, on_token=_nothing),
            other_loss=other_loss,
            other_kl=other_kl,
        )

    def _forgotten(self, base: BaseModel) -> tuple[float, float]:
        nll = kl = 0.0
        tokens = 0
        for was_NV, (_, log_NV, target_N) in zip(self._base, _answers(base, self.other), strict=True):
            was_NV = was_NV.float()
            kl += float((was_NV.exp() * (was_NV - log_NV)).sum())
            nll -= float(log_NV.gather(1, target_N[:, None]).sum())
            tokens += len(target_N)
        if not (math.isfinite(nll) and math.isfinite(kl)):
            raise Diverged("The loss on the other task is not finite.")
        return nll / tokens, kl / tokens


def _nothing() -> None:
    """Nobody watches single tokens."""


def _answers(base: BaseModel, rows: Sequence[Row]) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Some rows in one line, log-probabilities fp32 [N, V] of their answer tokens, and those tokens [N]; batch by batch."""
    rendered = [base.renderer.render(row) for row in rows]
    lengths = [base.renderer.length(row) for row in rendered]
    budget = CPU_TOKENS if base.device.type == "cpu" else GPU_TOKENS
    for indices in packed_batches(lengths, budget):
        batch = pack(base.renderer, rendered, indices).to(base.device)
        mask_BT = batch.answer_mask_BT[:, 1:]
        with torch.no_grad():
            logits_NV = base.logits(hidden(base, batch)[:, :-1][mask_BT])
            yield batch, logits_NV.float().log_softmax(-1), batch.input_ids_BT[:, 1:][mask_BT]
