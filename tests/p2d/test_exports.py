"""An export step writes the very files that the command line writes, where a worker looks for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2d.adapters import merge
from p2d.config import JobConfig
from p2d.errors import AdapterMismatch
from p2d.model_info import read_model_info
from p2d.models import load_base_model
from p2d.peft_export import export_peft
from p2d.pipeline import EXPORTS, ModelCache, StepCall, is_input, run_step
from tests.factories import tiny_model_dir
from tests.p2d.test_adapters import trained_adapter


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if not path.name.startswith(("accounting", "p2d-model"))
    }


@pytest.mark.parametrize(("step", "written"), [("merge", merge), ("export_peft", export_peft)])
def test_an_export_step_writes_what_the_command_writes(
    step: str, written: object, tiny_dir: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "inputs"
    trained_adapter(load_base_model(tiny_dir, precision="fp32", device="cpu"), adapter)
    call = StepCall(step=step, config=JobConfig(), model_dir=tiny_dir, inputs=adapter, out=tmp_path / "out")

    run_step(call, models=ModelCache())

    assert callable(written)
    assert files(tmp_path / "out") == files(written(tiny_dir, adapter, tmp_path / "command"))
    assert (tmp_path / "out" / f"accounting-{step}.json").is_file()
    assert {path.name for path in adapter.iterdir() if is_input(step, path.name)} == set(EXPORTS[step].reads)


def test_a_merged_export_is_a_base_model_itself(tiny_dir: Path, tmp_path: Path) -> None:
    trained_adapter(load_base_model(tiny_dir, precision="fp32", device="cpu"), tmp_path / "inputs")
    call = StepCall(
        step="merge", config=JobConfig(), model_dir=tiny_dir, inputs=tmp_path / "inputs", out=tmp_path / "out"
    )

    run_step(call, models=ModelCache())

    assert read_model_info(tmp_path / "out").digest != read_model_info(tiny_dir).digest


def test_an_export_for_another_base_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    trained_adapter(load_base_model(tiny_dir, precision="fp32", device="cpu"), tmp_path / "inputs")
    other = tiny_model_dir(tmp_path / "other", seed=9)
    call = StepCall(step="merge", config=JobConfig(), model_dir=other, inputs=tmp_path / "inputs", out=tmp_path / "out")

    with pytest.raises(AdapterMismatch):
        run_step(call, models=ModelCache())
