"""Stage 1: two disjoint half-proxies make one map, and the base model never notices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from p2d.config import HEAD_SCORERS, HeadsConfig, JobConfig, Projection, TrainingConfig
from p2d.errors import Cancelled, DatasetTooSmall, EngineError
from p2d.head_maps import HeadMap
from p2d.identify import balanced_mean, half_proxies, identify_heads
from p2d.models import BaseModel
from p2d.rows import content_hash
from p2d.scorers import ScorerInput
from tests.factories import some_rows
from tests.p2d.test_slices import assert_same, weights_of

ROWS, GUIDE = some_rows(16), some_rows(4, first=100)


def config_for(scorer: str, *, seed: int = 0) -> JobConfig:
    return JobConfig(
        heads=HeadsConfig(scorer=scorer, proxy_rows=12, ratio=0.2),
        training=TrainingConfig(slices=("q", "k", "v") if scorer == "pad" else ("v", "o"), batch_size=3, seed=seed),
    )


def quiet(done: int, total: int, metrics: Mapping[str, float]) -> None:
    assert 0 <= done <= total


def mapped(base: BaseModel, scorer: str, *, seed: int = 0) -> HeadMap:
    return identify_heads(base, ROWS, GUIDE, config_for(scorer, seed=seed), quiet)


@pytest.mark.parametrize("scorer", HEAD_SCORERS)
def test_every_scorer_ranks_all_heads_and_leaves_the_base_bit_identical(tiny: BaseModel, scorer: str) -> None:
    before = weights_of(tiny)

    head_map = mapped(tiny, scorer)

    assert_same(weights_of(tiny), before)
    assert (head_map.n_layers, head_map.n_heads) == (3, 6)
    assert (head_map.scorer, head_map.model_digest) == (scorer, tiny.info.digest)
    assert head_map.dataset_hash == content_hash(ROWS)
    assert head_map.agreement(0.2).k == 4
    assert head_map.agreement(0.2).chance == pytest.approx(16 / 18)
    assert len({score for row in head_map.scores for score in row}) == (1 if scorer == "uniform" else 18)


def test_a_uniform_map_ranks_heads_by_their_place_and_is_no_more_reproducible_than_chance(tiny: BaseModel) -> None:
    head_map = mapped(tiny, "uniform")

    assert head_map.ranked() == [(layer, head) for layer in range(3) for head in range(6)]
    assert head_map.proxy is None
    for ratio in (0.2, 1.0):
        assert head_map.agreement(ratio).rank_correlation == 0.0
        assert head_map.agreement(ratio).top_k_overlap == head_map.agreement(ratio).k


def test_the_ratio_of_a_job_is_not_in_its_map(tiny: BaseModel) -> None:
    config = config_for("shift")
    other = replace(config, heads=replace(config.heads, ratio=0.5))

    maps = [identify_heads(tiny, ROWS, GUIDE, one, quiet) for one in (config, other)]

    assert maps[0] == maps[1]


def moved_projections(given: ScorerInput) -> torch.Tensor:
    """A scorer that notes which projections the proxy moved, in every layer."""
    proxy, layers = given.trained_proxy, range(given.info.n_layers)
    names: tuple[Projection, ...] = ("q", "k", "v", "o")
    MOVED.append({p for p in names if any(not torch.equal(proxy.base(la, p), proxy.trained(la, p)) for la in layers)})
    return torch.rand(given.info.n_layers, given.info.n_heads, generator=torch.Generator().manual_seed(given.seed))


MOVED: list[set[Projection]] = []


@pytest.mark.parametrize("slices", [("v", "o"), ("q", "k", "v"), ("o",)])
def test_a_proxy_trains_the_projections_of_the_recipe_and_no_other_weight(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch, slices: tuple[Projection, ...]
) -> None:
    monkeypatch.setitem(HEAD_SCORERS, "moved", f"{__name__}:moved_projections")
    MOVED.clear()
    config = config_for("moved")
    others = {name: value for name, value in weights_of(tiny).items() if not any(f"{p}_proj" in name for p in slices)}

    def untouched(done: int, total: int, metrics: Mapping[str, float]) -> None:
        assert_same({name: value for name, value in weights_of(tiny).items() if name in others}, others)

    identify_heads(tiny, ROWS, GUIDE, replace(config, training=replace(config.training, slices=slices)), untouched)

    assert [set(slices)] * 2 == MOVED


def test_attribution_accounts_for_the_held_out_decrease_of_both_halves(tiny: BaseModel) -> None:
    facts = mapped(tiny, "attribution").proxy

    assert facts is not None
    assert (facts.rows_per_half, facts.steps_per_half, facts.guide_rows) == (6, 2, 4)
    for after, explained in zip(facts.guide_loss_after, facts.explained_decrease, strict=True):
        assert after < facts.guide_loss_before
        assert explained == pytest.approx(facts.guide_loss_before - after, rel=0.11)


def test_the_same_seed_gives_the_same_map_and_another_seed_another(tiny: BaseModel) -> None:
    assert mapped(tiny, "attribution") == mapped(tiny, "attribution")
    assert mapped(tiny, "attribution").scores != mapped(tiny, "attribution", seed=1).scores


def test_half_proxies_are_disjoint_and_follow_the_seed() -> None:
    one, other = half_proxies(100, 41, 0)

    assert len(one) == len(other) == 20
    assert not set(one) & set(other)
    assert half_proxies(100, 41, 0) == (one, other) != half_proxies(100, 41, 1)


def test_too_few_rows_or_no_held_out_rows_are_refused(tiny: BaseModel) -> None:
    with pytest.raises(DatasetTooSmall) as caught:
        identify_heads(tiny, ROWS[:11], GUIDE, config_for("shift"), quiet)
    assert caught.value.facts == {"rows": 11, "needed": 12}

    with pytest.raises(EngineError):
        identify_heads(tiny, ROWS, [], config_for("shift"), quiet)


def test_a_cancelled_stage_leaves_the_base_bit_identical(tiny: BaseModel) -> None:
    before, config = weights_of(tiny), config_for("attribution")

    def stop(done: int, total: int, metrics: Mapping[str, float]) -> None:
        if done == 3:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        identify_heads(tiny, ROWS, GUIDE, config, stop)

    assert_same(weights_of(tiny), before)


def test_neither_half_decides_the_ranks_by_its_size_alone() -> None:
    small, large = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1000.0, 3000.0, 2500.0]])

    plain, balanced = (small + large) / 2, balanced_mean(small, large)

    assert plain.argsort().tolist() == large.argsort().tolist() != small.argsort().tolist()
    assert torch.equal(balanced_mean(small * 1024, large).argsort(), balanced.argsort())
    assert balanced.mean() == pytest.approx(float(plain.mean()))  # in the scores' own unit
    assert torch.equal(balanced_mean(small, torch.zeros(1, 3)), small)


def test_a_proxy_that_does_not_lower_held_out_loss_tries_a_lower_rate(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2d.identify.PROXY_RATES", (1e30, 1e-3))

    facts = mapped(tiny, "shift").proxy

    assert facts is not None
    assert facts.learning_rate == 1e-3
    assert all(after < facts.guide_loss_before for after in facts.guide_loss_after)


def test_progress_ends_at_its_total(tiny: BaseModel) -> None:
    seen: list[tuple[int, int]] = []

    identify_heads(tiny, ROWS, GUIDE, replace(config_for("attribution")), lambda d, t, m: seen.append((d, t)))

    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
