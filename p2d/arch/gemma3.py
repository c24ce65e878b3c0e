"""Gemma 3, text only (`model_type: gemma3_text`): norms over each head of q and k, a head width of its own, windows by layer."""

from __future__ import annotations

from p2d.arch.spec import ArchSpec, ConfigKeys

GEMMA3_TEXT = ArchSpec(
    backbone="model",
    layers="model.layers",
    lm_head="lm_head",
    q="model.layers.{}.self_attn.q_proj",
    k="model.layers.{}.self_attn.k_proj",
    v="model.layers.{}.self_attn.v_proj",
    o="model.layers.{}.self_attn.o_proj",
    config=ConfigKeys(
        head_dim=256,
        windows="pattern",
        window=4096,
        tied=True,
        refused=("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"),
    ),
)
