"""The size of a job's files, foreseen from shapes, is the size on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2d.adapters import WEIGHTS, save_adapter
from p2d.arch.spec import every_head
from p2d.config import (
    DATA_SCORERS,
    FEWEST_LEFT,
    FEWEST_LOOK,
    LOOK_APART,
    WITHOUT_RESPONSES,
    DataConfig,
    HeadsConfig,
    JobConfig,
    TrainingConfig,
    alignment_layers,
)
from p2d.models import BaseModel
from p2d.pipeline import no_progress
from p2d.registry import load
from p2d.resolution import resolve
from p2d.response_matrix import ResponseShard, save_shard
from p2d.responses import DataScorer, ResponseInput
from p2d.sizes import adapter_bytes, adapter_size, response_size
from p2d.slices import HeadSlices
from tests.factories import some_rows


def config(ratio: float, *slices: str, **data: object) -> JobConfig:
    asked = JobConfig(
        heads=HeadsConfig(ratio=ratio),
        data=DataConfig(ratio=0.2, **data),  # type: ignore[arg-type]
        training=TrainingConfig(slices=slices or "auto"),  # type: ignore[arg-type]
    )
    return resolve(asked, rows=40, context_length=512, head_dim=64).config


def saved(base: BaseModel, heads: list[tuple[int, int]], asked: JobConfig, folder: Path) -> int:
    """Bytes of heads.safetensors for these heads."""
    slices = asked.training.slices
    assert slices != "auto"
    with HeadSlices(base, heads, slices) as trained:
        save_adapter(
            folder, base=base, heads=heads, projections=slices, state=trained.state(), config=asked, learning_rate=1.0
        )
    return (folder / WEIGHTS).stat().st_size


def test_an_adapter_has_the_foreseen_size_to_the_byte_once_its_heads_are_known(tiny: BaseModel, tmp_path: Path) -> None:
    heads = [(0, 1), (0, 2), (2, 0), (2, 5), (1, 3)]
    asked = config(5 / 18, "q", "k", "v", "o")

    size = saved(tiny, heads, asked, tmp_path)

    assert adapter_bytes(tiny.info, heads, asked, wide=True) == size
    foreseen = adapter_size(tiny.info, asked, wide=True)
    assert foreseen.least <= size <= foreseen.most


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5])
def test_whatever_heads_are_chosen_the_size_lies_between(tiny: BaseModel, ratio: float, seed: int) -> None:
    import random

    asked = config(ratio, "v", "o")
    heads = every_head(tiny.info)
    foreseen = adapter_size(tiny.info, asked, wide=False)

    for turn in range(200):
        chosen = random.Random(seed + turn).sample(heads, -(-round(ratio * len(heads) * 1000) // 1000))
        assert foreseen.least <= adapter_bytes(tiny.info, chosen, asked, wide=False) <= foreseen.most


def test_with_all_heads_nothing_is_left_open(tiny: BaseModel, tmp_path: Path) -> None:
    asked = config(1.0)

    size = saved(tiny, every_head(tiny.info), asked, tmp_path)

    foreseen = adapter_size(tiny.info, asked, wide=True)
    assert foreseen.least == foreseen.most == size


@pytest.mark.parametrize("unlike", [None, 0, 1, 33])
@pytest.mark.parametrize("rows", [41, 66, 97])
@pytest.mark.parametrize("sample", [FEWEST_LEFT + LOOK_APART, FEWEST_LOOK, FEWEST_LOOK + LOOK_APART])
def test_a_sample_and_what_is_left_out_have_a_size_within_the_foreseen(
    tiny: BaseModel, tmp_path: Path, rows: int, unlike: int | None, sample: int
) -> None:
    asked = config(1.0)
    asked = replace(asked, data=replace(asked.data, scorer="alignment_likelihood", ratio="auto"))
    columns = len(alignment_layers(tiny.info.n_layers)) * tiny.info.n_heads
    shard = ResponseShard(
        span=range(rows),
        row_R=np.arange(sample),
        layers=alignment_layers(tiny.info.n_layers),
        n_heads=tiny.info.n_heads,
        response_RN=np.zeros((sample, columns), dtype=np.float16),
        quality_R=np.zeros(sample, dtype=np.float32),
        guide_response_GN=np.zeros((12, columns), dtype=np.float16),
        guide_quality_G=np.zeros(12, dtype=np.float32),
        scorer="alignment_likelihood",
        combine="guide",
        rest_like_guide=True,
        unlike_R=None if unlike is None else np.arange(rows - unlike, rows),
    )
    save_shard(tmp_path / "shard", shard)

    foreseen = response_size(tiny.info, asked, rows=rows, guide=12, shards=1)

    assert foreseen.least <= (tmp_path / "shard").stat().st_size <= foreseen.most


@pytest.mark.parametrize("name", sorted(DATA_SCORERS))
@pytest.mark.parametrize("mode", ["faithful", "fast"])
@pytest.mark.parametrize("guide", [4, 12])
def test_responses_have_the_foreseen_size(tiny: BaseModel, tmp_path: Path, name: str, mode: str, guide: int) -> None:
    if name in WITHOUT_RESPONSES and mode == "fast":
        pytest.skip("refused: there is nothing to save")
    asked = config(0.1, scorer=name, mode=mode, n_demos=3, n_queries=2)
    scorer: DataScorer = load(DATA_SCORERS, name, what="data scorer", pointer="/data/scorer")
    size = 0
    for span in (range(20), range(20, 40)):
        given = ResponseInput(
            base=tiny, rows=some_rows(40), guide=some_rows(guide, first=50), span=span, slices=("v", "o"), config=asked,
            progress=no_progress,
        )  # fmt: skip
        save_shard(tmp_path / "shard", scorer(given).shard)
        size += (tmp_path / "shard").stat().st_size

    foreseen = response_size(tiny.info, asked, rows=40, guide=guide, shards=2)

    assert foreseen.least <= size <= foreseen.most
    assert mode == "fast" or foreseen.least == foreseen.most
