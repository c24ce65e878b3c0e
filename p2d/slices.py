"""The heart: chosen head slices as the only parameters of a frozen model, trained in place.

The weight of a sliced projection always holds the merged values, so the forward pass costs nothing extra and the model
is the trained model at any time. Only the gradient of the chosen rows (q, k, v) or columns (o) is ever computed: no
full-size gradient exists, and none at all below the shallowest chosen layer. Slices and their optimizer state are fp32
masters; `sync` rounds them into the weight. Optimizer and loop are `p2d.training`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2d.arch.spec import axis, unit_rows, units_of
from p2d.config import Projection
from p2d.models import BaseModel

Head = tuple[int, int]
"""(layer, query head), 0-based."""


class SliceLinear(torch.autograd.Function):
    """`y = x W^T + b` whose only weight gradient is that of the rows or columns `index` of W.

    `master` holds the same numbers in fp32 and takes the gradient; the values used are those in W. Source: our own
    prototype (docs/decisions): equal to the masked full gradient bit for bit, 0.90 of its step time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, master: Tensor, index: Tensor | None, dim: int
    ) -> Tensor:
        ctx.dim = dim
        # Columns of W meet only their own inputs: keep those, a tenth of x at a tenth of the heads.
        ctx.save_for_backward(x if index is None or dim == 0 else x.index_select(-1, index), W, index)
        return functional.linear(x, W, b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, None, None]:
        (gy,) = grads
        x, W, index = ctx.saved_tensors
        gx = gy @ W if ctx.needs_input_grad[0] else None  # false in the shallowest chosen layer: backward ends here
        g_NO, x_NI = gy.flatten(0, -2), x.flatten(0, -2)
        if ctx.dim == 0 and index is not None:
            g_NO = g_NO.index_select(-1, index)
        return gx, None, None, (g_NO.t() @ x_NI).float(), None, None


@dataclass(frozen=True, slots=True)
class Site:
    """One sliced projection: which linear layer, which of its units, and their weights."""

    layer: int
    projection: Projection
    units: tuple[int, ...]
    linear: nn.Linear
    index: Tensor
    """Rows or columns of the weight, in unit order."""
    whole: bool
    """Whether that is all of them: nothing is then gathered."""
    master: nn.Parameter
    """Trained values, fp32: [index, in] for q, k, v; [out, index] for o."""
    base: Tensor
    """The base model's own values of the slice, in the weight's type."""

    @property
    def key(self) -> str:
        """Name in states, adapters and checkpoints."""
        return slice_key(self.layer, self.projection)

    def at(self, fraction: float) -> Tensor:
        """The slice part of the way from base (0) to master (1), in the weight's type."""
        return self.base.float().lerp(self.master.detach(), fraction).to(self.base.dtype)

    @property
    def axis(self) -> int:
        """Axis of the weight that `index` runs along."""
        return axis(self.projection)


def slice_key(layer: int, projection: Projection) -> str:
    """Name of a slice in states, adapters and checkpoints."""
    return f"layers.{layer}.{projection}"


class HeadSlices:
    """The slices of some heads of a base model; a context in which they are the model's only trainable parameters.

    On leaving the context the base weights are back, bit for bit. The k/v slices of a KV group are shared by its heads:
    each is a parameter once, however many of the group's heads were chosen.
    """

    def __init__(self, base: BaseModel, heads: Sequence[Head], projections: Sequence[Projection]) -> None:
        assert heads, "no heads"
        assert projections, "no projections"
        self.heads = sorted(set(heads))
        self.projections = tuple(projections)
        by_layer: dict[int, list[int]] = defaultdict(list)
        for layer, head in self.heads:
            assert 0 <= layer < base.info.n_layers, (layer, head)
            assert 0 <= head < base.info.n_heads, (layer, head)
            by_layer[layer].append(head)
        self.sites = [
            _site(base, layer, projection, units_of(base.info, projection, by_layer[layer]))
            for layer in sorted(by_layer)
            for projection in projections
        ]

    def __enter__(self) -> HeadSlices:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        self.restore()

    def install(self) -> None:
        """Make the forward pass of every sliced projection keep what its slice gradient needs."""
        for site in self.sites:
            linear = site.linear
            linear.forward = partial(_forward, site)  # type: ignore[method-assign]  # on this instance alone

    def remove(self) -> None:
        """Undo `install`; the trained values stay in the weights."""
        for site in self.sites:
            vars(site.linear).pop("forward", None)

    def sync(self) -> None:
        """Round the masters into the weights; call after every change of a master."""
        for site in self.sites:
            _write(site, site.master)

    def restore(self) -> None:
        """Put the base model's own values back into the weights, bit for bit; the masters keep what was trained."""
        for site in self.sites:
            _write(site, site.base)

    def parameters(self) -> list[nn.Parameter]:
        """The masters, one per sliced projection."""
        return [site.master for site in self.sites]

    def site(self, layer: int, projection: Projection) -> Site | None:
        """The sliced projection of a layer, if it is one."""
        key = slice_key(layer, projection)
        return next((site for site in self.sites if site.key == key), None)

    @property
    def n_parameters(self) -> int:
        """Trained weights; shared k/v slices counted once."""
        return sum(site.master.numel() for site in self.sites)

    @property
    def units(self) -> list[tuple[int, Projection, int]]:
        """(layer, projection, unit) of every slice; the unit is a head in q and o, a KV group in k and v."""
        return [(site.layer, site.projection, unit) for site in self.sites for unit in site.units]

    def interpolate(self, fraction: float) -> None:
        """Set the weights part of the way from base (0) to masters (1); the masters stay."""
        for site in self.sites:
            _write(site, site.at(fraction))

    def delta(self) -> dict[str, Tensor]:
        """How far every slice moved from the base, fp32: the difference is taken in fp32, bf16 would round it away."""
        return {site.key: site.master.detach() - site.base.float() for site in self.sites}

    def state(self) -> dict[str, Tensor]:
        """The trained values as they stand in the weights, in the weights' type: copying them gives this very model."""
        return {site.key: site.master.detach().to(site.base.dtype).clone() for site in self.sites}

    def masters(self) -> dict[str, Tensor]:
        """A copy of the fp32 masters, for checkpoints."""
        return {site.key: site.master.detach().clone() for site in self.sites}

    def load_masters(self, values: Mapping[str, Tensor]) -> None:
        """Set the masters, and the weights with them."""
        assert values.keys() == {site.key for site in self.sites}, "slices of other heads or projections"
        with torch.no_grad():
            for site in self.sites:
                site.master.copy_(values[site.key])
        self.sync()

    def gradients(self) -> dict[str, Tensor]:
        """The fp32 gradients that backward left; zeros where none arrived."""
        return {
            s.key: torch.zeros_like(s.master) if s.master.grad is None else s.master.grad.clone() for s in self.sites
        }

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for site in self.sites:
            site.master.grad = None


def all_heads(base: BaseModel) -> list[Head]:
    """Every head of a model."""
    return [(layer, head) for layer in range(base.info.n_layers) for head in range(base.info.n_heads)]


def _site(base: BaseModel, layer: int, projection: Projection, units: list[int]) -> Site:
    linear = base.projection(layer, projection)
    assert isinstance(linear, nn.Linear)
    weights = [weight for unit in units for weight in unit_rows(base.spec, base.info, projection, unit)]
    index = torch.tensor(weights, device=base.device)
    values = linear.weight.detach().index_select(axis(projection), index)
    # clone: for an fp32 base `float` alone would hand out the base's own copy.
    master = nn.Parameter(values.float().clone())
    whole = index.numel() == linear.weight.shape[axis(projection)]
    return Site(layer, projection, tuple(units), linear, index, whole, master, base=values)


def _forward(site: Site, x: Tensor) -> Tensor:
    linear = site.linear
    apply: Any = SliceLinear.apply
    result: Tensor = apply(x, linear.weight, linear.bias, site.master, None if site.whole else site.index, site.axis)
    return result


def _write(site: Site, values: Tensor) -> None:
    with torch.no_grad():
        site.linear.weight.index_copy_(site.axis, site.index, values.to(site.linear.weight.dtype))
