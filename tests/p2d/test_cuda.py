"""On a CUDA device the engine computes what it computes on a CPU, twice the same, and gives way when memory runs out.

    python -m pytest --noconftest tests/p2d/test_cuda.py

Needs the engine and pytest alone; skipped where there is no such device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.quality.arms import Weights
from benchmarks.quality.graphs import GraphedTrainer
from benchmarks.quality.weights import installed
from p2d.activation_cache import remember_below
from p2d.batches import answer_nlls
from p2d.config import DATA_SCORERS, HEAD_SCORERS, DataConfig, HeadsConfig, JobConfig, TrainingConfig
from p2d.identify import identify_heads
from p2d.jobs import adapt
from p2d.models import BaseModel, load_base_model
from p2d.optimization import Schedule, SliceTrainer, StepLog
from p2d.pipeline import no_progress
from p2d.registry import load
from p2d.resolution import resolve
from p2d.responses import ResponseInput
from p2d.rows import Row, write_rows
from p2d.slices import Head, HeadSlices, all_heads
from tests.factories import TINY, some_rows, tiny_model_dir

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROWS = some_rows(24)
GUIDE = some_rows(6, first=60)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def both(directory: Path) -> tuple[BaseModel, BaseModel]:
    """The same fp32 model on the CPU and on the device."""
    return on("cpu", directory), on("cuda", directory)


def on(device: str, directory: Path) -> BaseModel:
    return load_base_model(directory, precision="fp32", device=device)


def config(**parts: Any) -> JobConfig:
    training = TrainingConfig(slices=("v", "o"), rank=None, learning_rate=1e-3, epochs=2)
    return resolve(JobConfig(**{"training": training} | parts), rows=len(ROWS), context_length=512, head_dim=64).config


def trained(
    base: BaseModel, heads: Sequence[Head], rank: int | None, *, below: int = 0, budget: int = 4096
) -> tuple[list[StepLog], dict[str, torch.Tensor], SliceTrainer]:
    """Six steps of eight rows: what each said, what came out, and the trainer."""
    rows = [base.renderer.render(row) for row in ROWS]
    with HeadSlices(base, heads, ("q", "k", "v", "o"), rank, seed=1) as slices, remember_below(base, below):
        trainer = SliceTrainer(base, slices, rows, batch_size=8, seed="0", token_budget=budget)
        logs = [trainer.advance(Schedule(5e-3, 6)) for _ in range(6)]
        return logs, {name: value.cpu() for name, value in slices.masters().items()}, trainer


@pytest.mark.parametrize("family", TINY)
def test_every_family_reads_packed_and_padded_rows_as_on_a_cpu(family: str, tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / family, family=family)
    host, device = on("cpu", directory), on("cuda", directory)
    rows = [host.renderer.render(row) for row in ROWS]
    for packed in (True, False):
        expected, found = np.zeros(len(rows)), np.zeros(len(rows))
        for base, nll_R in ((host, expected), (device, found)):
            for indices, nll_B, _ in answer_nlls(base, rows, packed=packed):
                nll_R[indices] = nll_B.cpu().numpy()
        assert found == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("below", [0, 1])
def test_training_takes_the_cpu_s_steps_and_leaves_the_base_alone(
    both: tuple[BaseModel, BaseModel], rank: int | None, below: int
) -> None:
    host, device = both
    before = {name: value.clone() for name, value in device.module.state_dict().items()}
    heads = [(1, 0), (1, 3), (2, 1), (2, 2), (2, 5)]

    expected, _, _ = trained(host, heads, rank, below=below)
    found, values, _ = trained(device, heads, rank, below=below)
    again, same, _ = trained(device, heads, rank, below=below)

    assert [log.loss for log in found] == pytest.approx([log.loss for log in expected], rel=1e-3)
    assert found[-1].loss < found[0].loss
    assert [log.loss for log in again] == [log.loss for log in found]
    assert all(torch.equal(values[name], same[name]) for name in values)
    after = device.module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_long_rows_train_to_the_same_bits_twice_in_bf16(directory: Path) -> None:
    device = load_base_model(directory, precision="bf16", device="cuda")
    rows = [
        device.renderer.render(Row("q" * 150, "a" * (200 + 5 * n), n)) for n in range(16)
    ]  # several blocks of flash

    def masters() -> dict[str, torch.Tensor]:
        with HeadSlices(device, all_heads(device), ("q", "k", "v", "o")) as slices:
            trainer = SliceTrainer(device, slices, rows, batch_size=8, seed="0")
            for _ in range(4):
                trainer.advance(Schedule(5e-3, 4))
            return slices.masters()

    one, other = masters(), masters()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "weights",
    [
        Weights(kind="slices", slices=("v", "o")),
        Weights(kind="slices", slices=("v", "o"), rank=2),
        Weights(kind="lora", rank=2),
        Weights(kind="lora", rank=2, variant="dora"),
        Weights(kind="full"),
    ],
    ids=lambda weights: f"{weights.kind}-{weights.rank}-{weights.variant}",
)
def test_a_recorded_step_is_the_step_that_was_recorded(both: tuple[BaseModel, BaseModel], weights: Weights) -> None:
    _, device = both
    rows = [device.renderer.render(row) for row in ROWS[:21]]  # the last step of an epoch is a short one
    losses = []
    for make in (SliceTrainer, GraphedTrainer):
        with installed(device, weights, all_heads(device), seed=1) as trained_weights:
            trainer = make(device, trained_weights, rows, batch_size=8, seed="0")
            losses.append([trainer.advance(Schedule(5e-3, 6)).loss for _ in range(6)])

    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][-1] < losses[1][0]


def test_a_step_that_does_not_fit_is_done_in_smaller_parts_to_the_same_loss(both: tuple[BaseModel, BaseModel]) -> None:
    _, device = both
    rows = [device.renderer.render(Row("q" * 150, "a" * (100 + n), n)) for n in range(32)]

    def step() -> tuple[float, int]:
        with HeadSlices(device, all_heads(device), ("v", "o"), 2) as slices:
            trainer = SliceTrainer(device, slices, rows, batch_size=32, seed="0", token_budget=16384)
            return trainer.advance(Schedule(5e-3, 6)).loss, trainer.token_budget

    step()  # what libraries keep from their first use on is not the step's
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    whole = step()
    peak = torch.cuda.max_memory_allocated() - held
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 0.7 * peak) / total)
        parts = step()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)

    assert whole[1] == 16384 > parts[1]
    assert parts[0] == pytest.approx(whole[0], rel=1e-3)


@pytest.mark.parametrize("scorer", [name for name in DATA_SCORERS if name != "random"])
def test_rows_are_scored_as_on_a_cpu(both: tuple[BaseModel, BaseModel], scorer: str) -> None:
    found = []
    for base in both:
        given = ResponseInput(
            base=base,
            rows=ROWS,
            guide=GUIDE,
            span=range(len(ROWS)),
            slices=("v", "o"),
            config=config(data=DataConfig(scorer=scorer)),
        )
        shard = load(DATA_SCORERS, scorer, what="data scorer", pointer="/data/scorer")(given).shard
        found.append(shard.response_RN.astype(np.float32))
        if shard.quality_R is not None:
            found[-1] = np.concatenate([found[-1].ravel(), shard.quality_R])
    assert found[1] == pytest.approx(found[0], rel=5e-3, abs=2e-3)


@pytest.mark.parametrize("scorer", [name for name in HEAD_SCORERS if name != "random"])
def test_heads_are_ranked_as_on_a_cpu(both: tuple[BaseModel, BaseModel], scorer: str) -> None:
    scores = [
        np.array(identify_heads(base, ROWS, GUIDE, config(heads=HeadsConfig(scorer=scorer)), no_progress).scores)
        for base in both
    ]
    # A twentieth of the largest score: Adam turns rounding of near-zero gradients into steps of full size.
    assert scores[1] == pytest.approx(scores[0], abs=0.05 * float(np.abs(scores[0]).max()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_job_runs_and_ends_in_the_same_bytes_twice(directory: Path, tmp_path: Path, precision: Any) -> None:
    rows, held_out = tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    write_rows(rows, some_rows(40))
    write_rows(held_out, some_rows(10, first=80))
    asked = JobConfig(
        training=TrainingConfig(learning_rate=1e-3, epochs=2, rank=2, precision=precision),
        data=DataConfig(ratio=0.5),
        controls=("random_heads", "random_data"),
    )
    outs = [tmp_path / name for name in ("one", "two")]
    for out in outs:
        adapt(model=directory, data=rows, validation=held_out, out=out, config=asked, device="cuda")

    for name in ("heads.safetensors", "head_map.json", "selection.jsonl", "row_losses.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
