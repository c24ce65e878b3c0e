"""Head scorers: one contract for all, and each against its formula written out slowly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from p2d.arch.spec import group_of
from p2d.config import HEAD_SCORERS, WITHOUT_PROXY, Projection
from p2d.model_info import ModelInfo
from p2d.registry import load
from p2d.scorers import PathPoint, ScorerInput
from p2d.scorers.attribution import attribution
from p2d.scorers.relative_shift import relative_shift
from p2d.scorers.shift import shift

L, H, G, E, D = 2, 4, 2, 3, 12
INFO = ModelInfo(
    name="t",
    digest="d",
    model_type="llama",
    n_layers=L,
    n_heads=H,
    n_kv_groups=G,
    head_dim=E,
    hidden_size=D,
    intermediate_size=8,
    vocab_size=9,
    context_length=64,
    parameters=1,
    dtype="fp32",
)
SHAPES: dict[Projection, tuple[int, int, int]] = {"q": (H, E, D), "k": (G, E, D), "v": (G, E, D), "o": (H, E, D)}


@dataclass
class FakeProxy:
    """Random weights before and after, and a loss that is a given function of all trained weights."""

    projections: tuple[Projection, ...] = ("q", "k", "v", "o")
    curvature: float = 0.0
    asked: list[float] = field(default_factory=list)

    def _random(self, layer: int, projection: Projection, salt: int, scale: float) -> Tensor:
        generator = torch.Generator().manual_seed(hash((layer, ord(projection), salt)) % 2**31)
        return torch.randn(SHAPES[projection], generator=generator) * scale

    def base(self, layer: int, projection: Projection) -> Tensor:
        return self._random(layer, projection, 1, 0.5)

    def trained(self, layer: int, projection: Projection) -> Tensor:
        change = self._random(layer, projection, 2, 0.1) if projection in self.projections else 0.0
        return self.base(layer, projection) + change

    def moved(self, layer: int, projection: Projection, start: float, end: float) -> Tensor:
        return (self.trained(layer, projection) - self.base(layer, projection)) * (end - start)

    def at(self, fraction: float) -> PathPoint:
        """L = sum over weights of slope * d + curvature * d^3, d = distance from the base."""
        self.asked.append(fraction)
        loss, gradients = 0.0, {}
        for layer in range(L):
            for projection in self.projections:
                d = (self.trained(layer, projection) - self.base(layer, projection)) * fraction
                slope = self._random(layer, projection, 3, 1.0)
                loss += float((slope * d + self.curvature * d**3).double().sum())
                gradients[f"layers.{layer}.{projection}"] = slope + 3 * self.curvature * d**2
        return PathPoint(loss, gradients)


def given(proxy: FakeProxy | None) -> ScorerInput:
    return ScorerInput(INFO, proxy, seed=3)


def slice_of(weight_UED: Tensor, projection: Projection, head: int) -> Tensor:
    """The slice of a head [E, D], written out."""
    return weight_UED[head if projection in ("q", "o") else group_of(INFO, head)]


@pytest.mark.parametrize("name", HEAD_SCORERS)
def test_every_scorer_gives_finite_fp32_scores_for_all_heads_and_the_same_again(name: str) -> None:
    scorer = load(HEAD_SCORERS, name, what="head scorer", pointer="/heads/scorer")
    proxy = None if name in WITHOUT_PROXY else FakeProxy()

    one, other = scorer(given(proxy)), scorer(given(proxy))

    assert one.shape == (L, H)
    assert one.dtype == torch.float32
    assert torch.isfinite(one).all()
    assert torch.equal(one, other)
    assert len(one.unique()) == (1 if name == "uniform" else L * H)


def test_shift_is_the_norm_of_the_change_with_kv_shared_evenly() -> None:
    proxy = FakeProxy(projections=("q", "k", "v"))
    expected = torch.zeros(L, H)
    for layer in range(L):
        for head in range(H):
            squares: Mapping[str, float] = {
                p: float((slice_of(proxy.trained(layer, p) - proxy.base(layer, p), p, head)).square().sum())
                for p in ("q", "k", "v")
            }
            expected[layer, head] = (squares["q"] + (squares["k"] + squares["v"]) / (H // G)) ** 0.5

    torch.testing.assert_close(shift(given(proxy)), expected)


def test_relative_shift_is_the_norm_of_the_change_over_the_norm_of_the_base_slices() -> None:
    proxy = FakeProxy(projections=("v", "o"))
    expected = torch.zeros(L, H)
    for layer in range(L):
        for head in range(H):
            change = size = 0.0
            shares: dict[Projection, int] = {"v": H // G, "o": 1}
            for p, share in shares.items():
                base = slice_of(proxy.base(layer, p), p, head)
                size += float(base.square().sum()) / share
                change += float((slice_of(proxy.trained(layer, p), p, head) - base).square().sum()) / share
            expected[layer, head] = (change / size) ** 0.5

    torch.testing.assert_close(relative_shift(given(proxy)), expected)


def test_attribution_is_the_trapezoid_of_gradient_times_movement_per_slice() -> None:
    proxy = FakeProxy()
    start, end = proxy.at(0).gradients, proxy.at(1).gradients
    expected = torch.zeros(L, H)
    projections: tuple[Projection, ...] = ("q", "k", "v", "o")
    for layer in range(L):
        for head in range(H):
            for p in projections:
                mean = (start[f"layers.{layer}.{p}"] + end[f"layers.{layer}.{p}"]) / 2
                earned = -(mean * (proxy.trained(layer, p) - proxy.base(layer, p)))
                share = 1 if p in ("q", "o") else H // G
                expected[layer, head] += float(slice_of(earned, p, head).sum()) / share

    torch.testing.assert_close(attribution(given(proxy)), expected)


@pytest.mark.parametrize("curvature", [0.0, 200.0])
def test_attribution_sums_to_the_loss_decrease_and_takes_more_points_where_the_path_bends(curvature: float) -> None:
    proxy = FakeProxy(curvature=curvature)

    scores = attribution(given(proxy))

    decrease = proxy.at(0).loss - proxy.at(1).loss
    assert float(scores.sum()) == pytest.approx(decrease, rel=0.1)
    assert (0.5 in proxy.asked) == (curvature > 0)
