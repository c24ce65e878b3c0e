"""What an arm trains, all by the same optimizer, schedule and batches: head slices, `peft`'s LoRA, or every weight.

Adapters and full weights keep fp32 masters under the model's own type, as head slices do: at rates that suit them a bf16
weight would not move. On leaving each context the base model is back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.arms import Weights
from p2d.baselines import lora_layers
from p2d.models import BaseModel
from p2d.optimization import Trainable
from p2d.slices import HeadSlices


class Masters:
    """fp32 copies of some weights of a model, trained in their place (`p2d.optimization.Trainable`)."""

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self._weights = dict(weights)
        self._masters = {name: nn.Parameter(weight.detach().float().clone()) for name, weight in weights.items()}
        self._start = {name: weight.detach().clone() for name, weight in weights.items()}

    @contextmanager
    def trained(self) -> Iterator[Masters]:
        """Within the block the weights ask for gradients, which go to the masters at once."""
        hooks = []
        for name, weight in self._weights.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(self._receiver(self._masters[name])))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()
            for name, weight in self._weights.items():
                weight.requires_grad_(False)
                weight.grad = None
                with torch.no_grad():
                    weight.copy_(self._start[name])

    @staticmethod
    def _receiver(master: nn.Parameter) -> Any:
        def receive(weight: Tensor) -> None:
            assert weight.grad is not None
            grad = weight.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            weight.grad = None

        return receive

    def parameters(self) -> list[nn.Parameter]:
        """What AdamW holds."""
        return list(self._masters.values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The same by name."""
        return dict(self._masters)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for master in self._masters.values():
            master.grad = None

    def sync(self) -> None:
        """Round the masters into the model."""
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(self._masters[name])

    def masters(self) -> dict[str, Tensor]:
        """A copy of them."""
        return {name: master.detach().clone() for name, master in self._masters.items()}

    def load_masters(self, values: Mapping[str, Tensor]) -> None:
        """Set them, and the model."""
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(values[name])
        self.sync()


@contextmanager
def installed(base: BaseModel, weights: Weights, heads: Sequence[tuple[int, int]], *, seed: int) -> Iterator[Trainable]:
    """Within the block these weights are what can be trained of the model."""
    if weights.kind == "slices":
        with HeadSlices(base, heads, weights.slices, weights.rank, seed=seed) as slices:
            yield slices
    elif weights.kind == "full":
        with Masters(dict(base.module.named_parameters())).trained() as masters:
            yield masters
    else:
        with _lora(base, weights, seed) as adapters, Masters(adapters).trained() as masters:
            yield masters


@contextmanager
def _lora(base: BaseModel, weights: Weights, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    targets: Any = "all-linear"
    if weights.slices:
        targets = sorted({base.spec.path(0, name).rpartition(".")[2] for name in weights.slices})
    assert weights.rank is not None
    torch.manual_seed(seed)  # where peft draws its first factors from
    with lora_layers(
        base,
        r=weights.rank,
        lora_alpha=2 * weights.rank,
        target_modules=targets,
        use_rslora=weights.variant == "rslora",
        use_dora=weights.variant == "dora",
    ) as layers:
        yield layers
