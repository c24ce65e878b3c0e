"""Optimizer steps on a CUDA device, a step's forward and backward pass recorded once and replayed in one launch.

A model of 135 M weights makes thousands of small kernels a step, and a step takes as long as the host needs to launch them.
Recorded, they run without it (CUDA graphs): 4 to 8 times as many steps a second on an H200 (docs/LOG.md). All rows are padded to
the longest, which the longest of 16 rows nearly equals, so that one recording is enough.

Legend: B rows of a step, T token of the longest row, N all predicted tokens of a step, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from p2d.loss import token_nll
from p2d.models import BaseModel
from p2d.optimization import SliceTrainer, Trainable
from p2d.rendering import RenderedRow


class GraphedTrainer(SliceTrainer):
    """`SliceTrainer` whose passes are recorded. Nothing is done in smaller parts: memory that runs out raises."""

    def __init__(
        self, base: BaseModel, trained: Trainable, rows: Sequence[RenderedRow], *, batch_size: int, seed: str
    ) -> None:
        super().__init__(base, trained, rows, batch_size=batch_size, seed=seed)
        longest = max(base.renderer.length(row) for row in rows)
        self._ids_BT = torch.full((batch_size, longest), base.renderer.pad_id, device=base.device)
        self._weight_BT = torch.zeros(batch_size, longest - 1, device=base.device)
        """What the loss of each predicted token counts; 0 for all but answers."""
        self._graph = torch.cuda.CUDAGraph()
        self._loss = self._record()
        self._gradients = [parameter.grad for parameter in trained.parameters()]
        """Where the recording writes them."""

    def gradient(self, rows: Sequence[RenderedRow]) -> float:
        """Put the rows where the recording reads them, and replay it; a short last step is filled up with nothing."""
        ids_BT = torch.full(self._ids_BT.shape, self._base.renderer.pad_id)
        weight_BT = torch.zeros(self._weight_BT.shape)
        share = 1 / sum(len(row.answer_ids) for row in rows)
        for place, row in enumerate(rows):
            ids = [*self._base.renderer.asked(row), *row.answer_ids]
            ids_BT[place, : len(ids)] = torch.tensor(ids)
            weight_BT[place, len(ids) - 1 - len(row.answer_ids) : len(ids) - 1] = share
        self._ids_BT.copy_(ids_BT)
        self._weight_BT.copy_(weight_BT)
        self._graph.replay()
        for parameter, gradient in zip(self.slices.parameters(), self._gradients, strict=True):
            parameter.grad = gradient
        return float(self._loss)

    def _record(self) -> Tensor:
        stream = torch.cuda.Stream(self._base.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._pass()  # libraries allocate what they keep at their first use
        torch.cuda.current_stream().wait_stream(stream)
        self.slices.zero_grad()
        with torch.cuda.graph(self._graph, stream=stream):
            return self._pass()

    def _pass(self) -> Tensor:
        h_BTD = self._base.hidden(self._ids_BT)
        head = self._base.module.get_submodule(self._base.spec.lm_head)
        nll_N = token_nll(head, h_BTD[:, :-1].flatten(0, 1), self._ids_BT[:, 1:].flatten())
        loss = (nll_N * self._weight_BT.flatten()).sum()
        loss.backward()
        return loss.detach()
