"""The attention function of every loaded model: SDPA, a faster way for short rows on CPUs, packed rows, trees, a probe.

It is registered with transformers by name. While a probe (`p2d.probe`) is on, it is shown every layer's queries and keys,
without changing a bit of the output. So there is no `output_attentions` (which forces the eager kernel and holds
[H, T, T] per layer), and no second pass. While a packed line (`p2d.packing`) is on, each row attends to itself alone; while
a tree (`p2d.branches`) is on, each branch attends to the trunk and itself.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from p2d.branches import active_tree
from p2d.cpu_attention import is_for_short_rows, short_causal_attention
from p2d.packing import active_line
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
    window: int | None = kwargs.get("sliding_window")
    if (probe := active_probe()) is not None:
        layer = module.layer_idx
        assert isinstance(layer, int)
        probe.read(layer, query, key, scaling, window)

    def attend(q_BHTE: Tensor, k_BGTE: Tensor, v_BGTE: Tensor, mask: Tensor | None) -> Tensor:
        if is_for_short_rows(q_BHTE, k_BGTE, v_BGTE, mask, kwargs.get("dropout", 0.0)):
            return short_causal_attention(q_BHTE, k_BGTE, v_BGTE, scaling).transpose(1, 2).contiguous()
        out_BTHE: Tensor = sdpa_attention_forward(module, q_BHTE, k_BGTE, v_BGTE, mask, **kwargs)[0]
        return out_BTHE

    if (tree := active_tree()) is not None:
        return tree.attend(query, key, value, window, attend), None
    if (line := active_line()) is not None:
        assert attention_mask is None
        assert active_probe() is None
        return line.attend(query, key, value, window, attend), None
    return attend(query, key, value, attention_mask), None


def _mask(**kwargs: Any) -> Tensor | None:
    """What transformers calls before the first layer: SDPA's mask; none for a line or a tree, which know who sees whom.

    And none for plain causal attention: while a CUDA graph is recorded transformers would make one that says just that.
    """
    if active_line() is not None or active_tree() is not None:
        return None
    if (
        kwargs["attention_mask"] is None
        and kwargs.get("local_size") is None
        and kwargs["q_length"] == kwargs["kv_length"]
    ):
        return None
    mask: Tensor | None = sdpa_mask(**kwargs)
    return mask


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
