"""Qwen3 (`model_type: qwen3`): as Llama, with a norm over each head of q and k and a head width of its own."""

from __future__ import annotations

from p2d.arch.spec import ArchSpec, ConfigKeys

QWEN3 = ArchSpec(
    backbone="model",
    layers="model.layers",
    lm_head="lm_head",
    q="model.layers.{}.self_attn.q_proj",
    k="model.layers.{}.self_attn.k_proj",
    v="model.layers.{}.self_attn.v_proj",
    o="model.layers.{}.self_attn.o_proj",
    config=ConfigKeys(head_dim=128, windows="late_layers", window=4096),
)
