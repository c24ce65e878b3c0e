"""The attention function of every loaded model: SDPA, a faster way for short rows on CPUs, and a probe of the mass.

It is registered with transformers by name. While a probe (`p2d.probe`) is on, it is shown every layer's queries and keys,
without changing a bit of the output. So there is no `output_attentions` (which forces the eager kernel and holds
[H, T, T] per layer), and no second pass.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from p2d.cpu_attention import is_for_short_rows, short_causal_attention
from p2d.probe import active_probe

ATTENTION = "p2d"
"""Name of the attention implementation; see `use_attention`."""


def use_attention(module: PreTrainedModel) -> None:
    """Make a model attend by this file's function."""
    module.set_attn_implementation(ATTENTION)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: [B, H, T, E] in, [B, T, H, E] out."""
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if (probe := active_probe()) is not None:
        layer = module.layer_idx
        assert isinstance(layer, int)
        probe.read(layer, query, key, scaling)
    if is_for_short_rows(query, key, value, attention_mask, kwargs.get("dropout", 0.0)):
        out_BHTE = short_causal_attention(query, key, value, scaling)
        return out_BHTE.transpose(1, 2).contiguous(), None
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
