"""Response of a head to a row = cosine between the row's gradient and the held-out rows' mean gradient, at the base model.

To first order this answers "does this row move this head the way the task wants". Only gradients with respect to the
head's slices count. No per-row gradient of a weight is ever formed: dot products and norms come from the layer's input x
and its output gradient g (the gradient of a row is `sum over t of g_t x_t^T`).
    <gradient, M> = sum over t of g_t . (M x_t)
    |gradient|^2  = sum over t, s of (g_t . g_s) (x_t . x_s)
Ours, not the paper's: AUROC 0.84 to 0.91 for clean against corrupted rows where in-context mass gave 0.50 (docs/LOG.md).

Only v slices of the upper third of the layers are read: they tell as much as all slices of all layers, and backward ends at
the shallowest of them (docs/decisions/0012). Heads below have no response; `p2d.selection` says what stands in for them.

Legend: B row of a batch, T token, U unit (query head in q and o, KV group in k and v), E head width, D the other side's
width, R row, L scored layer, H query head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from p2d import flops
from p2d.arch.spec import HEAD_WISE, group_of, n_units, unit_rows
from p2d.batches import answer_nll, collate, token_budget_batches
from p2d.config import FAST_ANSWER_TOKENS, Projection, alignment_layers, alignment_projections
from p2d.device import backward
from p2d.errors import Diverged
from p2d.model_info import ModelInfo
from p2d.models import BaseModel
from p2d.rendering import RenderedRow
from p2d.response_matrix import ResponseShard
from p2d.responses import ResponseInput, Responses
from p2d.rows import Row

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CPU_TOKENS = 1024
GPU_TOKENS = 16384
"""Tokens of one batch, padding counted. By measurement on two CPU cores (larger is no faster); a guess for GPUs."""

Place = tuple[int, Projection]
"""One projection of one layer."""


def alignment(given: ResponseInput) -> Responses:
    """Cosines of every wanted row with the guide's mean gradient, for every head of the scored layers.

    Raises: Diverged if a gradient is not finite.
    """
    found = align(given, alignment_layers(given.base.info.n_layers), alignment_projections(given.slices))
    shard = ResponseShard(
        span=given.span,
        row_R=given.wanted(),
        layers=found.layers,
        n_heads=given.base.info.n_heads,
        response_RN=found.cosine_RN.astype(np.float16),
        scorer="alignment",
        combine="response",
    )
    return Responses(shard=shard, tokens=found.tokens, flops=round(found.flops))


@dataclass(frozen=True, kw_only=True, slots=True)
class Aligned:
    """What the passes over guide and rows gave."""

    row_R: Ints
    """The rows that were rated, ascending."""
    cosine_RN: Floats
    layers: range
    rows: list[RenderedRow]
    """The rows as they were read: in fast mode answers are cut short."""
    nll_R: Floats
    """Nats of each answer, given its prompt: the same forward pass knows it."""
    guide_likelihood_G: Floats
    """Of each guide row's answer, nats per token; [guide rows]."""
    guide_cosine_GN: Floats | None
    """Cosines of the guide's rows, each with the mean gradient of the others; None where not asked for."""
    tokens: int
    flops: float

    @property
    def likelihood_R(self) -> Floats:
        """Of each row's answer, nats per token."""
        return per_token(self.nll_R, self.rows)


def align(
    given: ResponseInput, layers: range, projections: Sequence[Projection], *, rate_guide: bool = False
) -> Aligned:
    """Pass over the guide, then over the wanted rows.

    Args:   rate_guide: whether the guide's rows are to be rated, too.

    Raises: Diverged if a gradient is not finite.
    """
    alignment = Alignment(given, layers, projections, rate_guide=rate_guide)
    alignment.rate(given.wanted())
    return alignment.found()


class Alignment:
    """Passes over the guide once, then over rows, in as many parts as whoever asks likes."""

    def __init__(
        self, given: ResponseInput, layers: range, projections: Sequence[Projection], *, rate_guide: bool
    ) -> None:
        """Pass over the guide. Where its rows are to be rated, too, what the pass gave is held until all have passed."""
        self._given, self._layers, self._projections, self._rate_guide = given, layers, projections, rate_guide
        self._places = [(layer, name) for layer in layers for name in projections]
        self._guide = [_as_read(given, row) for row in given.guide]
        self._parts: list[_Part] = []
        self._done, self._total = 0, len(self._guide) + len(given.wanted())
        self._mean = MeanGradient()
        self._guide_cosine_GN: Floats | None = None
        if not rate_guide:
            self._guide_nll_G = self._passed(self._guide, lambda _: self._mean.add)
            return
        held = _Held(self._mean.add)
        self._guide_nll_G = self._passed(self._guide, held.of_rows)
        own = RowProducts(given.base, self._mean.gradient, layers, rows=len(self._guide))
        held.again(own.of_rows, given.base.device)
        self._guide_cosine_GN = own.cosines(left_out=True)

    def rate(self, row_R: Ints) -> None:
        """Pass over these rows. Raises Diverged if a gradient is not finite."""
        rows = [_as_read(self._given, self._given.rows[index]) for index in row_R]
        products = RowProducts(self._given.base, self._mean.gradient, self._layers, rows=len(rows))
        part = _Part(row_R, rows, self._passed(rows, products.of_rows), products.cosines())
        bad = np.flatnonzero(~np.isfinite(part.cosine_RN).all(axis=1))
        if len(bad):
            raise Diverged(
                f"The gradients of {len(bad)} rows are not finite.", rows=[int(row_R[row]) for row in bad[:20]]
            )
        self._parts.append(part)

    def found(self) -> Aligned:
        """Of all rows that were rated so far, in row order, and what they and the guide cost."""
        row_R = np.concatenate([part.row_R for part in self._parts])
        order_R = np.argsort(row_R)
        every = [row for part in self._parts for row in part.rows]
        rows = [every[place] for place in order_R]
        base = self._given.base
        sizes = [[(base.renderer.length(row), len(row.answer_ids)) for row in some] for some in (self._guide, rows)]
        return Aligned(
            row_R=row_R[order_R],
            cosine_RN=np.concatenate([part.cosine_RN for part in self._parts])[order_R],
            layers=self._layers,
            rows=rows,
            nll_R=np.concatenate([part.nll_R for part in self._parts])[order_R],
            guide_likelihood_G=per_token(self._guide_nll_G, self._guide),
            guide_cosine_GN=self._guide_cosine_GN,
            tokens=sum(length for length, _ in sizes[0] + sizes[1]),
            flops=flops.alignment(
                base.info,
                guide=sizes[0],
                rows=sizes[1],
                projections=self._projections,
                from_layer=self._layers.start,
                rate_guide=self._rate_guide,
            ),
        )

    def _passed(self, some: Sequence[RenderedRow], sink_of: Callable[[list[int]], Sink]) -> Floats:
        nll_R = np.zeros(len(some))
        for indices, nll_B in backward_passes(self._given.base, some, self._places, sink_of):
            nll_R[indices] = nll_B
            self._done += len(indices)
            self._given.progress(self._done, self._total, {})
        return nll_R


@dataclass(frozen=True, slots=True)
class _Part:
    row_R: Ints
    rows: list[RenderedRow]
    nll_R: Floats
    cosine_RN: Floats


def per_token(nll_R: Floats, rows: Sequence[RenderedRow]) -> Floats:
    """Likelihood of each answer, nats per token, from nats."""
    likelihood_R: Floats = -nll_R / [len(row.answer_ids) for row in rows]
    return likelihood_R


def _as_read(given: ResponseInput, row: Row) -> RenderedRow:
    rendered = given.base.renderer.render(row)
    if given.config.data.mode == "faithful":
        return rendered
    return replace(rendered, answer_ids=rendered.answer_ids[:FAST_ANSWER_TOKENS])


Sink = Callable[[Place, Tensor, Tensor], None]
"""Takes a projection's `cut_BTUE` and `other_BTD` (see `_sides`) as soon as backward reaches it."""


@contextmanager
def tap_gradients(base: BaseModel, places: Sequence[Place], sink: Sink) -> Iterator[None]:
    """Call `sink` for each projection during backward, although no weight asks for a gradient."""

    def tap(place: Place) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x_BTI = args[0].detach()
            if not output.requires_grad:
                output.requires_grad_()  # the graph starts here: nothing below needs a backward pass
            output.register_hook(lambda g_BTO: sink(place, *_sides(base, place[1], x_BTI, g_BTO)))

        return hook

    handles = [base.projection(*place).register_forward_hook(tap(place)) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sides(base: BaseModel, name: Projection, x_BTI: Tensor, g_BTO: Tensor) -> tuple[Tensor, Tensor]:
    """A projection's two factors, `cut_BTUE` and `other_BTD`: the one that heads cut is g for q, k, v and x for o.

    Where q, k and v share a module, the cut takes each unit's own outputs of it.
    """
    units = range(n_units(base.info, name))
    if name == "o":
        return x_BTI.unflatten(-1, (len(units), base.info.head_dim)), g_BTO
    own = [unit_rows(base.spec, base.info, name, unit) for unit in units]
    return torch.stack([g_BTO[..., rows.start : rows.stop] for rows in own], dim=2), x_BTI


def backward_passes(
    base: BaseModel, rendered: Sequence[RenderedRow], places: Sequence[Place], sink_of: Callable[[list[int]], Sink]
) -> Iterator[tuple[list[int], Floats]]:
    """Forward and backward over all rows in batches of similar length; yields each batch's rows and their nats."""
    lengths = [base.renderer.length(row) for row in rendered]
    budget = CPU_TOKENS if base.device.type == "cpu" else GPU_TOKENS
    for indices in token_budget_batches(lengths, budget):
        with torch.enable_grad(), tap_gradients(base, places, sink_of(indices)):
            nll_B, tokens_B = answer_nll(base, collate(base.renderer, rendered, indices))
            backward((nll_B / tokens_B).sum())
        yield indices, nll_B.detach().double().cpu().numpy()


class MeanGradient:
    """Sum over rows of each projection's gradient [U, E, D] (the mean's direction is all that a cosine needs), fp32."""

    def __init__(self) -> None:
        self.gradient: dict[Place, Tensor] = {}

    def add(self, place: Place, cut_BTUE: Tensor, other_BTD: Tensor) -> None:
        units, width = cut_BTUE.shape[2:]
        cut_NC = cut_BTUE.flatten(2).flatten(0, 1).float()
        gradient_UED = (cut_NC.T @ other_BTD.flatten(0, 1).float()).view(units, width, -1)
        if place in self.gradient:
            self.gradient[place] += gradient_UED
        else:
            self.gradient[place] = gradient_UED


class _Held:
    """The factors of some rows' gradients, in the host's memory: products with the mean of all rows need no second pass."""

    def __init__(self, first: Sink) -> None:
        """Args: first: takes them at once."""
        self._first = first
        self._factors: list[tuple[list[int], Place, Tensor, Tensor]] = []

    def of_rows(self, indices: list[int]) -> Sink:
        """A sink for a batch that holds these rows."""

        def hold(place: Place, cut_BTUE: Tensor, other_BTD: Tensor) -> None:
            self._factors.append((indices, place, cut_BTUE.cpu(), other_BTD.cpu()))
            self._first(place, cut_BTUE, other_BTD)

        return hold

    def again(self, sink_of: Callable[[list[int]], Sink], device: torch.device) -> None:
        """Give each batch to its sink, in the order in which backward did."""
        for indices, place, cut_BTUE, other_BTD in self._factors:
            sink_of(indices)(place, cut_BTUE.to(device), other_BTD.to(device))


class RowProducts:
    """Dot products with the mean gradient, and squared norms, of every row and head, summed over the projections."""

    def __init__(self, base: BaseModel, mean: dict[Place, Tensor], layers: range, *, rows: int) -> None:
        self._info, self._mean, self._first = base.info, mean, layers.start
        shape = (rows, len(layers), base.info.n_heads)
        self._dot_RLH = np.zeros(shape, dtype=np.float64)
        self._square_RLH = np.zeros(shape, dtype=np.float64)
        self._mean_square_LH = np.zeros(shape[1:], dtype=np.float64)
        for (layer, name), gradient_UED in mean.items():
            self._mean_square_LH[layer - self._first] += _per_head(
                self._info, name, gradient_UED.square().sum(dim=(1, 2))
            )

    def of_rows(self, indices: list[int]) -> Sink:
        """A sink for a batch that holds these rows."""

        def add(place: Place, cut_BTUE: Tensor, other_BTD: Tensor) -> None:
            layer, name = place[0] - self._first, place[1]
            mean_CD = self._mean[place].flatten(0, 1).to(other_BTD.dtype)
            along_BTUE = (other_BTD @ mean_CD.T).unflatten(-1, cut_BTUE.shape[2:])
            dot_BU = (cut_BTUE.float() * along_BTUE.float()).sum(dim=(1, 3))
            self._dot_RLH[indices, layer] += _per_head(self._info, name, dot_BU)
            self._square_RLH[indices, layer] += _per_head(self._info, name, gradient_squares(cut_BTUE, other_BTD))

        return add

    def cosines(self, *, left_out: bool = False) -> Floats:
        """[R, L * H]; 0 where the row or the guide does not move the head at all.

        left_out: the mean is a sum over these very rows, and each is taken out of it: <g, M - g> and |M - g|^2.
        """
        dot_RLH, mean_square_RLH = self._dot_RLH, self._mean_square_LH[None]
        if left_out:
            dot_RLH = self._dot_RLH - self._square_RLH
            mean_square_RLH = np.maximum(self._mean_square_LH - 2 * self._dot_RLH + self._square_RLH, 0.0)
        scale = np.sqrt(self._square_RLH * mean_square_RLH)
        # Through where=scale != 0, not scale > 0: a NaN gradient must stay a NaN, so that it is noticed.
        cosine_RLH = np.divide(dot_RLH, scale, out=np.zeros_like(scale), where=scale != 0)
        if left_out:  # a row that is nearly all of the sum leaves rounding behind
            np.clip(cosine_RLH, -1.0, 1.0, out=cosine_RLH)
        return cosine_RLH.reshape(len(cosine_RLH), math.prod(cosine_RLH.shape[1:]))  # not -1: there may be no row


def gradient_squares(cut_BTUE: Tensor, other_BTD: Tensor) -> Tensor:
    """Squared norm of `sum over t of cut_t other_t^T` for each row and unit, [B, U] fp32."""
    tokens, units, width = cut_BTUE.shape[1:]
    other_width = other_BTD.shape[-1]
    if tokens * (units * width + other_width) <= units * width * other_width:
        gram_BTT = (other_BTD @ other_BTD.mT).float()
        cut_BUTE = cut_BTUE.transpose(1, 2)
        return ((cut_BUTE @ cut_BUTE.mT).float() * gram_BTT[:, None]).sum(dim=(2, 3))
    # Long rows: forming one unit's [E, D] at a time takes fewer operations than all pairs of tokens.
    squares = [(cut_BTUE[:, :, unit].mT @ other_BTD).float().square().sum(dim=(1, 2)) for unit in range(units)]
    return torch.stack(squares, dim=1)


def _per_head(info: ModelInfo, name: Projection, value_U: Tensor) -> Floats:
    """Values of units (last axis) as values of query heads: a KV group's is given to each of its heads."""
    value = value_U.double().cpu().numpy()
    if name in HEAD_WISE:
        return np.asarray(value)
    return np.asarray(value[..., [group_of(info, head) for head in range(info.n_heads)]])
