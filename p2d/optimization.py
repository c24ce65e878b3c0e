"""One optimizer step on head slices: AdamW, its schedule, and which rows a step takes.

AdamW on the slices alone, cosine to 10 % after 10 % warm-up, loss on answer tokens only. The order of rows is a pure
function of seed and epoch. Loops, held-out rows and checkpoints are `p2d.training`'s business.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from p2d.batches import TOKEN_BUDGET, answer_nll, pack, packed_batches
from p2d.device import backward
from p2d.errors import Diverged, OutOfMemory
from p2d.memory_guard import memory_guard
from p2d.models import BaseModel
from p2d.rendering import RenderedRow

WARM_UP = 0.1
"""Share of steps over which the rate rises (the paper's)."""
FLOOR = 0.1
"""Rate at the end, as a share of the peak (the paper's)."""
WEIGHT_DECAY = 0.01
"""On what is trained only: slices, or with a rank their factors. A guess: torch's default."""


@dataclass(frozen=True, slots=True)
class StepLog:
    """One optimizer step."""

    step: int
    """1-based."""
    epoch: int
    """0-based."""
    loss: float
    """Mean over the step's answer tokens before the update, in nats."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Without padding."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate by step: linear warm-up, cosine down to FLOOR of the peak."""

    peak: float
    steps: int

    def rate(self, step: int) -> float:
        """Rate of the 0-based step."""
        warm = max(1, round(WARM_UP * self.steps))
        if step < warm:
            return self.peak * (step + 1) / warm
        share = (step - warm) / max(1, self.steps - 1 - warm)
        return self.peak * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * share)) / 2)


def epoch_order(count: int, seed: str, epoch: int) -> array[int]:
    """A permutation of `range(count)`: the same for the same seed and epoch on every machine. 8 bytes a row."""
    order = array("q", range(count))
    random.Random(f"{seed}:{epoch}").shuffle(order)  # noqa: S311 - order, not secrecy
    return order


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps of one pass; the last may be smaller."""
    return math.ceil(rows / batch_size)


class Trainable(Protocol):
    """fp32 parameters that stand for weights of a model: `p2d.slices.HeadSlices`, or what a benchmark compares them with."""

    def parameters(self) -> list[nn.Parameter]:
        """What AdamW holds."""

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The same by name, in the same order."""

    def zero_grad(self) -> None:
        """Forget all gradients."""

    def sync(self) -> None:
        """Round the parameters into the model's weights."""

    def masters(self) -> dict[str, Tensor]:
        """A copy of all parameters by name."""

    def load_masters(self, values: Mapping[str, Tensor]) -> None:
        """Set the parameters, and the weights with them."""


class SliceTrainer:
    """Optimizer steps on weights that are installed; which rows a step takes follows from its number alone."""

    def __init__(
        self,
        base: BaseModel,
        slices: Trainable,
        rows: Sequence[RenderedRow],
        *,
        batch_size: int,
        seed: str,
        token_budget: int = TOKEN_BUDGET,
    ) -> None:
        self._base, self.slices, self._rows = base, slices, rows
        self._batch_size, self._seed = batch_size, seed
        self.token_budget = token_budget
        """Tokens of one micro-batch; halved whenever memory runs out."""
        self.optimizer = torch.optim.AdamW(slices.parameters(), lr=0.0, weight_decay=WEIGHT_DECAY)
        self.step = 0
        """Steps done."""
        self._order: tuple[int, array[int]] | None = None

    def advance(self, schedule: Schedule) -> StepLog:
        """Do the next step.

        Where memory runs out the step is done again in smaller micro-batches, to the same loss and gradient.

        Raises: Diverged, and updates nothing, if a loss or gradient is not finite; OutOfMemory if one row, or AdamW's
                state, does not fit.
        """
        per_epoch = steps_per_epoch(len(self._rows), self._batch_size)
        epoch, place = divmod(self.step, per_epoch)
        if self._order is None or self._order[0] != epoch:  # once an epoch: it takes as long as a step of many rows
            self._order = epoch, epoch_order(len(self._rows), self._seed, epoch)
        indices = list(self._order[1][place * self._batch_size : (place + 1) * self._batch_size])
        rows = [self._rows[index] for index in indices]
        while (loss := self.gradient(rows)) is None:
            self.slices.zero_grad()  # what the micro-batches before it left
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.slices.parameters() if p.grad is not None]))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.slices.zero_grad()
            raise Diverged(
                f"Loss or gradient was not finite in step {self.step + 1}.", step=self.step + 1, rows=indices
            )
        rate = schedule.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with memory_guard("updating the slices"):  # the first step makes AdamW's moments
            self.optimizer.step()
            self.slices.zero_grad()
            self.slices.sync()
        self.step += 1
        tokens = sum(self._base.renderer.length(row) for row in rows)
        return StepLog(self.step, epoch, loss, rate, norm, tokens)

    def gradient(self, rows: Sequence[RenderedRow]) -> float | None:
        """Give the parameters the gradient of the mean loss per answer token of one step's rows, in packed micro-batches.

        Returns: that loss; None if memory ran out: the budget is then halved and the gradient of no use.
        """
        answer_tokens = sum(len(row.answer_ids) for row in rows)
        lengths = [self._base.renderer.length(row) for row in rows]
        total = 0.0
        for batch in packed_batches(lengths, self.token_budget):
            try:
                with memory_guard("training"):
                    nll_B, _ = answer_nll(self._base, pack(self._base.renderer, rows, batch))
                    loss = nll_B.sum() / answer_tokens
                    backward(loss)
                    total += float(loss.detach())
            except OutOfMemory:
                if len(batch) == 1:
                    raise
                self.token_budget = sum(lengths[place] for place in batch) // 2
                return None
        return total

    def state(self) -> dict[str, Tensor]:
        """Parameters and AdamW moments, for a checkpoint."""
        tensors = {f"master.{name}": value for name, value in self.slices.masters().items()}
        for name, parameter in self.slices.named_parameters().items():
            moments = self.optimizer.state.get(parameter, {})
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = moments.get(moment, torch.zeros_like(parameter)).clone()
        return tensors

    def load_state(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Continue after `step` steps as if never interrupted."""
        parameters = self.slices.named_parameters()
        self.slices.load_masters({name: tensors[f"master.{name}"] for name in parameters})
        self.step = step
        self.optimizer.state.clear()
        if step == 0:
            return
        for name, parameter in parameters.items():
            moments = {kind: tensors[f"{kind}.{name}"].to(parameter.device) for kind in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
