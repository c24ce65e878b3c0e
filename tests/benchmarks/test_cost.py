"""AER in operations, exactly: what the cost table says of SmolLM2 on GSM8K, and that a job foresees what it will spend."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cost import JOBS, full_flops, job_flops, lora_flops, padding_factor, peers_flops
from benchmarks.workbench import Workbench
from p2d.model_info import ModelInfo
from tests.factories import some_rows
from tests.p2d.test_estimate import SMOLLM2

AERS = {job.name: sum(job_flops(SMOLLM2, job, 3).values()) / full_flops(SMOLLM2, 3) for job in JOBS}


def test_the_former_default_recipe_reaches_its_targets_at_three_epochs() -> None:
    assert AERS["recipe default, faithful"] <= 0.25
    assert 0.099 < AERS["recipe default, fast"] <= 0.10  # though each of four shards passes over the guide


def test_the_recipe_of_the_paper_needs_ten_demonstrations_to_reach_its_target() -> None:
    # Reading every row once at full depth is 0.11, three queries for five rows make it 0.19, training adds 0.07.
    assert 0.25 < AERS["recipe paper, faithful"] < 0.27
    assert AERS["recipe paper, faithful, 10 demos"] <= 0.25


def test_the_recipe_of_the_paper_misses_the_fast_target() -> None:
    # Its pool takes 0.043, its training 0.068.
    assert 0.10 < AERS["recipe paper, fast"] < 0.12


def test_choosing_costs_most_of_it_and_less_the_more_epochs_follow() -> None:
    job = JOBS[0]
    by_epochs = [
        {step: count / full_flops(SMOLLM2, epochs) for step, count in job_flops(SMOLLM2, job, epochs).items()}
        for epochs in (1, 3, 5)
    ]

    assert [part["train"] for part in by_epochs] == pytest.approx([by_epochs[0]["train"]] * 3)
    assert [part["respond"] for part in by_epochs] == pytest.approx([by_epochs[0]["respond"] / e for e in (1, 3, 5)])


def test_the_alternatives_stand_in_their_known_order() -> None:
    assert lora_flops(SMOLLM2, 3) < full_flops(SMOLLM2, 3) < 1.6 * lora_flops(SMOLLM2, 3)
    assert peers_flops(SMOLLM2, 3) / full_flops(SMOLLM2, 3) > 1.5 * AERS["recipe paper, faithful"]


def test_padding_is_what_random_batches_waste(tiny_dir: Path, tmp_path: Path) -> None:
    def factor(count: int, copies: int) -> float:
        rows = [row for row in some_rows(count) for _ in range(copies)]
        return padding_factor(Workbench(tiny_dir, rows, 4, 1, "cpu", tmp_path))

    assert factor(1, 8) == 1
    assert 1 < factor(12, 1) < 2


def test_a_larger_model_has_the_same_shape_of_cost() -> None:
    llama: ModelInfo = replace(
        SMOLLM2, n_layers=32, n_heads=32, n_kv_groups=8, head_dim=128, hidden_size=4096, intermediate_size=14336,
        vocab_size=128256,
    )  # fmt: skip

    aer = sum(job_flops(llama, JOBS[0], 3).values()) / full_flops(llama, 3)

    assert aer == pytest.approx(0.25, abs=0.02)
