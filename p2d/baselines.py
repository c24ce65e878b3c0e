"""What the alternatives would cost here: full fine-tuning, and LoRA on all linear layers, over all rows.

Projected, not run: a few real optimizer steps are timed on this device, at the training's own batch size, precision and
sequence lengths, and scaled to all rows and epochs. The base weights are never written: full fine-tuning's AdamW works on
fp32 copies, and LoRA's layers are taken out again.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from p2d.batches import TOKEN_BUDGET, Batch, answer_nll, pack, packed_batches
from p2d.config import TrainingConfig, epochs_of
from p2d.device import backward
from p2d.errors import OutOfMemory
from p2d.flops import LORA_RANK
from p2d.memory_guard import memory_guard
from p2d.models import BaseModel
from p2d.optimization import epoch_order, steps_per_epoch
from p2d.rendering import RenderedRow

WARM_STEPS, TIMED_STEPS = 1, 3
MEASURED_STEPS = WARM_STEPS + TIMED_STEPS
SAMPLED_ROWS = 10_000
"""Rows that are rendered to know the tokens of all: their mean is then known to a hundredth of a row's spread."""
FULL_BYTES_PER_WEIGHT = 2 + 4 + 4 + 8
"""Gradient (bf16; 4 for fp32), fp32 copy, fp32 gradient, AdamW's two moments: what full fine-tuning needs beside the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """Seconds that a whole training would take, from a few measured steps."""

    seconds: float | None
    """None where it cannot be measured here; `reason` says why."""
    step_s: float | None
    steps: int
    measured_steps: int
    trained_parameters: int
    projected: bool = True
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """All rows for all epochs, cut as training cuts them: the baselines get the same care."""

    batches: list[list[list[int]]]
    """Of one epoch: optimizer steps, each of one or more forward batches."""
    step_tokens: list[int]
    """Of each step."""
    epochs: int
    scale: float
    """All rows over those that are cut here: of more than SAMPLED_ROWS rows, that many at random stand for all."""
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Optimizer steps of all epochs."""
        return self.steps_per_epoch * self.epochs


def project_full_fine_tuning(
    base: BaseModel, rendered: Sequence[RenderedRow], settings: TrainingConfig, *, on_step: Callable[[], None]
) -> Baseline:
    """Time full fine-tuning: AdamW on fp32 copies of all weights, which is what mixed precision training keeps."""
    work = _workload(base, rendered, settings)
    count = sum(weight.numel() for weight in base.module.parameters())
    needed, free = count * FULL_BYTES_PER_WEIGHT, free_memory_bytes(base.device)
    if needed > free:
        return _untimed(work, count, f"full fine-tuning needs {needed} bytes beside the model; {free} are free here")
    try:
        return _timed_full(base, rendered, work, trained=count, on_step=on_step)
    except OutOfMemory as error:  # by then the adapter is trained: a comparison that does not fit must not cost it
        return _untimed(work, count, error.text)


def _timed_full(
    base: BaseModel, rendered: Sequence[RenderedRow], work: Workload, *, trained: int, on_step: Callable[[], None]
) -> Baseline:
    weights = list(base.module.parameters())
    with memory_guard("timing a baseline"):
        masters = [nn.Parameter(weight.detach().float().clone()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=True)

    def update() -> None:
        for master, weight in zip(masters, weights, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
        optimizer.step()
        with torch.no_grad():  # a gradient that knew where it came from would hold itself, and all masters, for good
            for master, weight in zip(masters, weights, strict=True):
                assert weight.grad is not None
                weight.grad.copy_(master)  # the bytes of writing weights back, into a place that nobody reads
                weight.grad = None

    try:
        for weight in weights:
            weight.requires_grad_(True)
        return _timed(base, rendered, work, update, trained=trained, on_step=on_step)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None


def project_lora(
    base: BaseModel, rendered: Sequence[RenderedRow], settings: TrainingConfig, *, on_step: Callable[[], None]
) -> Baseline:
    """Time peft's LoRA on all linear layers."""
    work = _workload(base, rendered, settings)
    with lora_layers(base, settings.seed, r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear") as layers:
        weights = list(layers.values())
        optimizer = torch.optim.AdamW(weights, lr=1e-4, fused=True)

        def update() -> None:
            optimizer.step()
            optimizer.zero_grad()

        trained = sum(weight.numel() for weight in weights)
        try:
            return _timed(base, rendered, work, update, trained=trained, on_step=on_step)
        except OutOfMemory as error:
            return _untimed(work, trained, error.text)


@contextmanager
def lora_layers(base: BaseModel, seed: int, **config: Any) -> Iterator[dict[str, nn.Parameter]]:
    """Within the block the model has peft's LoRA layers of this `LoraConfig`, without dropout; their weights by name.

    Whatever the block does to them, the base weights are those from before, and the layers are gone afterwards. Their first
    factors are drawn by the seed, whatever random state the process is in, which is left as it was.
    """
    from peft import LoraConfig, get_peft_model  # a second to import, and only here

    drawn_on = [base.device] if base.device.type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=drawn_on):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        # In the base's own type, not peft's default fp32: the casts to and fro would make LoRA look dearer than it is.
        wrapped = get_peft_model(
            base.module, LoraConfig(lora_dropout=0.0, task_type="CAUSAL_LM", **config), autocast_adapter_dtype=False
        )
    try:
        yield {name: weight for name, weight in wrapped.named_parameters() if weight.requires_grad}
    finally:
        wrapped.unload()
        vars(base.module).pop("peft_config", None)
        base.module.requires_grad_(False).eval()


def _workload(base: BaseModel, rendered: Sequence[RenderedRow], settings: TrainingConfig) -> Workload:
    """The batches that training makes: rows at random, packed in lines without padding."""
    size = settings.batch_size
    order = epoch_order(len(rendered), str(settings.seed), 0)[: max(1, SAMPLED_ROWS // size) * size]
    steps: list[list[list[int]]] = []
    tokens: list[int] = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        lengths = [base.renderer.length(rendered[row]) for row in rows]
        cut = packed_batches(lengths, TOKEN_BUDGET)
        steps.append([[rows[place] for place in places] for places in cut])
        tokens.append(sum(lengths))
    return Workload(
        steps,
        tokens,
        epochs_of(settings),
        len(rendered) / len(order),
        steps_per_epoch(len(rendered), settings.batch_size),
    )


def _timed(
    base: BaseModel,
    rendered: Sequence[RenderedRow],
    work: Workload,
    update: Callable[[], None],
    *,
    trained: int,
    on_step: Callable[[], None],
) -> Baseline:
    """Time steps on batches of typical size; forward and backward scale with tokens, the update with steps."""
    typical = statistics.median(work.step_tokens)
    near = sorted(range(len(work.batches)), key=lambda i: abs(work.step_tokens[i] - typical))
    chosen = [near[i % len(near)] for i in range(MEASURED_STEPS)]
    token_s: list[float] = []
    update_s: list[float] = []
    for index in chosen:
        started = _now(base.device)
        with memory_guard("timing a baseline"):
            for indices in work.batches[index]:
                backward(_loss(base, pack(base.renderer, rendered, indices)))
        middle = _now(base.device)
        with memory_guard("timing a baseline"):
            update()
        ended = _now(base.device)
        token_s.append((middle - started) / work.step_tokens[index])
        update_s.append(ended - middle)
        on_step()
    per_token, per_update = statistics.median(token_s[WARM_STEPS:]), statistics.median(update_s[WARM_STEPS:])
    seconds = work.epochs * (per_token * sum(work.step_tokens) * work.scale + per_update * work.steps_per_epoch)
    return Baseline(
        seconds=seconds,
        step_s=seconds / work.steps,
        steps=work.steps,
        measured_steps=TIMED_STEPS,
        trained_parameters=trained,
    )


def _untimed(work: Workload, trained: int, reason: str) -> Baseline:
    return Baseline(
        seconds=None, step_s=None, steps=work.steps, measured_steps=0, trained_parameters=trained, reason=reason
    )


def _loss(base: BaseModel, batch: Batch) -> Tensor:
    nll_B, tokens_B = answer_nll(base, batch)
    return nll_B.sum() / tokens_B.sum()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def free_memory_bytes(device: torch.device) -> int:
    """Memory that a new allocation may use on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
