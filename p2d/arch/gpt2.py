"""GPT-2 (`model_type: gpt2`): q, k and v stacked in one weight, weights stored [in, out], biases everywhere, no gate."""

from __future__ import annotations

from p2d.arch.spec import ArchSpec, ConfigKeys

GPT2 = ArchSpec(
    backbone="transformer",
    layers="transformer.h",
    lm_head="lm_head",
    q="transformer.h.{}.attn.c_attn",
    k="transformer.h.{}.attn.c_attn",
    v="transformer.h.{}.attn.c_attn",
    o="transformer.h.{}.attn.c_proj",
    layout="stacked",
    transposed=True,
    embedding="transformer.wte",
    positions="transformer.wpe",
    mlp_in=("transformer.h.{}.mlp.c_fc",),
    mlp_out="transformer.h.{}.mlp.c_proj",
    mlp_matrices=2,
    config=ConfigKeys(
        n_layers="n_layer",
        n_heads="n_head",
        hidden_size="n_embd",
        intermediate_size="n_inner",
        context_length="n_positions",
        mlp_ratio=4,
        tied=True,
        refused=("add_cross_attention",),
    ),
)
