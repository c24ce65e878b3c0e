"""The law of slices: only they move, by the very gradient that full training would have given them.

Equal means equal bits here. That needs matrix products that sum in the same order for some rows as for all, which the
BLAS of torch's x86 wheels does from 16 rows on; elsewhere the last bit may differ and `assert_equal` allows for it.
"""

from __future__ import annotations

import copy
import platform
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from p2d.arch.spec import group_of, unit_view
from p2d.batches import answer_nll, collate
from p2d.config import Projection
from p2d.models import BaseModel, load_base_model
from p2d.rendering import RenderedRow
from p2d.slices import HeadSlices, all_heads

HEADS = [(1, 0), (1, 4), (2, 5)]
ALL: tuple[Projection, ...] = ("q", "k", "v", "o")


def weights_of(base: BaseModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in base.module.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_equal(one: Tensor, other: Tensor, what: str) -> None:
    if platform.machine() == "x86_64":
        assert torch.equal(one, other), what
    else:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def mean_loss(base: BaseModel, rows: list[RenderedRow]) -> Tensor:
    nll_B, tokens_B = answer_nll(base, collate(base.renderer, rows, range(len(rows))))
    return nll_B.sum() / tokens_B.sum()


@pytest.mark.parametrize("heads", [HEADS, "all"])
def test_slice_gradients_are_the_masked_full_gradients(
    tiny: BaseModel, rendered: list[RenderedRow], heads: list[tuple[int, int]] | str
) -> None:
    chosen = all_heads(tiny) if isinstance(heads, str) else heads
    full: dict[str, Tensor] = {}
    for layer, projection in {(layer, projection) for layer, _ in chosen for projection in ALL}:
        tiny.weight(layer, projection).requires_grad_(True)
    mean_loss(tiny, rendered).backward()
    for layer, projection in {(layer, projection) for layer, _ in chosen for projection in ALL}:
        weight = tiny.weight(layer, projection)
        assert weight.grad is not None
        full[f"layers.{layer}.{projection}"] = weight.grad
        weight.grad = None
        weight.requires_grad_(False)

    with HeadSlices(tiny, chosen, ALL) as slices:
        mean_loss(tiny, rendered).backward()
        gradients = slices.gradients()

    for site in slices.sites:
        expected_UED = unit_view(tiny.spec, tiny.info, site.projection, full[site.key])[list(site.units)]
        assert_equal(gradients[site.key], expected_UED, site.key)


def test_no_full_size_gradient_and_none_below_the_shallowest_chosen_layer(
    tiny: BaseModel, rendered: list[RenderedRow]
) -> None:
    needs_graph: dict[int, bool] = {}
    layers = tiny.module.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda _m, _a, out, n=number: needs_graph.update({n: out.requires_grad}))

    with HeadSlices(tiny, [(1, 0), (2, 3)], ALL) as slices:
        mean_loss(tiny, rendered).backward()

    assert needs_graph == {0: False, 1: True, 2: True}
    assert [name for name, weight in tiny.module.named_parameters() if weight.grad is not None] == []
    assert all(master.grad is not None for master in slices.parameters())


def test_thirty_adamw_steps_equal_a_masked_twin_that_decays_slices_only(
    tiny: BaseModel, rendered: list[RenderedRow]
) -> None:
    rate, decay = 1e-2, 0.1
    twin = copy.deepcopy(tiny)
    with HeadSlices(tiny, HEADS, ALL) as slices:
        masks = {(s.layer, s.projection): torch.zeros_like(tiny.weight(s.layer, s.projection)) for s in slices.sites}
        for s in slices.sites:
            unit_view(tiny.spec, tiny.info, s.projection, masks[s.layer, s.projection])[list(s.units)] = 1.0
        optimizer = torch.optim.AdamW(slices.parameters(), lr=rate, weight_decay=decay)
        for _ in range(30):
            mean_loss(tiny, rendered).backward()
            optimizer.step()
            slices.zero_grad()
            slices.sync()
        ours = weights_of(tiny)

    weights = {at: twin.weight(*at).requires_grad_(True) for at in masks}
    masked = torch.optim.AdamW(weights.values(), lr=rate, weight_decay=0.0)
    for _ in range(30):
        mean_loss(twin, rendered).backward()
        with torch.no_grad():
            for at, weight in weights.items():
                assert weight.grad is not None
                weight.grad *= masks[at]
                weight.copy_(torch.where(masks[at] == 1, weight * (1 - rate * decay), weight))
        masked.step()
        masked.zero_grad()

    for name, expected in weights_of(twin).items():
        assert_equal(ours[name], expected, name)


def test_leaving_the_context_puts_the_base_back_bit_for_bit_even_after_an_error(tiny: BaseModel) -> None:
    before = weights_of(tiny)

    def fail_inside() -> None:
        with HeadSlices(tiny, HEADS, ALL) as slices:
            for master in slices.parameters():
                nn.init.normal_(master)
            slices.sync()
            assert not torch.equal(tiny.weight(1, "q"), before["model.layers.1.self_attn.q_proj.weight"])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()

    assert_same(weights_of(tiny), before)
    assert "forward" not in vars(tiny.projection(1, "q"))


def test_slices_of_a_shared_kv_group_count_once(tiny: BaseModel) -> None:
    info = tiny.info
    assert [group_of(info, head) for head in range(6)] == [0, 0, 0, 1, 1, 1]

    same_group = HeadSlices(tiny, [(0, 0), (0, 1)], ALL)
    two_groups = HeadSlices(tiny, [(0, 0), (0, 3)], ALL)

    one_slice = info.head_dim * info.hidden_size
    assert same_group.n_parameters == (2 + 1 + 1 + 2) * one_slice
    assert two_groups.n_parameters == (2 + 2 + 2 + 2) * one_slice
    assert same_group.units == [(0, "q", 0), (0, "q", 1), (0, "k", 0), (0, "v", 0), (0, "o", 0), (0, "o", 1)]


def test_under_bf16_weights_the_masters_stay_fp32_and_small_steps_are_not_lost(tiny_dir: Path) -> None:
    base = load_base_model(tiny_dir, precision="bf16", device="cpu")

    with HeadSlices(base, [(0, 0)], ("v",)) as slices:
        (master,) = slices.parameters()
        start = master.detach().clone()
        with torch.no_grad():
            for _ in range(1000):
                master.add_(1e-6)  # each far below the spacing of bf16 near 0.2
        slices.sync()
        moved = base.units(0, "v")[:1]

        assert master.dtype == torch.float32
        assert float((master.detach() - start).mean()) == pytest.approx(1e-3, rel=1e-2)
        assert torch.equal(moved, (start + (master.detach() - start)).bfloat16())
        assert torch.equal(slices.state()["layers.0.v"], moved)


def test_logits_are_computed_at_answer_positions_alone(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    positions: list[int] = []
    tiny.module.get_submodule("lm_head").register_forward_hook(
        lambda _m, given, _o: positions.append(given[0].shape[0])
    )

    mean_loss(tiny, rendered)

    assert positions == [sum(len(row.answer_ids) for row in rendered)]
