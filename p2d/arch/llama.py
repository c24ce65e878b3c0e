"""Llama and its look-alikes that say `model_type: llama` (SmolLM2, TinyLlama, ...): separate q, k, v, o; grouped queries."""

from __future__ import annotations

from p2d.arch.spec import ArchSpec

LLAMA = ArchSpec(
    backbone="model",
    layers="model.layers",
    lm_head="lm_head",
    q="model.layers.{}.self_attn.q_proj",
    k="model.layers.{}.self_attn.k_proj",
    v="model.layers.{}.self_attn.v_proj",
    o="model.layers.{}.self_attn.o_proj",
)
