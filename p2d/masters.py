"""fp32 copies of a model's weights, trained in their place: LoRA's adapters as a control, and whatever benchmarks compare with.

At rates that suit them a bf16 weight would not move; head slices keep fp32 copies for the same reason (`p2d.slices`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Masters:
    """Copies of some weights of a model (`p2d.optimization.Trainable`)."""

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
