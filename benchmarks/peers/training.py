"""Training steps as people do them: full fine-tuning, LoRA by `peft`, and ALPS's masked gradients.

ALPS has not published its training; its paper says that the gradients of unchosen heads are set to zero (Eq. 8 and 9), and so
it is written here: full gradients of q, k and v in every layer, masked, then AdamW over all of them. Its weight decay is
masked too, without which "frozen" heads would decay (docs/decisions/0008).

All keep fp32 masters under the model's own weights, read packed rows and compute logits at answer tokens only: the strong
form of each. The base model's weights never change: updated values go where nobody reads them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from p2d.arch.spec import n_units, units_of
from p2d.batches import Batch, answer_nll
from p2d.config import Projection
from p2d.models import BaseModel
from p2d.slices import Head


def backward(base: BaseModel, batch: Batch) -> None:
    """Gradient of the mean loss per answer token."""
    nll_B, tokens_B = answer_nll(base, batch)
    (nll_B.sum() / tokens_B.sum()).backward()


class Masters:
    """fp32 copies of some weights, and AdamW on them."""

    def __init__(self, weights: Sequence[nn.Parameter], masks: Sequence[Tensor | None]) -> None:
        self.weights, self._masks = list(weights), list(masks)
        self.masters = [nn.Parameter(weight.detach().float().clone()) for weight in weights]
        decay = 0.0 if any(mask is not None for mask in masks) else 0.01
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-5, weight_decay=decay, fused=True)

    @contextmanager
    def trainable(self) -> Iterator[None]:
        """Within the block these weights ask for gradients, and nothing else of the model does."""
        for weight in self.weights:
            weight.requires_grad_(True)
        try:
            yield
        finally:
            for weight in self.weights:
                weight.requires_grad_(False)
                weight.grad = None

    def update(self) -> None:
        """Mask, step, and write the rounded result over the gradients: the bytes of writing weights, read by nobody."""
        for master, weight, mask in zip(self.masters, self.weights, self._masks, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float() if mask is None else weight.grad.float().mul_(mask)
        self.optimizer.step()
        for master, weight in zip(self.masters, self.weights, strict=True):
            assert weight.grad is not None
            weight.grad.copy_(master.detach())
            weight.grad = None

    def state_tensors(self) -> list[Tensor]:
        """Masters, their gradients and moments after a step."""
        return trainable_state(self.masters, self.optimizer)


def trainable_state(parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What training keeps for its parameters beside the model: themselves, a gradient each, AdamW's two moments."""
    moments = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
    return [*parameters, *parameters, *moments]  # the gradient has its parameter's shape and type


def full(base: BaseModel) -> Masters:
    """Full fine-tuning."""
    weights = list(base.module.parameters())
    return Masters(weights, [None] * len(weights))


def masked(base: BaseModel, heads: Sequence[Head], projections: Sequence[Projection]) -> Masters:
    """ALPS: these projections trained in every layer, all but the chosen heads' gradients set to zero."""
    weights: list[nn.Parameter] = []
    masks: list[Tensor] = []
    for layer in range(base.info.n_layers):
        chosen = [head for at, head in heads if at == layer]
        for name in projections:
            weight = base.projection(layer, name).weight
            assert isinstance(weight, nn.Parameter)
            units = units_of(base.info, name, chosen)
            mask_UE = torch.zeros(n_units(base.info, name), base.info.head_dim, device=weight.device)
            mask_UE[units] = 1
            weights.append(weight)
            masks.append(mask_UE.view(1, -1) if name == "o" else mask_UE.view(-1, 1))  # o's units are its columns
    return Masters(weights, masks)


class Lora:
    """`peft`'s LoRA on some projections of a model of its own, which it wraps for good."""

    def __init__(self, base: BaseModel, *, rank: int, projections: Sequence[Projection]) -> None:
        targets = sorted({base.spec.path(0, name).rpartition(".")[2] for name in projections})
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # In the base's own type: peft's default fp32 would add casts and make it look dearer than it is.
            wrapped: Any = get_peft_model(base.module, config, autocast_adapter_dtype=False)
        self.parameters: list[nn.Parameter] = [p for p in wrapped.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    def update(self) -> None:
        """One AdamW step."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_tensors(self) -> list[Tensor]:
        """Factors, their gradients and moments after a step."""
        return trainable_state(self.parameters, self.optimizer)
