"""Cross-entropy of tokens from their hidden states, without ever holding all their logits.

Logits are made in chunks, each used for the loss and, where the hidden states want one, for its gradient, then dropped: what
is kept for backward is [N, D], not [N, V] three times over. The head is frozen; one that is trained takes the plain way.

Legend: N token, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK_BYTES = {"cpu": 32 << 20}
"""fp32 logits of one chunk, by device type."""
OTHER_CHUNK_BYTES = 256 << 20
"""Large enough to fill a GPU. A guess."""


class FrozenHeadLoss(torch.autograd.Function):
    """-log softmax(h W^T + b)[target] of each token, fp32 [N]; its gradient to h is made in the forward pass.

    Source: the idea is that of Liger Kernel's fused linear cross-entropy; here the head is frozen and losses stay apart,
    so that each token's gradient is kept unscaled and backward is one multiplication.
    """

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None, target_N: Tensor) -> Tensor:
        loss_N = torch.empty(len(h_ND), dtype=torch.float32, device=h_ND.device)
        grad_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        size = chunk_tokens(W_VD.shape[0], h_ND.device)
        for start in range(0, len(h_ND), size):
            part = slice(start, start + size)
            logit_NV = functional.linear(h_ND[part], W_VD, b_V).float()
            loss_N[part] = functional.cross_entropy(logit_NV, target_N[part], reduction="none")
            if grad_ND is not None:
                grad_NV = logit_NV.softmax(-1)
                grad_NV[torch.arange(len(grad_NV), device=grad_NV.device), target_N[part]] -= 1
                grad_ND[part] = grad_NV.to(W_VD.dtype) @ W_VD
        ctx.save_for_backward(grad_ND)
        return loss_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        (g_N,) = grads
        return (grad_ND.float() * g_N[:, None]).to(grad_ND.dtype), None, None, None


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Tokens of one chunk: as many as CHUNK_BYTES of fp32 logits hold, at least 1."""
    return max(1, CHUNK_BYTES.get(device.type, OTHER_CHUNK_BYTES) // (4 * vocabulary))


def token_nll(head: nn.Module, h_ND: Tensor, target_N: Tensor) -> Tensor:
    """Negative log-likelihood of each target, fp32 [N] in nats; with gradients to `h_ND`, and to a head that is trained.

    Args: head: the model's own; its output is taken as the logits, as families with a cap on them are not supported.
    """
    if type(head) is not nn.Linear or head.weight.requires_grad or head._forward_hooks or head._forward_pre_hooks:
        return functional.cross_entropy(head(h_ND).float(), target_N, reduction="none")
    apply: Any = FrozenHeadLoss.apply
    nll_N: Tensor = apply(h_ND, head.weight, head.bias, target_N)
    return nll_N
