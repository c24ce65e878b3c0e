"""Scorers of a head's combined weights: against their formulas in fp64, reading only what changed, a layer at a time."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from p2d.arch.spec import group_of
from p2d.config import COMBINED_SCORERS, HEAD_SCORERS, HeadsConfig, JobConfig, Projection, TrainingConfig
from p2d.config_checks import check
from p2d.errors import ConfigError
from p2d.head_maps import spearman
from p2d.registry import load
from p2d.scorers import PathPoint, Scorer, ScorerInput
from tests.p2d.test_scorers import INFO, SHAPES, E, H, L

QKV: tuple[Projection, ...] = ("q", "k", "v")
SCORERS = sorted(COMBINED_SCORERS)


@dataclass
class SpyProxy:
    """Random weights; notes what is read, and how many layers' weights are held at once."""

    projections: tuple[Projection, ...] = QKV
    size: float = 0.5
    change: float = 0.01
    reads: Counter[str] = field(default_factory=Counter)
    most_layers: int = 0
    _held: list[tuple[int, weakref.ref[Tensor]]] = field(default_factory=list)

    def _weight(self, layer: int, projection: Projection, what: str) -> Tensor:
        generator = torch.Generator().manual_seed(100 * layer + ord(projection))
        shape = SHAPES[projection]
        weight: Tensor
        weight, change = torch.randn(2, *shape, generator=generator)
        weight *= self.size
        if what == "trained" and projection in self.projections:
            weight += change * self.change
        self.reads[f"{what} {projection}"] += 1
        self._held = [(one, tensor) for one, tensor in self._held if tensor() is not None]
        self._held.append((layer, weakref.ref(weight)))
        self.most_layers = max(self.most_layers, len({one for one, _ in self._held}))
        return weight

    def base(self, layer: int, projection: Projection) -> Tensor:
        return self._weight(layer, projection, "base")

    def trained(self, layer: int, projection: Projection) -> Tensor:
        return self._weight(layer, projection, "trained")

    def moved(self, layer: int, projection: Projection, start: float, end: float) -> Tensor:
        raise AssertionError("no loss has seen these scores")

    def at(self, fraction: float) -> PathPoint:
        raise AssertionError("no loss has seen these scores")


def scorer(name: str) -> Scorer:
    found: Scorer = load(HEAD_SCORERS, name, what="head scorer", pointer="/heads/scorer")
    return found


def scored(name: str, proxy: SpyProxy) -> Tensor:
    return scorer(name)(ScorerInput(INFO, proxy, seed=0))


def combined(proxy: SpyProxy, which: Callable[[int, Projection], Tensor], layer: int, head: int) -> Tensor:
    """W_q W_k^T W_v of one head from left to right, [D * E] fp64."""
    q, k, v = (
        which(layer, p)[head if p == "q" else group_of(INFO, head)].double().t() for p in QKV
    )  # each [D, E], as ALPS writes it
    return ((q @ k.t()) @ v).flatten()


def pad_of(before: Tensor, after: Tensor) -> float:
    difference = torch.softmax(before, dim=0) - torch.softmax(after, dim=0)
    running, total = 0.0, 0.0
    for value in difference.tolist():
        running += value
        total += abs(running)
    return total / len(difference)


def kl_of(before: Tensor, after: Tensor) -> float:
    log_before, log_after = torch.log_softmax(before, dim=0), torch.log_softmax(after, dim=0)
    return float((log_before.exp() * (log_before - log_after)).sum())


def cosine_of(before: Tensor, after: Tensor) -> float:
    return 1 - float(before @ after / (before.norm() * after.norm()))


FORMULAS = {"pad": pad_of, "kl": kl_of, "cosine": cosine_of}


@pytest.mark.parametrize("projections", [QKV, ("q",), ("k", "v"), ("v", "o")])
@pytest.mark.parametrize("name", SCORERS)
def test_a_score_is_its_formula_in_fp64(name: str, projections: tuple[Projection, ...]) -> None:
    proxy = SpyProxy(projections=projections)
    expected = torch.tensor(
        [
            [
                FORMULAS[name](combined(proxy, proxy.base, la, h), combined(proxy, proxy.trained, la, h))
                for h in range(H)
            ]
            for la in range(L)
        ]
    )

    torch.testing.assert_close(scored(name, proxy), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [0.1, 0.5])
@pytest.mark.parametrize("name", SCORERS)
def test_a_tiny_change_keeps_its_digits_and_its_order(name: str, size: float) -> None:
    """Doubling a change so small that it is linear doubles `pad` and quadruples the others, which are squares."""
    one = scored(name, SpyProxy(size=size, change=1e-5))
    double = scored(name, SpyProxy(size=size, change=2e-5))

    torch.testing.assert_close(double / one, torch.full((L, H), 2.0 if name == "pad" else 4.0), rtol=2e-2, atol=0)
    assert spearman(one.flatten().tolist(), double.flatten().tolist()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", SCORERS)
def test_a_layer_is_read_once_and_only_what_moved_is_read_twice(name: str) -> None:
    proxy = SpyProxy(projections=("v", "o"))

    scored(name, proxy)

    assert proxy.reads == {"base q": L, "base k": L, "base v": L, "trained v": L}
    assert proxy.most_layers == 1


@pytest.mark.parametrize("name", SCORERS)
def test_heads_whose_q_k_v_stood_still_score_zero_unread(name: str) -> None:
    proxy = SpyProxy(projections=("o",))

    assert not scored(name, proxy).any()
    assert not proxy.reads


@pytest.mark.parametrize("name", ["shift", "relative_shift"])
def test_slice_norms_read_what_was_trained_alone(name: str) -> None:
    proxy = SpyProxy(projections=("v", "o"))

    scored(name, proxy)

    assert proxy.reads == {f"{what} {p}": L for what in ("base", "trained") for p in ("v", "o")}
    assert proxy.most_layers <= 2  # one weight of the layer before is let go as the next is read


@pytest.mark.parametrize("name", SCORERS)
def test_no_matrix_of_model_width_by_model_width_is_formed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "q", (H, E, 500))
    for projection in ("k", "v"):
        monkeypatch.setitem(SHAPES, projection, (INFO.n_kv_groups, E, 500))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            largest = max(largest, made.numel() if isinstance(made, Tensor) else 0)
            return made

    watch: Any = Watch
    with watch():
        scorer(name)(ScorerInput(replace(INFO, hidden_size=500), SpyProxy(), seed=0))

    assert largest <= 2 * H * E * 500  # the fake weights themselves, drawn twice


def test_a_change_of_scale_alone_turns_nothing_but_moves_the_others() -> None:
    @dataclass
    class Scaled(SpyProxy):
        def trained(self, layer: int, projection: Projection) -> Tensor:
            return self.base(layer, projection) * (2 if projection == "q" else 1)

    assert float(scored("cosine", Scaled()).max()) < 1e-12
    assert float(scored("pad", Scaled()).min()) > 0
    assert float(scored("kl", Scaled()).min()) > 0


@pytest.mark.parametrize("name", ["cosine", "relative_shift"])
def test_a_head_without_weights_scores_zero(name: str) -> None:
    assert not scored(name, SpyProxy(size=0.0, change=0.0)).any()


@pytest.mark.parametrize("name", SCORERS)
def test_a_job_that_trains_nothing_they_see_is_refused(name: str) -> None:
    config = JobConfig(heads=HeadsConfig(scorer=name), training=TrainingConfig(slices=("o",)))

    with pytest.raises(ConfigError) as caught:
        check(config)

    assert [(error.code, error.pointer) for error in caught.value.errors] == [("config.scorer", "/heads/scorer")]
    check(replace(config, training=TrainingConfig(slices=("v", "o"))))
