"""What a trained model is worth: loss and accuracy on held-out rows, and what it forgot of another task.

Legend: R row, N answer token, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from p2d.batches import Batch, hidden, pack, packed_batches
from p2d.errors import Diverged
from p2d.evaluation import row_losses
from p2d.generation import task_metric
from p2d.models import BaseModel
from p2d.rendering import RenderedRow
from p2d.rows import Row

CPU_TOKENS, GPU_TOKENS = 1024, 8192
"""Tokens of one batch, of which all logits of answers are held: 49,152 fp32 numbers a token for SmolLM2."""

TEXT_PASSAGES, TEXT_TOKENS = 16, 96
"""How much of a text tells what was forgotten: as many tokens as a dozen rows of the other task have, some times over."""

TEXT_CHARACTERS = 4_000_000
"""Of a longer text the beginning is read."""


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
    text_loss: float | None = None
    """Loss on passages of a text; None where it was not asked for."""
    text_kl: float | None = None
    """KL divergence there."""

    @property
    def loss(self) -> float:
        """Over all held-out rows together."""
        return sum(self.nll) / sum(self.tokens)


class Retention:
    """Rows of which it is told what a model forgot: what the untouched one says of them is kept, fp16 [N, V] by batch."""

    def __init__(self, base: BaseModel, rows: Sequence[RenderedRow]) -> None:
        self._rows = rows
        self._log: list[Tensor] = []
        nll = 0.0
        for _, log_NV, target_N in _answers(base, rows):
            self._log.append(log_NV.half())
            nll += float(_nll(log_NV, target_N).sum())
        self._tokens = sum(len(row.answer_ids) for row in rows)
        self.before = nll / self._tokens
        """Loss of the untouched model, nats per token."""

    def now(self, base: BaseModel) -> tuple[float, float]:
        """The trained model's loss, and KL divergence of its next token from the untouched one's, nats per token.

        Raises: Diverged if one is not finite.
        """
        nll = kl = 0.0
        for was_NV, (_, log_NV, target_N) in zip(self._log, _answers(base, self._rows), strict=True):
            was_NV = was_NV.float()
            kl += float((was_NV.exp() * (was_NV - log_NV)).sum())
            nll += float(_nll(log_NV, target_N).sum())
        if not (math.isfinite(nll) and math.isfinite(kl)):
            raise Diverged("The loss on what may be forgotten is not finite.")
        return nll / self._tokens, kl / self._tokens


@dataclass(slots=True)
class Measures:
    """Which rows are looked at, and how."""

    held_out: Sequence[Row]
    other: Sequence[Row] = ()
    """Of another task."""
    text: Sequence[RenderedRow] = ()
    """Passages of any text."""
    metric: str | None = None
    """`exact_match` or `rouge_l`, by generation, which costs some hundred times the loss."""
    _other: Retention | None = None
    _text: Retention | None = None

    @property
    def identity(self) -> str:
        """Hash of what is always looked at; of text and metric a cell may know nothing (`lacking`)."""
        # The end keeps the names of cells that were computed when the metric was part of them.
        facts = repr([*((row.prompt, row.answer) for row in (*self.held_out, *self.other)), None])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    @property
    def other_before(self) -> float | None:
        """Loss of the untouched model on `other`; None without such rows, or before `prepare`."""
        return None if self._other is None else self._other.before

    @property
    def text_before(self) -> float | None:
        """Loss of the untouched model on `text`, likewise."""
        return None if self._text is None else self._text.before

    def prepare(self, base: BaseModel) -> None:
        """Note what the untouched model says of the other task and of the text."""
        if self.other:
            self._other = Retention(base, [base.renderer.render(row) for row in self.other])
        if self.text:
            self._text = Retention(base, self.text)

    def lacking(self, measured: Measured | None) -> bool:
        """Whether something is wanted that was not looked at."""
        if measured is None:
            return True
        return (self.metric is not None and measured.metric is None) or (bool(self.text) and measured.text_loss is None)

    def loss(self, base: BaseModel, rows: Sequence[Row]) -> float:
        """Mean loss of some rows. Raises Diverged if one is not finite."""
        return row_losses(base, [base.renderer.render(row) for row in rows]).mean

    def all(self, base: BaseModel, *, final: bool = True) -> Measured:
        """Look at everything, at text and metric only if `final`. Raises Diverged if a loss is not finite."""
        nll_R, tokens_R = [0.0] * len(self.held_out), [0] * len(self.held_out)
        right = 0
        for batch, log_NV, target_N in _answers(base, [base.renderer.render(row) for row in self.held_out]):
            right += int((log_NV.argmax(-1) == target_N).sum())
            of_rows = _nll(log_NV, target_N).split(batch.answer_lengths)
            for row, nll_N in zip(batch.rows, of_rows, strict=True):
                nll_R[row], tokens_R[row] = float(nll_N.double().sum()), len(nll_N)
        if not all(map(math.isfinite, nll_R)):
            raise Diverged("The loss of a held-out row is not finite.")
        other_loss, other_kl = (None, None) if self._other is None else self._other.now(base)
        text_loss, text_kl = (None, None) if self._text is None or not final else self._text.now(base)
        metric = None
        if self.metric is not None and final:
            metric = task_metric(base, self.held_out, metric=self.metric, on_token=_nothing)
        return Measured(
            nll=[round(nll, 4) for nll in nll_R],
            tokens=tokens_R,
            token_accuracy=right / sum(tokens_R),
            metric=metric,
            other_loss=other_loss,
            other_kl=other_kl,
            text_loss=text_loss,
            text_kl=text_kl,
        )


def passages(base: BaseModel, path: Path) -> list[RenderedRow]:
    """TEXT_PASSAGES of a text, at even distances, outside of any turn: of each all tokens but the first are to be predicted.

    Raises: ValueError if the text cannot be read or is too short.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(TEXT_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no text in UTF-8 that could be read: {error}") from error
    ids = base.renderer.encode(text)
    if len(ids) < TEXT_PASSAGES * TEXT_TOKENS:
        raise ValueError(f"{path.name} has {len(ids)} tokens; {TEXT_PASSAGES * TEXT_TOKENS} are wanted")
    starts = [place * (len(ids) - TEXT_TOKENS) // (TEXT_PASSAGES - 1) for place in range(TEXT_PASSAGES)]
    some = [ids[start : start + TEXT_TOKENS] for start in starts]
    return [RenderedRow(one[:1], one[1:], own_system=True) for one in some]


def _nothing() -> None:
    """Nobody watches single tokens."""


def _nll(log_NV: Tensor, target_N: Tensor) -> Tensor:
    """Nats of each token, [N]."""
    return -log_NV.gather(1, target_N[:, None])[:, 0]


def _answers(base: BaseModel, rendered: Sequence[RenderedRow]) -> Iterator[tuple[Batch, Tensor, Tensor]]:
    """Some rows in one line, log-probabilities fp32 [N, V] of their answer tokens, and those tokens [N]; batch by batch."""
    lengths = [base.renderer.length(row) for row in rendered]
    budget = CPU_TOKENS if base.device.type == "cpu" else GPU_TOKENS
    for indices in packed_batches(lengths, budget):
        batch = pack(base.renderer, rendered, indices).to(base.device)
        mask_BT = batch.answer_mask_BT[:, 1:]
        with torch.no_grad():
            logits_NV = base.logits(hidden(base, batch)[:, :-1][mask_BT])
            yield batch, logits_NV.float().log_softmax(-1), batch.input_ids_BT[:, 1:][mask_BT]
