"""Optimizer steps on a CUDA device, each pass forward and backward recorded once for each width and replayed in one launch.

A model of 135 M weights makes thousands of small kernels a step, and a step takes as long as the host needs to launch them.
Recorded, they run without it (CUDA graphs): 4 to 8 times as many steps a second on an H200 (docs/LOG.md). What is computed is
`p2d.optimization.SliceTrainer`'s step, in padded rows.

Legend: B rows of a step, T token, N all tokens of a step, D model width.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2d.errors import Diverged
from p2d.loss import token_nll
from p2d.models import BaseModel
from p2d.optimization import WEIGHT_DECAY, Schedule, Trainable, epoch_order, steps_per_epoch
from p2d.rendering import RenderedRow

WIDTH = 64
"""Rows of a step are padded to a multiple of so many tokens: few widths, so few recordings."""
WARM_UPS = 2
"""Passes before a recording: libraries allocate what they keep."""


@dataclass(frozen=True, slots=True)
class _Recording:
    """One pass over rows of one width, and where its inputs and outputs stand."""

    graph: torch.cuda.CUDAGraph
    ids_BT: Tensor
    weight_BT: Tensor
    """What the loss of each predicted token counts, [B, T - 1]; 0 for all but answers."""
    loss: Tensor
    gradients: list[Tensor]


class GraphedTrainer:
    """AdamW on weights that are installed, like `SliceTrainer`. Call `trained.sync` after the last step."""

    def __init__(
        self, base: BaseModel, trained: Trainable, rows: Sequence[RenderedRow], *, batch_size: int, seed: str
    ) -> None:
        self._base, self._trained, self._batch_size, self._seed = base, trained, batch_size, seed
        self._rows = [([*base.renderer.asked(row), *row.answer_ids], len(row.answer_ids)) for row in rows]
        self._parameters = trained.parameters()
        self._optimizer = torch.optim.AdamW(self._parameters, lr=0.0, weight_decay=WEIGHT_DECAY)
        self._recordings: dict[int, _Recording] = {}
        self._stream = torch.cuda.Stream(base.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._step = 0
        self._order: tuple[int, array[int]] | None = None

    def advance(self, schedule: Schedule) -> float:
        """Do the next step; returns its mean loss per answer token. Raises Diverged as `SliceTrainer` does."""
        epoch, place = divmod(self._step, steps_per_epoch(len(self._rows), self._batch_size))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self._rows), self._seed, epoch)
        indices = list(self._order[1][place * self._batch_size : (place + 1) * self._batch_size])
        recording = self._fill([self._rows[index] for index in indices])
        recording.graph.replay()
        for parameter, gradient in zip(self._parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        norm = float(torch.nn.utils.get_total_norm(recording.gradients))
        loss = float(recording.loss)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(
                f"Loss or gradient was not finite in step {self._step + 1}.", step=self._step + 1, rows=indices
            )
        for group in self._optimizer.param_groups:
            group["lr"] = schedule.rate(self._step)
        self._optimizer.step()
        self._step += 1
        return loss

    def _fill(self, rows: Sequence[tuple[list[int], int]]) -> _Recording:
        """Put a step's rows where the recording of their width reads them; a short last step is filled up with nothing."""
        width = WIDTH * math.ceil(max(len(ids) for ids, _ in rows) / WIDTH)
        ids_BT = torch.full((self._batch_size, width), self._base.renderer.pad_id)
        weight_BT = torch.zeros(self._batch_size, width - 1)
        share = 1 / sum(answer for _, answer in rows)
        for place, (ids, answer) in enumerate(rows):
            ids_BT[place, : len(ids)] = torch.tensor(ids)
            weight_BT[place, len(ids) - 1 - answer : len(ids) - 1] = share
        if width not in self._recordings:
            self._recordings[width] = self._record(ids_BT.to(self._base.device), weight_BT.to(self._base.device))
        recording = self._recordings[width]
        recording.ids_BT.copy_(ids_BT)
        recording.weight_BT.copy_(weight_BT)
        return recording

    def _record(self, ids_BT: Tensor, weight_BT: Tensor) -> _Recording:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UPS):
                self._trained.zero_grad()
                self._pass(ids_BT, weight_BT)
        torch.cuda.current_stream().wait_stream(self._stream)
        self._trained.zero_grad()
        graph = torch.cuda.CUDAGraph()
        # One pool for all: recordings never run at once, and each by itself would hold its own activations, gigabytes.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            loss = self._pass(ids_BT, weight_BT)
        gradients = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
        return _Recording(graph, ids_BT, weight_BT, loss, gradients)

    def _pass(self, ids_BT: Tensor, weight_BT: Tensor) -> Tensor:
        """Forward and backward with what is trained as it stands now."""
        self._trained.sync()
        h_BTD = self._base.hidden(ids_BT)
        head = self._base.module.get_submodule(self._base.spec.lm_head)
        nll_N = token_nll(head, h_BTD[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())
        loss = (nll_N * weight_BT.flatten()).sum()
        loss.backward()
        return loss.detach()
