"""The heart: chosen head slices as the only parameters of a frozen model, trained in place.

The weight of a sliced projection always holds the merged values, so the forward pass costs nothing extra and the model
is the trained model at any time. Only the gradient of the chosen units is ever computed: no full-size gradient exists,
and none at all below the shallowest chosen layer. Slices and their optimizer state are fp32 masters; `sync` rounds them
into the weight. Biases stay frozen (decision 0010). Optimizer and loop are `p2d.training`.

Legend: U chosen unit (query head of q and o, KV group of k and v), E head width, D model width, N token, I, O inputs and
outputs of a module, S chosen places among them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from p2d.arch.spec import unit_rows, units_of
from p2d.config import Projection
from p2d.models import BaseModel

Head = tuple[int, int]
"""(layer, query head), 0-based."""


@dataclass(frozen=True, slots=True)
class Site:
    """One sliced projection: which of its units, and their weights."""

    layer: int
    projection: Projection
    units: tuple[int, ...]
    master: nn.Parameter
    """Trained values, fp32 [U, E, D]."""
    base_UED: Tensor
    """The base model's own values of the slices, in the weight's type."""
    weight_UED: Tensor
    """All units of the projection, a view of the module's weight: what is written there changes the model."""
    index_U: Tensor
    """`units`, on the model's device."""

    @property
    def key(self) -> str:
        """Name in states, adapters and checkpoints."""
        return slice_key(self.layer, self.projection)

    def at(self, fraction: float) -> Tensor:
        """The slices part of the way from base (0) to master (1), [U, E, D] in the weight's type."""
        return self.base_UED.float().lerp(self.master.detach(), fraction).to(self.base_UED.dtype)

    def write(self, values_UED: Tensor) -> None:
        """Round values into the weight."""
        with torch.no_grad():
            self.weight_UED.index_copy_(0, self.index_U, values_UED.to(self.weight_UED.dtype))


@dataclass(frozen=True, slots=True)
class SlicedModule:
    """A module whose projections, some or all, are sliced: one of q, k, v, o, or the one that q, k and v share."""

    module: nn.Module
    sites: tuple[Site, ...]
    is_input: bool
    """Whether units are places among its inputs (o) or its outputs (q, k, v)."""
    transposed: bool
    """Whether its weight is stored [in, out]."""
    index_S: Tensor | None
    """Places of the chosen units among its outputs or inputs, site by site; None = all of them in their own order."""

    @property
    def own_forward(self) -> Callable[[Tensor], Tensor]:
        """The forward of the module's class, which installing hides."""
        own: Callable[[Tensor], Tensor] = type(self.module).forward.__get__(self.module)
        return own

    def forward(self, x: Tensor) -> Tensor:
        """What the module computes, bit for bit, with a gradient for the slices."""
        apply: Any = SliceGradient.apply
        y: Tensor = apply(x, self.module.weight, self, *(site.master for site in self.sites))
        return y

    def chosen(self, values: Tensor) -> Tensor:
        """Its chosen outputs (or inputs), [..., S]."""
        return values if self.index_S is None else values.index_select(-1, self.index_S)


class SliceGradient(torch.autograd.Function):
    """A module's own forward; backward yields the gradient of chosen units alone, by one product for all its sites.

    The masters hold the same numbers as W in fp32 and take the gradient; the values used are those in W. Source: our own
    prototype (docs/decisions/0008): equal to the masked full gradient, 0.90 of its step time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, sliced: SlicedModule, *masters: Tensor) -> Tensor:
        ctx.sliced, ctx.width = sliced, masters[0].shape[1]
        # Columns of W meet only their own inputs: keep those, a tenth of x at a tenth of the heads.
        ctx.save_for_backward(sliced.chosen(x) if sliced.is_input else x, W)
        return sliced.own_forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gy,) = grads
        x, W = ctx.saved_tensors
        sliced: SlicedModule = ctx.sliced
        gx = None
        if ctx.needs_input_grad[0]:  # false in the shallowest chosen layer: backward ends here
            gx = gy @ (W.t() if sliced.transposed else W)
        x_NI, g_NO = x.flatten(0, -2), gy.flatten(0, -2)
        # Either order of factors gives [S, D] as it is stored in the masters: nothing is transposed in memory.
        g_SD = x_NI.t() @ g_NO if sliced.is_input else sliced.chosen(g_NO).t() @ x_NI
        g_UED = g_SD.float().unflatten(0, (-1, ctx.width))
        return gx, None, None, *g_UED.split([len(site.units) for site in sliced.sites])


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
        self._modules = _sliced_modules(base, self.sites)

    def __enter__(self) -> HeadSlices:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        self.restore()

    def install(self) -> None:
        """Make the forward pass of every sliced module keep what its slices' gradients need."""
        for sliced in self._modules:
            sliced.module.forward = sliced.forward  # on this instance alone

    def remove(self) -> None:
        """Undo `install`; the trained values stay in the weights."""
        for sliced in self._modules:
            vars(sliced.module).pop("forward", None)

    def sync(self) -> None:
        """Round the masters into the weights; call after every change of a master."""
        for site in self.sites:
            site.write(site.master)

    def restore(self) -> None:
        """Put the base model's own values back into the weights, bit for bit; the masters keep what was trained."""
        for site in self.sites:
            site.write(site.base_UED)

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
            site.write(site.at(fraction))

    def state(self) -> dict[str, Tensor]:
        """The trained values [U, E, D] as they stand in the weights, in their type: copying them gives this very model."""
        return {site.key: site.master.detach().to(site.base_UED.dtype).clone() for site in self.sites}

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
    weight_UED = base.units(layer, projection)
    index_U = torch.tensor(units, device=base.device)
    base_UED = weight_UED.index_select(0, index_U)
    # clone: for an fp32 base `float` alone would hand out the base's own copy.
    master = nn.Parameter(base_UED.float().clone())
    return Site(layer, projection, tuple(units), master, base_UED, weight_UED, index_U)


def _sliced_modules(base: BaseModel, sites: Sequence[Site]) -> list[SlicedModule]:
    """The modules that hold the sites; those of one fused q, k, v become one."""
    by_path: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        by_path[base.spec.path(site.layer, site.projection)].append(site)
    return [_sliced_module(base, tuple(sharing)) for sharing in by_path.values()]


def _sliced_module(base: BaseModel, sites: tuple[Site, ...]) -> SlicedModule:
    is_input, transposed = sites[0].projection == "o", base.spec.transposed
    weight = base.weight(sites[0].layer, sites[0].projection)
    places = [
        place
        for site in sites
        for unit in site.units
        for place in unit_rows(base.spec, base.info, site.projection, unit)
    ]
    size = weight.shape[1 if is_input != transposed else 0]
    index_S = None if places == list(range(size)) else torch.tensor(places, device=base.device)
    module = base.projection(sites[0].layer, sites[0].projection)
    return SlicedModule(module, sites, is_input, transposed, index_S)
