"""SmolLM3 (`model_type: smollm3`): as Llama; every fourth layer has no rotary positions and may have a window instead."""

from __future__ import annotations

from p2d.arch.spec import ArchSpec, ConfigKeys

SMOLLM3 = ArchSpec(
    backbone="model",
    layers="model.layers",
    lm_head="lm_head",
    q="model.layers.{}.self_attn.q_proj",
    k="model.layers.{}.self_attn.k_proj",
    v="model.layers.{}.self_attn.v_proj",
    o="model.layers.{}.self_attn.o_proj",
    config=ConfigKeys(windows="layers_without_rope", tied=True),
)
