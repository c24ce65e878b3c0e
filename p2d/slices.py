"""The heart: chosen head slices as the only parameters of a frozen model, trained in place.

The weight of a sliced projection always holds the merged values, so the forward pass costs nothing extra and the model
is the trained model at any time. Only the gradient of the chosen units is ever computed: no full-size gradient exists,
and none at all below the shallowest chosen layer. What is trained is fp32, like its optimizer state: the slices themselves
or, with a rank, factors of their change (`p2d.low_rank`); `sync` rounds the result into the weight. Biases stay frozen
(decision 0010). Optimizer and loop are `p2d.training`.

Legend: U chosen unit (query head of q and o, KV group of k and v), E head width, D model width, N token, I, O inputs and
outputs of a module, S chosen places among them.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from p2d.arch.spec import every_head, unit_rows, units_of
from p2d.config import Projection
from p2d.low_rank import Factors, fresh_factors
from p2d.models import BaseModel

Head = tuple[int, int]
"""(layer, query head), 0-based."""


@dataclass(frozen=True, slots=True)
class Site:
    """One sliced projection: which of its units, and their weights."""

    layer: int
    projection: Projection
    units: tuple[int, ...]
    trained: nn.Parameter | Factors
    """The slices in fp32 [U, E, D], or factors of their change."""
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

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: `layers.1.q`, or `layers.1.q.B` and `layers.1.q.A`."""
        if isinstance(self.trained, Factors):
            return {f"{self.key}.B": self.trained.B_UER, f"{self.key}.A": self.trained.A_URD}
        return {self.key: self.trained}

    @property
    def master(self) -> Tensor:
        """The trained slices, fp32 [U, E, D]; the parameter itself where there is no rank."""
        if isinstance(self.trained, Factors):
            return self.base_UED.float() + self.trained.update()
        return self.trained

    def gradients(self, g_UED: Tensor) -> tuple[Tensor, ...]:
        """The fp32 gradient of the slices as gradients of `parameters`, in their order."""
        return self.trained.gradients(g_UED) if isinstance(self.trained, Factors) else (g_UED,)

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
        parameters = [parameter for site in self.sites for parameter in site.parameters.values()]
        y: Tensor = apply(x, self.module.weight, self, *parameters)
        return y

    def chosen(self, values: Tensor) -> Tensor:
        """Its chosen outputs (or inputs), [..., S]."""
        return values if self.index_S is None else values.index_select(-1, self.index_S)


class SliceGradient(torch.autograd.Function):
    """A module's own forward; backward yields the gradient of chosen units alone, by one product for all its sites.

    The parameters take the gradient; the values used are those in W. Source: our own prototype (docs/decisions/0008): equal
    to the masked full gradient, 0.90 of its step time.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, sliced: SlicedModule, *parameters: Tensor) -> Tensor:
        ctx.sliced = sliced
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
        # Either order of factors gives [S, D] in the order of the slices: nothing is transposed in memory.
        g_SD = x_NI.t() @ g_NO if sliced.is_input else sliced.chosen(g_NO).t() @ x_NI
        g_UED = g_SD.float().unflatten(0, (-1, sliced.sites[0].base_UED.shape[1]))
        parts = g_UED.split([len(site.units) for site in sliced.sites])
        found = [g for site, part in zip(sliced.sites, parts, strict=True) for g in site.gradients(part)]
        return gx, None, None, *found


def slice_key(layer: int, projection: Projection) -> str:
    """Name of a slice in states, adapters and checkpoints."""
    return f"layers.{layer}.{projection}"


class HeadSlices:
    """The slices of some heads of a base model; a context in which they are the model's only trainable parameters.

    On leaving the context the base weights are back, bit for bit. The k/v slices of a KV group are shared by its heads:
    each is a parameter once, however many of the group's heads were chosen.
    """

    def __init__(
        self,
        base: BaseModel,
        heads: Sequence[Head],
        projections: Sequence[Projection],
        rank: int | None = None,
        *,
        seed: int = 0,
    ) -> None:
        """Args: rank: of the update inside each slice, None = the slice itself is trained. seed: of the factors' start."""
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
            _site(base, layer, projection, units_of(base.info, projection, by_layer[layer]), rank, seed)
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
        """Round the trained slices into the weights; call after every change of a parameter."""
        for site in self.sites:
            site.write(site.master)

    def restore(self) -> None:
        """Put the base model's own values back into the weights, bit for bit; the parameters keep what was trained."""
        for site in self.sites:
            site.write(site.base_UED)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained, fp32: one per sliced projection, or two with a rank."""
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The same by name, in the same order (`Site.parameters`)."""
        return {name: parameter for site in self.sites for name, parameter in site.parameters.items()}

    def site(self, layer: int, projection: Projection) -> Site | None:
        """The sliced projection of a layer, if it is one."""
        key = slice_key(layer, projection)
        return next((site for site in self.sites if site.key == key), None)

    @property
    def n_parameters(self) -> int:
        """Trained numbers; shared k/v slices counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def units(self) -> list[tuple[int, Projection, int]]:
        """(layer, projection, unit) of every slice; the unit is a head in q and o, a KV group in k and v."""
        return [(site.layer, site.projection, unit) for site in self.sites for unit in site.units]

    def interpolate(self, fraction: float) -> None:
        """Set the weights part of the way from base (0) to trained (1); the parameters stay."""
        for site in self.sites:
            site.write(site.at(fraction))

    def state(self) -> dict[str, Tensor]:
        """The trained values [U, E, D] as they stand in the weights, in their type: copying them gives this very model."""
        return {site.key: site.master.detach().to(site.base_UED.dtype).clone() for site in self.sites}

    def masters(self) -> dict[str, Tensor]:
        """A copy of all parameters by name, for checkpoints: slices [U, E, D], or with a rank their factors."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters().items()}

    def load_masters(self, values: Mapping[str, Tensor]) -> None:
        """Set the parameters, and the weights with them."""
        parameters = self.named_parameters()
        assert values.keys() == parameters.keys(), "slices of other heads, projections or rank"
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
        self.sync()

    def gradients(self) -> dict[str, Tensor]:
        """The fp32 gradients that backward left, by parameter name; zeros where none arrived."""
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in self.named_parameters().items()
        }

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters():
            parameter.grad = None


def all_heads(base: BaseModel) -> list[Head]:
    """Every head of a model."""
    return every_head(base.info)


def _site(base: BaseModel, layer: int, projection: Projection, units: list[int], rank: int | None, seed: int) -> Site:
    weight_UED = base.units(layer, projection)
    index_U = torch.tensor(units, device=base.device)
    base_UED = weight_UED.index_select(0, index_U)
    trained: nn.Parameter | Factors
    if rank is None:
        # clone: for an fp32 base `float` alone would hand out the base's own copy.
        trained = nn.Parameter(base_UED.float().clone())
    else:
        start = random.Random(f"{seed}:{slice_key(layer, projection)}").getrandbits(63)  # noqa: S311 - not a secret
        generator = torch.Generator().manual_seed(start)
        trained = fresh_factors(base_UED, rank, is_input=projection == "o", generator=generator)
    return Site(layer, projection, tuple(units), trained, base_UED, weight_UED, index_U)


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
