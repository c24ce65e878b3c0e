"""Laws of the plan: what runs, in which order, and that planning leaves torch alone."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from p2d import pipeline
from p2d.config import DataConfig, HeadsConfig, JobConfig, Kind, TrainingConfig
from p2d.errors import ModelError, OutOfMemory
from p2d.memory_guard import memory_guard
from p2d.model_info import read_model_info
from p2d.pipeline import STEPS, ModelCache, StepCall, is_input, plan_steps, run_step, shard_range
from p2d.rows import write_rows
from tests.factories import some_rows, tiny_model_dir

KINDS: tuple[Kind, ...] = ("identify_heads", "select_data", "adapt")


def steps_of(config: JobConfig, rows: int = 10, shard_rows: int = 100) -> list[str]:
    return [step.step for step in plan_steps(config, rows, shard_rows)]


def test_each_kind_runs_only_the_steps_it_needs() -> None:
    assert steps_of(JobConfig(kind="identify_heads")) == ["validate", "heads", "package"]
    assert steps_of(JobConfig(kind="select_data")) == ["validate", "heads", "respond", "select", "package"]
    assert steps_of(JobConfig(kind="adapt")) == [
        "validate",
        "heads",
        "respond",
        "select",
        "train",
        "evaluate",
        "package",
    ]


def test_an_earlier_head_map_or_selection_replaces_the_steps_that_make_it() -> None:
    with_map = JobConfig(heads=HeadsConfig(head_map="hm_1"))
    with_both = JobConfig(heads=HeadsConfig(head_map="hm_1"), data=DataConfig(selection="sel_1"))

    assert steps_of(with_map) == ["validate", "respond", "select", "train", "evaluate", "package"]
    assert steps_of(with_both) == ["validate", "train", "evaluate", "package"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_map", [None, "hm_1"])
@pytest.mark.parametrize("selection", [None, "sel_1"])
def test_a_step_waits_only_for_steps_planned_before_it(kind: Kind, head_map: str | None, selection: str | None) -> None:
    config = JobConfig(kind=kind, heads=HeadsConfig(head_map=head_map), data=DataConfig(selection=selection))

    seen: set[str] = set()
    for step in plan_steps(config, rows=1000, shard_rows=300):
        assert set(step.after) <= seen
        assert step.step == "validate" or step.after
        seen.add(step.step)


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_is_the_output_of_an_earlier_step_or_the_users(kind: Kind) -> None:
    written = ["dataset.jsonl"]
    for step in dict.fromkeys(steps_of(JobConfig(kind=kind))):
        for name in STEPS[step].reads:
            assert name in written or any(is_input(step, earlier) for earlier in written), (step, name)
        written += STEPS[step].writes


def test_training_is_sent_no_whole_dataset_and_evaluation_no_log_of_training() -> None:
    """Workers fetch what a step declares; that it is enough, `test_steps_on_separate_workers_give_the_bytes_of_one` shows."""
    assert not is_input("train", "rows.jsonl")
    assert not is_input("evaluate", "training.json")


@pytest.mark.parametrize("rows", [1, 7, 300, 1001])
@pytest.mark.parametrize("shards", [1, 2, 7])
def test_shards_cover_every_row_once(rows: int, shards: int) -> None:
    covered = [row for shard in range(shards) for row in shard_range(rows, shard, shards)]

    assert covered == list(range(rows))


def test_planning_a_job_leaves_torch_alone() -> None:
    code = "import sys, p2d, p2d.pipeline; bad = {'torch', 'numpy', 'transformers'} & set(sys.modules); assert not bad, bad"

    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "raised",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("unable to mmap 269060552 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    ],
    ids=lambda raised: type(raised).__name__,
)
def test_a_step_that_runs_out_of_memory_anywhere_says_so_by_our_own_error(
    raised: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body(*_: object) -> NoReturn:
        raise raised

    monkeypatch.setattr(pipeline, "load", lambda *_, **__: body)
    for step, spec in STEPS.items():
        call = StepCall(step=step, config=JobConfig(), model_dir=tmp_path, inputs=tmp_path, out=tmp_path)
        with pytest.raises(OutOfMemory, match=f"ran out of memory while running the stage '{spec.stage}'") as caught:
            run_step(call, models=ModelCache())
        assert caught.value.__cause__ is raised


def test_a_warm_model_is_loaded_again_once_its_files_have_changed(tmp_path: Path) -> None:
    directory, models = tiny_model_dir(tmp_path / "model"), ModelCache()
    warm, _ = models.get(directory, precision="fp32", device="cpu")
    again, load_s = models.get(directory, precision="fp32", device="cpu")
    assert (again is warm, load_s) == (True, 0.0)

    shutil.copy(tiny_model_dir(tmp_path / "other", seed=1) / "model.safetensors", directory)
    other, load_s = models.get(directory, precision="fp32", device="cpu")

    assert other.info.digest == read_model_info(directory).digest != warm.info.digest
    assert load_s > 0


def test_a_step_refuses_a_model_that_its_plan_was_not_made_for(tmp_path: Path) -> None:
    directory, inputs = tiny_model_dir(tmp_path / "model"), tmp_path / "inputs"
    config = JobConfig(heads=HeadsConfig(scorer="uniform", ratio=0.5), training=TrainingConfig(learning_rate=1e-3))
    inputs.mkdir()
    write_rows(inputs / "dataset.jsonl", some_rows(40))
    for step in ("validate", "heads"):
        call = StepCall(step=step, config=config, model_dir=directory, inputs=inputs, out=inputs, device="cpu")
        run_step(call, models=ModelCache())
    shutil.copy(tiny_model_dir(tmp_path / "other", seed=1) / "model.safetensors", directory)

    with pytest.raises(ModelError, match="have changed since the job began"):
        run_step(call, models=ModelCache())


def test_a_kernel_that_could_not_be_made_is_taken_for_memory_with_its_own_words_and_a_doubt() -> None:
    with pytest.raises(
        OutOfMemory, match=r"seems to have .* oneDNN could not create a primitive, which can have another"
    ):
        fail_with(RuntimeError("could not create a primitive"))

    for other in (
        "could not create a primitive descriptor for a matmul primitive",
        "mat1 and mat2 cannot be multiplied",
    ):
        with pytest.raises(RuntimeError, match=other):
            fail_with(RuntimeError(other))
    with pytest.raises(FileNotFoundError):
        fail_with(FileNotFoundError(errno.ENOENT, "No such file"))


def fail_with(error: Exception) -> NoReturn:
    with memory_guard("training"):
        raise error
