"""GPT-NeoX and Pythia (`model_type: gpt_neox`): one weight with q, k and v of the first head, then of the second; no gate."""

from __future__ import annotations

from p2d.arch.spec import ArchSpec

GPT_NEOX = ArchSpec(
    backbone="gpt_neox",
    layers="gpt_neox.layers",
    lm_head="lm_head",
    lm_head_in_files="embed_out",
    q="gpt_neox.layers.{}.attention.query_key_value",
    k="gpt_neox.layers.{}.attention.query_key_value",
    v="gpt_neox.layers.{}.attention.query_key_value",
    o="gpt_neox.layers.{}.attention.dense",
    layout="interleaved",
    embedding="gpt_neox.embed_in",
    mlp_in=("gpt_neox.layers.{}.mlp.dense_h_to_4h",),
    mlp_out="gpt_neox.layers.{}.mlp.dense_4h_to_h",
    mlp_matrices=2,
)
