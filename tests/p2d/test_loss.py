"""The chunked loss is cross-entropy, gradients included, and keeps no logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from p2d import loss
from p2d.loss import chunk_tokens, token_nll

N, D, V = 23, 12, 101


def some_tokens(dtype: torch.dtype = torch.float32, *, bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(D, V, bias=bias, dtype=dtype).requires_grad_(False)
    h_ND = torch.randn(N, D, dtype=dtype, requires_grad=True)
    return head, h_ND, torch.randint(V, (N,))


@pytest.fixture(autouse=True)
def _five_tokens_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 5 * 4 * V + 3)


@pytest.mark.parametrize("bias", [False, True])
def test_loss_and_gradient_are_those_of_plain_cross_entropy(bias: bool) -> None:
    head, h_ND, target_N = some_tokens(bias=bias)
    weight_N = torch.linspace(-1.0, 2.0, N)

    found_N = token_nll(head, h_ND, target_N)
    (gradient,) = torch.autograd.grad((found_N * weight_N).sum(), h_ND)

    expected_N = functional.cross_entropy(head(h_ND), target_N, reduction="none")
    (expected,) = torch.autograd.grad((expected_N * weight_N).sum(), h_ND)
    torch.testing.assert_close(found_N, expected_N)
    torch.testing.assert_close(gradient, expected)


def test_bf16_is_as_near_to_float64_as_plain_cross_entropy() -> None:
    head, h_ND, target_N = some_tokens(torch.bfloat16)
    exact = functional.cross_entropy(h_ND.double() @ head.weight.double().T, target_N, reduction="none")
    (expected,) = torch.autograd.grad(exact.sum(), h_ND)

    (gradient,) = torch.autograd.grad(token_nll(head, h_ND, target_N).sum(), h_ND)

    assert float((gradient.double() - expected.double()).norm() / expected.double().norm()) < 0.01


def saved_bytes(head: nn.Linear, h_ND: Tensor, target_N: Tensor) -> int:
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_nll(head, h_ND, target_N).sum().backward()
    return sum(sizes.values())


def test_what_is_kept_for_backward_does_not_grow_with_the_vocabulary() -> None:
    head, h_ND, target_N = some_tokens()

    assert saved_bytes(head, h_ND, target_N) == 4 * N * D  # one gradient of h; plain cross-entropy keeps 4 * N * V


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    head, h_ND, target_N = some_tokens()
    head.requires_grad_(True)

    token_nll(head, h_ND, target_N).sum().backward()

    assert head.weight.grad is not None
    assert float(head.weight.grad.norm()) > 0


def test_without_gradients_only_the_loss_is_computed() -> None:
    head, h_ND, target_N = some_tokens()
    with torch.no_grad():
        found_N = token_nll(head, h_ND, target_N)

    torch.testing.assert_close(found_N, functional.cross_entropy(head(h_ND), target_N, reduction="none").detach())
    assert not found_N.requires_grad


def test_a_chunk_holds_at_least_one_token() -> None:
    assert chunk_tokens(V, torch.device("cpu")) == 5
    assert chunk_tokens(10**9, torch.device("cpu")) == 1
