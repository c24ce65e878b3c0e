"""Causal attention with backward for short bf16 rows on a CPU: plain matrix products in place of PyTorch's kernel.

That kernel is made for long sequences: on 5 rows of 200 tokens its forward and backward took 34 ms on one core, these take
17 ms at the same error against float64, and break even at 512 tokens. It was a fifth of a training step of SmolLM2-135M.
All else (longer rows, fp32, no gradient, other devices) keeps the kernel. Scores are fp32: rounded to bf16, a score of 10
would be off by 3 % of its probability.

Legend: B batch, T token, H query head, G KV group, E head width, N = H / G * T query rows of one group.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MAX_TOKENS = 384
"""Longest row computed here; probabilities are kept for backward, [H, T, T] bf16 per row and layer."""


class ShortCausalAttention(torch.autograd.Function):
    """Softmax(q k^T scaling, causal) v in bf16, for whole rows without padding on the left."""

    @staticmethod
    def forward(ctx: Any, q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, scaling: float) -> Tensor:
        b, h, t, e = q_BHTE.shape
        groups = k_BGTE.shape[1]
        # The heads of a group stand below each other, so that its keys are used as they are, not repeated.
        q_BGNE = q_BHTE.reshape(b, groups, -1, e)
        score_BGNT = q_BGNE.float().mul_(scaling) @ k_BGTE.float().mT
        score_BGNT.view(b, groups, h // groups, t, t).add_(_future(t, score_BGNT.device))
        prob_BGNT = score_BGNT.softmax(-1).to(v_BGTE.dtype)
        out_BGNE = prob_BGNT @ v_BGTE
        ctx.scaling = scaling
        ctx.save_for_backward(q_BGNE, k_BGTE, v_BGTE, prob_BGNT, out_BGNE)
        return out_BGNE.view(b, h, t, e)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BGNE, k_BGTE, v_BGTE, prob_BGNT, out_BGNE = ctx.saved_tensors
        (g_BHTE,) = grads
        g_BGNE = g_BHTE.reshape(q_BGNE.shape)
        gv_BGTE = prob_BGNT.mT @ g_BGNE
        # Gradient of softmax: p (gp - sum p gp), where the sum over keys is g . out.
        inner_BGN1 = (g_BGNE.float() * out_BGNE).sum(-1, keepdim=True)
        gs_BGNT = (g_BGNE @ v_BGTE.mT).float().sub_(inner_BGN1).mul_(prob_BGNT).mul_(ctx.scaling).to(q_BGNE.dtype)
        gq_BGNE = gs_BGNT @ k_BGTE
        gk_BGTE = gs_BGNT.mT @ q_BGNE
        return gq_BGNE.view(g_BHTE.shape), gk_BGTE, gv_BGTE, None


@lru_cache(maxsize=64)
def _future(tokens: int, device: torch.device) -> Tensor:
    """-inf above the diagonal, [T, T] fp32."""
    return torch.full((tokens, tokens), float("-inf"), device=device).triu_(1)


def short_causal_attention(q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, scaling: float) -> Tensor:
    """The function with autograd; returns [B, H, T, E]."""
    apply: Any = ShortCausalAttention.apply
    out_BHTE: Tensor = apply(q_BHTE, k_BGTE, v_BGTE, scaling)
    return out_BHTE


def is_for_short_rows(q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether the call is one that `short_causal_attention` answers, and faster: see the top of this file."""
    tokens = q_BHTE.shape[2]
    whole = mask is None and tokens == k_BGTE.shape[2] and dropout == 0
    short = q_BHTE.device.type == "cpu" and q_BHTE.dtype == torch.bfloat16 and 1 < tokens <= MAX_TOKENS
    wanted = torch.is_grad_enabled() and (q_BHTE.requires_grad or k_BGTE.requires_grad or v_BGTE.requires_grad)
    return whole and short and wanted
