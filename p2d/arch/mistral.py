"""Mistral (`model_type: mistral`): as Llama; every layer attends to a sliding window where config.json gives one."""

from __future__ import annotations

from p2d.arch.spec import ArchSpec, ConfigKeys

MISTRAL = ArchSpec(
    backbone="model",
    layers="model.layers",
    lm_head="lm_head",
    q="model.layers.{}.self_attn.q_proj",
    k="model.layers.{}.self_attn.k_proj",
    v="model.layers.{}.self_attn.v_proj",
    o="model.layers.{}.self_attn.o_proj",
    config=ConfigKeys(windows="every_layer", window=4096),
)
