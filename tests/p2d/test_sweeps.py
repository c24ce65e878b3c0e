"""Stage 2 is paid once: other heads, other ratios, another head map, more rows are arithmetic on what is stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from p2d.config import DATA_SCORERS, WITHOUT_RESPONSES, DataConfig, HeadsConfig, JobConfig, TrainingConfig
from p2d.files import read_json
from p2d.models import BaseModel
from p2d.pipeline import ModelCache, StepCall, run_step
from p2d.registry import load
from p2d.response_matrix import load_shard, read_shards, save_shard
from p2d.responses import ResponseInput
from p2d.rows import Row, write_rows
from p2d.selection import select_rows
from p2d.selection_file import read_selection
from tests.factories import some_rows

ROWS, GUIDE = some_rows(24), some_rows(4, first=100)


@contextmanager
def counted_forwards(base: BaseModel) -> Iterator[list[int]]:
    """How many passes go through the first layer."""
    passes: list[int] = []
    layer = base.module.get_submodule(f"{base.spec.layers}.0")
    handle = layer.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        yield passes
    finally:
        handle.remove()


@pytest.mark.parametrize("scorer", sorted(set(DATA_SCORERS) - WITHOUT_RESPONSES))
def test_ten_head_sets_and_ratios_run_no_model_pass(tiny: BaseModel, tmp_path: Path, scorer: str) -> None:
    respond = load(DATA_SCORERS, scorer, what="data scorer", pointer="/data/scorer")
    config = JobConfig(data=DataConfig(scorer=scorer, mode="faithful", n_demos=3, n_queries=2))
    rng = np.random.default_rng(0)
    paths = []
    with counted_forwards(tiny) as passes:
        for number, span in enumerate((range(12), range(12, 24))):
            given = ResponseInput(base=tiny, rows=ROWS, guide=GUIDE, span=span, slices=("v", "o"), config=config)
            paths.append(tmp_path / f"{number}.safetensors")
            save_shard(paths[-1], respond(given).shard)
        after_scoring = len(passes)
        assert after_scoring > 0

        kept = set()
        for _ in range(10):
            heads = [(int(cell) // 6, int(cell) % 6) for cell in rng.permutation(18)[:4]]
            for ratio in (0.1, 0.3):
                kept.add(tuple(select_rows(read_shards(paths), heads, ratio, ROWS, seed=0).kept_rows))

        assert len(passes) == after_scoring
    assert len(kept) > 2 or scorer == "information"  # the head sets do differ


def test_a_matrix_grows_by_a_shard_and_keeps_half_precision(tmp_path: Path, tiny: BaseModel) -> None:
    respond = load(DATA_SCORERS, "alignment", what="data scorer", pointer="/data/scorer")
    paths = []
    for number, span in enumerate((range(6), range(6, 10), range(10, 24))):
        given = ResponseInput(
            base=tiny,
            rows=ROWS,
            guide=GUIDE,
            span=span,
            slices=("v",),
            config=JobConfig(data=DataConfig(mode="faithful")),
        )
        paths.append(tmp_path / f"{number}.safetensors")
        save_shard(paths[-1], respond(given).shard)
        first = paths[0].read_bytes()

        selection = select_rows(read_shards(paths), [(2, 0)], 0.5, ROWS[: span.stop], seed=0)

        assert len(selection.score_R) == span.stop
        assert paths[0].read_bytes() == first
    shard = load_shard(paths[2])
    assert isinstance(shard.response_RN, np.memmap)  # read where it is looked at
    assert shard.response_RN.dtype == np.float16
    assert paths[2].stat().st_size < shard.response_RN.nbytes + shard.row_R.nbytes + 1024


def test_another_head_map_needs_no_model(tiny_dir: Path, tmp_path: Path) -> None:
    inputs, models = tmp_path / "inputs", ModelCache()
    inputs.mkdir()
    config = JobConfig(
        heads=HeadsConfig(scorer="shift", ratio=0.2, proxy_rows=8),
        data=DataConfig(ratio=0.3),
        training=TrainingConfig(batch_size=2),
    )
    write_rows(inputs / "dataset.jsonl", some_rows(40))

    def run(step: str) -> None:
        out = tmp_path / f"out-{step}"
        run_step(
            StepCall(step=step, config=config, model_dir=tiny_dir, inputs=inputs, out=out, device="cpu"), models=models
        )
        for path in out.iterdir():
            path.replace(inputs / path.name)

    for step in ("validate", "heads", "respond", "select"):
        run(step)
    first = [line.score for line in read_selection(inputs / "selection.jsonl")]

    head_map = json.loads((inputs / "head_map.json").read_text())
    head_map["scores"] = [[-score for score in layer] for layer in head_map["scores"]]
    (inputs / "head_map.json").write_text(json.dumps(head_map))
    base, _ = models.get(tiny_dir, precision="fp32", device="cpu")
    with counted_forwards(base) as passes:
        run("select")

    assert passes == []
    assert [line.score for line in read_selection(inputs / "selection.jsonl")] != first


def test_the_step_keeps_one_of_the_rows_that_are_alike(tiny_dir: Path, tmp_path: Path) -> None:
    inputs, models = tmp_path / "inputs", ModelCache()
    inputs.mkdir()
    said = "The {} of them are kept in a drawer of the old desk behind the door of the very last room upstairs"
    alike = [Row(said.format("keys"), said.format(f"{n} spare keys"), 1) for n in range(20)]
    write_rows(inputs / "dataset.jsonl", [*some_rows(20), *alike])
    config = JobConfig(
        kind="select_data", heads=HeadsConfig(scorer="shift", ratio=0.2, proxy_rows=8), data=DataConfig(ratio=0.5)
    )
    for step in ("validate", "heads", "respond", "select"):
        out = tmp_path / step
        run_step(
            StepCall(step=step, config=config, model_dir=tiny_dir, inputs=inputs, out=out, device="cpu"), models=models
        )
        for path in out.iterdir():
            path.replace(inputs / path.name)

    lines, summary = list(read_selection(inputs / "selection.jsonl")), read_json(inputs / "selection_summary.json")

    again = [line for line in lines if line.repeats is not None]
    kept = [line for line in lines if line.kept and line.prompt == said.format("keys")]
    assert summary["repeating"] == len(again) > 0
    assert {line.repeats for line in again} == {line.row for line in kept}
    assert len(kept) == 1
