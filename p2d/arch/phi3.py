"""Phi-3, Phi-3.5 and Phi-4 (`model_type: phi3`): q, k and v stacked in one weight; every layer may attend to a window."""

from __future__ import annotations

from p2d.arch.spec import ArchSpec, ConfigKeys

PHI3 = ArchSpec(
    backbone="model",
    layers="model.layers",
    lm_head="lm_head",
    q="model.layers.{}.self_attn.qkv_proj",
    k="model.layers.{}.self_attn.qkv_proj",
    v="model.layers.{}.self_attn.qkv_proj",
    o="model.layers.{}.self_attn.o_proj",
    layout="stacked",
    mlp_in=("model.layers.{}.mlp.gate_up_proj",),
    config=ConfigKeys(windows="every_layer", longrope=("longrope", "su", "yarn"), short_context=4096),
)
