"""What training holds besides the model, in bytes: trained numbers, their gradients and AdamW's moments, exactly.

The twin of "less memory": counted, not timed. At SmolLM2-135M's shapes nothing is computed and no weight exists.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from p2d.arch.llama import LLAMA
from p2d.arch.spec import n_units
from p2d.config import Projection
from p2d.model_info import ModelInfo
from p2d.models import BaseModel
from p2d.optimization import Schedule, SliceTrainer
from p2d.rendering import RenderedRow
from p2d.slices import HeadSlices
from tests.p2d.test_slices import ALL, HEADS

PER_NUMBER = 4 * 4
"""Bytes per trained number: master, gradient and AdamW's two moments, all fp32."""

SMOLLM2 = ModelInfo(
    name="SmolLM2-135M",
    digest="",
    model_type="llama",
    n_layers=30,
    n_heads=9,
    n_kv_groups=3,
    head_dim=64,
    hidden_size=576,
    intermediate_size=1536,
    vocab_size=49152,
    context_length=8192,
    parameters=134_515_008,
    dtype="bf16",
)


@pytest.fixture(scope="module")
def smollm2() -> BaseModel:
    """A model of those shapes without a single value."""
    config = LlamaConfig(
        vocab_size=SMOLLM2.vocab_size,
        hidden_size=SMOLLM2.hidden_size,
        intermediate_size=SMOLLM2.intermediate_size,
        num_hidden_layers=SMOLLM2.n_layers,
        num_attention_heads=SMOLLM2.n_heads,
        num_key_value_heads=SMOLLM2.n_kv_groups,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        module: Any = LlamaForCausalLM(config)
    module.to(torch.bfloat16)
    assert sum(weight.numel() for weight in module.parameters()) == SMOLLM2.parameters
    unasked: Any = None  # nothing is rendered
    return BaseModel(SMOLLM2, LLAMA, module, unasked, torch.device("meta"), torch.bfloat16, 0.0)


def random_tenth(seed: int) -> list[tuple[int, int]]:
    heads = [(layer, head) for layer in range(SMOLLM2.n_layers) for head in range(SMOLLM2.n_heads)]
    return random.Random(seed).sample(heads, 27)


def state_bytes(slices: HeadSlices) -> int:
    return PER_NUMBER * slices.n_parameters


def masked_bytes(projections: tuple[Projection, ...]) -> int:
    """Masked training holds whole matrices of every layer: the mask comes after the gradient."""
    units = sum(n_units(SMOLLM2, projection) for projection in projections)
    return PER_NUMBER * SMOLLM2.n_layers * units * SMOLLM2.head_dim * SMOLLM2.hidden_size


@pytest.mark.parametrize("rank", [None, 2])
def test_a_step_holds_four_fp32_numbers_per_trained_number_and_nothing_else(
    tiny: BaseModel, rendered: list[RenderedRow], rank: int | None
) -> None:
    with HeadSlices(tiny, HEADS, ALL, rank) as slices:
        trainer = SliceTrainer(tiny, slices, rendered, batch_size=4, seed="0")
        trainer.advance(Schedule(1e-3, 10))
        moments = [
            value for state in trainer.optimizer.state.values() for name, value in state.items() if name != "step"
        ]
        trainer.gradient(rendered)
        gradients = [parameter.grad for parameter in slices.parameters() if parameter.grad is not None]
        held = [*slices.parameters(), *gradients, *moments]

        assert sum(tensor.nbytes for tensor in held) == state_bytes(slices)
        assert all(weight.grad is None for weight in tiny.module.parameters())


# Heads of one KV group share its k and v, so slices, and the ratios, depend on which heads were chosen. Drawn at random
# the median is 47.4 and 5.8 for q, k, v, and 70.2 and 6.9 for v, o; 45.0, 5.6, 67.6 and 6.7 if no two share a group.
@pytest.mark.parametrize("seed", range(5))
def test_a_tenth_of_the_heads_holds_a_45th_of_full_and_a_fifth_of_masked_training(
    smollm2: BaseModel, seed: int
) -> None:
    full = PER_NUMBER * SMOLLM2.parameters
    qkv = state_bytes(HeadSlices(smollm2, random_tenth(seed), ("q", "k", "v")))
    vo = state_bytes(HeadSlices(smollm2, random_tenth(seed), ("v", "o")))

    assert full / qkv > 45
    assert masked_bytes(("q", "k", "v")) / qkv > 5.5
    assert full / vo > 67
    assert masked_bytes(("v", "o")) / vo > 6.6


def test_factors_of_rank_8_hold_a_seventh_of_whole_slices(smollm2: BaseModel) -> None:
    heads = random_tenth(0)
    ratio = state_bytes(HeadSlices(smollm2, heads, ("v", "o"))) / state_bytes(HeadSlices(smollm2, heads, ("v", "o"), 8))

    assert ratio == pytest.approx(64 * 576 / (8 * (64 + 576)))
