"""OLMo 2 (`model_type: olmo2`): as Llama; the norms of q and k run over all heads at once, so a head's change reaches others."""

from __future__ import annotations

from p2d.arch.spec import ArchSpec

OLMO2 = ArchSpec(
    backbone="model",
    layers="model.layers",
    lm_head="lm_head",
    q="model.layers.{}.self_attn.q_proj",
    k="model.layers.{}.self_attn.k_proj",
    v="model.layers.{}.self_attn.v_proj",
    o="model.layers.{}.self_attn.o_proj",
)
