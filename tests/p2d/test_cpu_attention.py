"""The short-row function is the attention that PyTorch's kernel computes, gradients included, and takes only its calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from p2d.attention import ATTENTION
from p2d.batches import answer_nll, collate
from p2d.cpu_attention import MAX_TOKENS, is_for_short_rows, short_causal_attention
from p2d.models import BaseModel, load_base_model
from tests.factories import some_rows, tiny_model_dir

SCALING = 0.35


def some_heads(tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(2, 6, tokens, 8), (2, 2, tokens, 8), (2, 2, tokens, 8)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v


def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients in float64 by PyTorch, keys and values repeated for each head."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    keys, values = (t.repeat_interleave(3, dim=1) for t in (k, v))
    out = functional.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=SCALING)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out).cumsum(-1))


@pytest.mark.parametrize("tokens", [2, 3, 17, 64])
def test_output_and_gradients_are_those_of_the_kernel(tokens: int) -> None:
    q, k, v = some_heads(tokens)

    out = short_causal_attention(q, k, v, SCALING)
    found = (out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out).cumsum(-1)))

    for value, expected in zip(found, exact(q, k, v), strict=True):
        assert float((value.detach().double() - expected).norm() / expected.norm()) < 0.01  # bf16: three digits


def test_inputs_are_left_as_they_were() -> None:
    q, k, v = some_heads(5)
    before = [t.detach().clone() for t in (q, k, v)]

    short_causal_attention(q, k, v, SCALING).sum().backward()

    assert all(torch.equal(t, kept) for t, kept in zip((q, k, v), before, strict=True))


def test_only_short_whole_bf16_rows_with_a_gradient_are_taken() -> None:
    q, k, v = some_heads(8)
    longer = some_heads(MAX_TOKENS + 1)

    assert is_for_short_rows(q, k, v, None, 0.0)
    assert not is_for_short_rows(q, k, v, torch.zeros(8, 8), 0.0)
    assert not is_for_short_rows(q, k, v, None, 0.1)
    assert not is_for_short_rows(q[:, :, -1:], k, v, None, 0.0)  # decoding with a cache
    assert not is_for_short_rows(*longer, None, 0.0)
    assert not is_for_short_rows(*some_heads(8, torch.float32), None, 0.0)
    with torch.no_grad():
        assert not is_for_short_rows(q, k, v, None, 0.0)


def test_a_bf16_model_has_the_loss_and_gradient_of_the_kernel(tmp_path: Path) -> None:
    base = load_base_model(tiny_model_dir(tmp_path / "m"), precision="bf16", device="cpu")

    ours, theirs = (loss_and_gradient(base, name) for name in (ATTENTION, "sdpa"))

    assert ours[0] == pytest.approx(theirs[0], rel=0.01)
    assert float(torch.nn.functional.cosine_similarity(ours[1].flatten(), theirs[1].flatten(), dim=0)) > 0.99


def loss_and_gradient(base: BaseModel, attention: str) -> tuple[float, Tensor]:
    base.module.set_attn_implementation(attention)
    weight = base.weight(0, "q")
    weight.requires_grad_(True)
    batch = collate(base.renderer, [base.renderer.render(row) for row in some_rows(4)], range(4))
    nll_B, _ = answer_nll(base, batch)
    nll_B.sum().backward()
    assert weight.grad is not None
    gradient, weight.grad = weight.grad.float(), None
    weight.requires_grad_(False)
    return float(nll_B.sum().detach()), gradient
