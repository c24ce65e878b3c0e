"""A rank trains factors of each slice's change: by the chain rule, as values in the weight, and nothing else moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from p2d.adapters import load_adapter, save_adapter
from p2d.config import JobConfig, TrainingConfig
from p2d.config_checks import check_rank
from p2d.errors import ConfigError
from p2d.low_rank import SCALE, Factors
from p2d.models import BaseModel, load_base_model
from p2d.rendering import RenderedRow
from p2d.slices import HeadSlices, Site
from p2d.training import train
from tests.p2d.test_slices import ALL, HEADS, assert_same, mean_loss, weights_of
from tests.p2d.test_training import quiet

RANK = 3
CONFIG = JobConfig(training=TrainingConfig(slices=ALL, rank=RANK, epochs=3, learning_rate=3e-2, batch_size=3))


def factors_of(site: Site) -> Factors:
    assert isinstance(site.trained, Factors)
    return site.trained


def test_factors_take_the_gradient_of_their_product(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    with HeadSlices(tiny, HEADS, ALL) as slices:
        mean_loss(tiny, rendered).backward()
        gradients = slices.gradients()

    with HeadSlices(tiny, HEADS, ALL, RANK) as slices:
        generator = torch.Generator().manual_seed(1)
        for site in slices.sites:  # a step away from the start, where one factor is zero, yet at the same weights
            torch.nn.init.normal_(factors_of(site).B_UER, std=0.1, generator=generator)
        mean_loss(tiny, rendered).backward()
        found = slices.gradients()
        for site in slices.sites:
            B, A = (x.detach().clone().requires_grad_() for x in (factors_of(site).B_UER, factors_of(site).A_URD))
            (SCALE * torch.einsum("uer,urd->ued", B, A)).backward(gradients[site.key])
            torch.testing.assert_close(found[f"{site.key}.B"], B.grad, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(found[f"{site.key}.A"], A.grad, rtol=1e-5, atol=1e-8)


def test_factors_start_at_the_base_and_the_seed_decides_where_they_head(tiny: BaseModel) -> None:
    before = weights_of(tiny)
    with HeadSlices(tiny, HEADS, ALL, RANK, seed=1) as one:
        one.sync()
        assert_same(weights_of(tiny), before)
        again, other = HeadSlices(tiny, HEADS, ALL, RANK, seed=1), HeadSlices(tiny, HEADS, ALL, RANK, seed=2)

    assert_same(one.masters(), again.masters())
    assert not torch.equal(one.masters()["layers.1.q.A"], other.masters()["layers.1.q.A"])


def test_the_weight_holds_base_plus_product_and_only_factors_are_counted(tiny_dir: Path) -> None:
    base = load_base_model(tiny_dir, precision="bf16", device="cpu")
    with HeadSlices(base, HEADS, ALL, RANK) as slices:
        for _ in range(3):  # many roundings into the weight: none of them stays
            for parameter in slices.parameters():
                torch.nn.init.normal_(parameter)
            slices.sync()
        for site in slices.sites:
            change_UED = SCALE * (factors_of(site).B_UER @ factors_of(site).A_URD).detach()
            expected_UED = (site.base_UED.float() + change_UED).bfloat16()
            assert torch.equal(base.units(site.layer, site.projection)[list(site.units)], expected_UED)
            assert int(torch.linalg.matrix_rank(change_UED).max()) == RANK

    units = len(slices.units)
    assert slices.n_parameters == units * RANK * (16 + 96)


def test_training_by_rank_lowers_the_loss_and_moves_chosen_slices_alone(
    tiny: BaseModel, rendered: list[RenderedRow], tmp_path: Path
) -> None:
    before = weights_of(tiny)

    result = train(tiny, rendered[:9], rendered[9:], HEADS, CONFIG, quiet)
    assert_same(weights_of(tiny), before)
    manifest = save_adapter(
        tmp_path, base=tiny, heads=HEADS, projections=ALL, state=result.state, config=CONFIG, learning_rate=3e-2
    )
    load_adapter(tmp_path).apply(tiny)

    assert result.log[-1].loss < result.log[0].loss * 0.95
    assert (result.rank, result.n_parameters) == (RANK, manifest.parameters)
    with HeadSlices(tiny, HEADS, ALL) as slices:
        for site in slices.sites:
            site.weight_UED[list(site.units)] = 0
        after = weights_of(tiny)
        slices.restore()
    with HeadSlices(tiny, HEADS, ALL) as slices:
        for site in slices.sites:
            site.write(result.state[site.key] * 0)
            assert result.state[site.key].shape == site.base_UED.shape
        assert_same(weights_of(tiny), after)


def test_a_rank_above_the_head_width_is_refused_where_the_model_is_known() -> None:
    check_rank(CONFIG, head_dim=RANK)
    check_rank(JobConfig(), head_dim=RANK)

    with pytest.raises(ConfigError) as caught:
        check_rank(replace(CONFIG, training=replace(CONFIG.training, rank=RANK + 1)), head_dim=RANK)

    assert [(error.code, error.pointer) for error in caught.value.errors] == [("config.rank", "/training/rank")]
