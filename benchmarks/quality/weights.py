"""What an arm trains, all by the same optimizer, schedule and batches: head slices, `peft`'s LoRA, or every weight.

On leaving each context the base model is back, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from benchmarks.quality.arms import Weights
from p2d.baselines import lora_layers
from p2d.masters import Masters
from p2d.models import BaseModel
from p2d.optimization import Trainable
from p2d.slices import HeadSlices


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
    with lora_layers(
        base,
        seed,
        r=weights.rank,
        lora_alpha=2 * weights.rank,
        target_modules=targets,
        use_rslora=weights.variant == "rslora",
        use_dora=weights.variant == "dora",
    ) as layers:
        yield layers
