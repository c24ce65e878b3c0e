"""Qwen2 and Qwen2.5 (`model_type: qwen2`): as Llama, with biases on q, k and v, which stay frozen; late layers may have windows."""

from __future__ import annotations

from p2d.arch.spec import ArchSpec, ConfigKeys

QWEN2 = ArchSpec(
    backbone="model",
    layers="model.layers",
    lm_head="lm_head",
    q="model.layers.{}.self_attn.q_proj",
    k="model.layers.{}.self_attn.k_proj",
    v="model.layers.{}.self_attn.v_proj",
    o="model.layers.{}.self_attn.o_proj",
    config=ConfigKeys(windows="late_layers", window=4096),
)
