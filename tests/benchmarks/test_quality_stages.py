"""How an arm's heads and rows are chosen: in which order heads are taken, and by how many validation rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import matrix
from benchmarks.quality.arms import GROUPED, SPREAD, Arm, Weights
from benchmarks.quality.cells import Cells
from benchmarks.quality.pools import PoolSpec, build
from benchmarks.quality.stages import grouped, spread
from p2d.arch.spec import heads_per_group
from p2d.head_maps import HeadMap
from p2d.identify import identify_heads
from p2d.models import BaseModel
from p2d.responses import ResponseInput, Responses
from p2d.responses.alignment import alignment
from p2d.rows import Row
from tests.benchmarks.test_quality import OTHER, TASK, laboratory, options_of

SCORES = ((9.0, 8.0, 7.0, 0.5), (1.0, 2.0, 6.0, 5.0))


def test_heads_that_are_spread_are_the_best_of_every_layer_then_the_second_best() -> None:
    ranked = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (1, 1), (1, 0), (0, 3)]

    assert spread(ranked) == [(0, 0), (1, 2), (0, 1), (1, 3), (0, 2), (1, 1), (1, 0), (0, 3)]


def test_heads_in_groups_come_with_the_others_of_their_group_by_the_sum_of_its_scores() -> None:
    ranked = [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (1, 1), (1, 0), (0, 3)]

    assert grouped(ranked, SCORES, 2) == [(0, 0), (0, 1), (1, 2), (1, 3), (0, 2), (0, 3), (1, 1), (1, 0)]
    assert grouped(ranked, SCORES, 1) == ranked


def test_heads_of_one_map_are_taken_in_three_ways_and_the_map_is_made_once(
    tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[HeadMap] = []

    def noting(*given: Any) -> HeadMap:
        made.append(identify_heads(*given))
        return made[-1]

    monkeypatch.setattr("benchmarks.quality.stages.identify_heads", noting)
    lab = laboratory(tiny, build(PoolSpec("gsm8k", 8), TASK, OTHER), tmp_path / "quality.json")
    low = Weights(kind="slices", slices=("v", "o"), rank=2)
    arm = Arm(name="one", weights=low, heads="attribution", heads_ratio=0.5, epochs=1)

    by_score, spread_out, in_groups = (
        lab.stages.heads(replace(arm, heads=heads), 0)[0]
        for heads in ("attribution", f"attribution {SPREAD}", f"attribution {GROUPED}")
    )

    assert len(made) == 1
    assert by_score == made[0].top(0.5)
    assert len(by_score) == len(spread_out) == len(in_groups)
    layers = Counter(layer for layer, _ in spread_out)
    assert max(layers.values()) - min(layers.values()) <= 1
    group = heads_per_group(tiny.info)
    assert set(Counter((layer, head // group) for layer, head in in_groups).values()) == {group}


def test_an_arm_with_a_guide_of_its_own_is_chosen_by_so_many_validation_rows_that_the_seed_draws(
    tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Row, ...]] = []

    def noting(given: ResponseInput) -> Responses:
        asked.append(tuple(given.guide))
        return alignment(given)

    monkeypatch.setattr("benchmarks.quality.stages.load", lambda *given, **more: noting)
    lab = laboratory(tiny, build(PoolSpec("gsm8k", 8), TASK, OTHER), tmp_path / "quality.json")
    arm = Arm(name="one", weights=Weights(kind="lora", rank=2), rows="alignment", ratio=0.5, epochs=1)

    for guide, seed in ((None, 0), (2, 0), (None, 1), (2, 0), (2, 1)):
        lab.stages.rows(replace(arm, guide=guide), [(0, 0)], seed)

    assert [len(guide) for guide in asked] == [len(TASK.validation), 2, 2]
    assert asked[1] != asked[2]
    assert set(asked[1] + asked[2]) <= set(TASK.validation)
    assert lab.key(arm, 0, 1e-3) != lab.key(replace(arm, guide=2), 0, 1e-3)


def test_a_run_does_without_an_arm_whose_guide_is_no_smaller_than_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = Arm(name="all of them", weights=Weights(kind="lora", rank=2), rows="alignment", ratio=0.5)
    arms = (arm, replace(arm, name="3 of them", guide=3), replace(arm, name="4 of them", guide=4))
    monkeypatch.setattr(matrix, "ARMS", arms)
    options = options_of(tmp_path, validation=4)

    run = matrix.Matrix(options, Cells(tmp_path / "quality.json"), print, ends=0.0)

    assert [arm.name for arm in run.arms] == ["all of them", "3 of them"]
