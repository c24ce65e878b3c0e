"""GPT-NeoX and Pythia (`model_type: gpt_neox`): one weight with q, k and v of the first head, then of the second; no gate."""

from __future__ import annotations

from p2d.arch.spec import ArchSpec

GPT_NEOX = ArchSpec(
    backbone="gpt_neox",
    layers="gpt_neox.layers",
    lm_head="lm_head",
    q="gpt_neox.layers.{}.attention.query_key_value",
    k="gpt_neox.layers.{}.attention.query_key_value",
    v="gpt_neox.layers.{}.attention.query_key_value",
    o="gpt_neox.layers.{}.attention.dense",
    layout="interleaved",
    mlp_matrices=2,
)
