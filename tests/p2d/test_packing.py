"""Rows in one line give the loss and gradients of rows apart, on every road, and no mask over the line is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from p2d import packing
from p2d.arch import ARCHS
from p2d.batches import Batch, answer_nll, collate, pack, packed_batches
from p2d.models import BaseModel, load_base_model
from p2d.packing import line_of, window_mask
from p2d.rendering import RenderedRow
from tests.factories import some_rows, tiny_model_dir

ORDER = [3, 0, 4, 7, 1, 9]


def loss_and_gradients(base: BaseModel, batches: Sequence[Batch]) -> tuple[Tensor, list[Tensor]]:
    """Losses of all rows in turn, and their sum's gradients for the first and last layer's q and v."""
    paths = sorted({base.spec.weight_name(layer, name) for layer in (0, base.info.n_layers - 1) for name in ("q", "v")})
    weights = [base.module.get_parameter(path) for path in paths]
    for weight in weights:
        weight.requires_grad_(True)
    nll = torch.cat([answer_nll(base, batch)[0] for batch in batches])
    gradients = torch.autograd.grad(nll.sum(), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return nll.detach(), list(gradients)


def assert_close(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]], rel: float) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rel, atol=0.0)
    for gradient, other in zip(found[1], expected[1], strict=True):
        assert float((gradient - other).norm() / other.norm()) < rel


def check_packing(base: BaseModel, rows: list[RenderedRow], rel: float = 1e-5) -> None:
    """The line equals rows alone and rows padded."""
    line = loss_and_gradients(base, [pack(base.renderer, rows, ORDER)])

    assert_close(line, loss_and_gradients(base, [collate(base.renderer, rows, ORDER)]), rel)
    assert_close(line, loss_and_gradients(base, [collate(base.renderer, rows, [row]) for row in ORDER]), rel)


@pytest.fixture(params=["one by one", "side by side"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Attention row by row, as on a CPU, and over padded groups of rows, as on other devices."""
    if request.param == "side by side":
        monkeypatch.setitem(packing.GROUP_PADDING, "cpu", 1.25)
    return str(request.param)


@pytest.fixture(scope="module", params=sorted(ARCHS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of each family; the windows of those that have one are a third of a row."""
    return tiny_model_dir(tmp_path_factory.mktemp("models") / request.param, family=request.param)


@pytest.mark.usefixtures("road")
def test_a_line_has_the_loss_and_gradients_of_its_rows_in_every_family(family: Path) -> None:
    base = load_base_model(family, precision="fp32", device="cpu")

    check_packing(base, [base.renderer.render(row) for row in some_rows(12)])


def test_a_bf16_line_has_the_loss_of_its_rows(tmp_path: Path) -> None:
    base = load_base_model(tiny_model_dir(tmp_path / "m"), precision="bf16", device="cpu")
    rows = [base.renderer.render(row) for row in some_rows(12)]

    check_packing(base, rows, rel=0.03)


def test_no_mask_over_the_line_is_built(
    tiny: BaseModel, rendered: list[RenderedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[object] = []

    def spy(*args: Any, **kwargs: Any) -> object:
        masks.append(args[4])
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setattr("p2d.attention.sdpa_mask", lambda **kwargs: pytest.fail("a mask was built"))
    monkeypatch.setattr("p2d.attention.sdpa_attention_forward", spy)

    answer_nll(tiny, pack(tiny.renderer, rendered, ORDER))

    lengths = {tiny.renderer.length(rendered[row]) for row in ORDER}
    assert masks == [None] * len(lengths) * tiny.info.n_layers


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from([1.0, 1.25, 99.0]))
def test_groups_take_every_token_of_a_line_once_and_give_it_back_in_order(lengths: list[int], padding: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(packing.GROUP_PADDING, "cpu", padding)
        line = line_of(lengths, torch.device("cpu"))
    total = sum(lengths)
    tokens_1HSE = torch.arange(total, dtype=torch.float32).view(1, 1, total, 1)

    out = line.attend(tokens_1HSE, tokens_1HSE, tokens_1HSE, None, lambda q, k, v, mask: q.transpose(1, 2))

    assert torch.equal(out, tokens_1HSE.transpose(1, 2))


def test_a_window_counts_the_token_itself() -> None:
    assert window_mask(4, 2, torch.device("cpu")).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 1000))
def test_lines_hold_every_row_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = packed_batches(lengths, budget)

    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= budget
    assert batches == packed_batches(lengths, budget)
