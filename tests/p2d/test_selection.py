"""Selection is arithmetic: the right rows, ties by order, the same through files, and no torch."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2d.errors import ConfigError, EngineError
from p2d.response_matrix import Combine, ResponseShard, read_shards, save_shard
from p2d.rows import Row
from p2d.selection import load_kept, read_selection, select_rows, summarise, write_selection

HEADS = [(0, 1), (1, 0)]
"""Columns 1 and 2 of two layers of two heads."""


def a_shard(
    response: list[list[float]],
    quality: list[float] | None = None,
    *,
    start: int = 0,
    combine: Combine = "response",
    layers: range = range(2),
    scored: list[int] | None = None,
    stop: int | None = None,
) -> ResponseShard:
    """A shard of every row from `start` on; of the rows `scored` alone where given."""
    stop = start + len(response) if stop is None else stop
    return ResponseShard(
        span=range(start, stop),
        row_R=np.array(range(start, stop) if scored is None else scored, dtype=np.int64),
        layers=layers,
        n_heads=2,
        response_RN=np.array(response, dtype=np.float16).reshape(len(response), 2 * len(layers)),
        quality_R=None if quality is None else np.array(quality, dtype=np.float32),
        scorer="alignment",
        combine=combine,
    )


def test_only_the_chosen_heads_count() -> None:
    selection = select_rows([a_shard([[9, 1, 1, 9], [0, 3, 3, 0], [9, 2, 2, 9]])], HEADS, ratio=1 / 3)

    assert selection.score_R.tolist() == [2, 6, 4]
    assert selection.kept_rows == [1]


def test_ties_are_broken_by_row_order() -> None:
    selection = select_rows([a_shard([[0, 1, 0, 0]] * 5)], HEADS, ratio=0.4)

    assert selection.kept_rows == [0, 1]
    assert selection.rank_R.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("ratio", "kept"), [(0.01, 1), (0.1, 1), (0.11, 2), (0.3, 3), (1.0, 10)])
def test_a_ratio_keeps_its_ceiling_and_never_nothing(ratio: float, kept: int) -> None:
    selection = select_rows([a_shard([[0, row, 0, 0] for row in range(10)])], HEADS, ratio=ratio)

    assert len(selection.kept_rows) == kept


def test_a_product_weighs_the_response_by_quality() -> None:
    selection = select_rows([a_shard([[0, 2, 0, 0], [0, 3, 0, 0]], [4.0, 1.0], combine="product")], HEADS, ratio=0.5)

    assert selection.score_R.tolist() == [8, 3]


def test_ranks_combine_whatever_the_units() -> None:
    shard = a_shard([[0, 1, 0, 0], [0, 2, 0, 0], [0, 3, 0, 0]], [0.0, 1e6, 2e6], combine="rank")

    assert select_rows([shard], HEADS, ratio=0.3).score_R.tolist() == [0, 1, 2]


def test_a_row_quality_alone_needs_no_heads() -> None:
    shard = a_shard([[], [], []], [0.5, 2.0, -1.0], combine="quality", layers=range(0))

    selection = select_rows([shard], HEADS, ratio=0.3)

    assert selection.score_R.tolist() == [0.5, 2.0, -1.0]
    assert selection.kept_rows == [1]
    assert selection.heads_scored == 0


@pytest.mark.parametrize(
    ("heads", "scored", "scores"),
    [([(1, 0), (1, 1)], 2, [6, 6]), ([(0, 1), (1, 0)], 1, [1 + 3, 2 + 3]), ([(0, 0), (0, 1)], 0, [2 * 3, 2 * 3])],
)
def test_the_mean_of_all_scored_heads_stands_in_for_a_chosen_one_that_was_not(
    heads: list[tuple[int, int]], scored: int, scores: list[float]
) -> None:
    selection = select_rows([a_shard([[1, 5], [2, 4]], layers=range(1, 2))], heads, ratio=0.5)

    assert selection.score_R.tolist() == scores
    assert (selection.heads, selection.heads_scored) == (2, scored)


def test_a_row_outside_the_pool_is_never_kept(tmp_path: Path) -> None:
    rows = [Row(f"prompt {n}", f"answer {n}", line=n) for n in range(6)]
    shards = [
        a_shard([[0, 1, 1, 0]], scored=[2], start=0, stop=3),
        a_shard([[0, 9, 9, 0]], scored=[4], start=3, stop=6),
    ]

    selection = select_rows(shards, HEADS, ratio=0.5)
    write_selection(tmp_path / "selection.jsonl", selection, rows)

    assert selection.kept_rows == [2, 4]  # ratio asks for three, two were scored
    assert selection.rank_R.tolist() == [2, 3, 1, 4, 0, 5]
    assert [line.score for line in read_selection(tmp_path / "selection.jsonl")] == [None, None, 2.0, None, 18.0, None]
    summary = summarise(selection)
    assert (summary.rows, summary.scored, summary.kept, summary.score_quantiles[0]) == (6, 2, 2, 2.0)


def test_a_score_that_is_not_finite_stops_the_job() -> None:
    with pytest.raises(EngineError) as caught:
        select_rows([a_shard([[0, 1, 0, 0], [0, float("nan"), 0, 0]])], HEADS, ratio=0.5)

    assert caught.value.facts["rows"] == [1]


def test_sums_are_not_rounded_to_half_precision() -> None:
    selection = select_rows([a_shard([[0, 2048, 1, 0], [0, 2048, 0, 0]])], HEADS, ratio=0.5)

    assert selection.score_R.tolist() == [2049, 2048]  # fp16 knows no 2049


def test_shards_read_back_in_row_order_whatever_their_names(tmp_path: Path) -> None:
    save_shard(tmp_path / "a.safetensors", a_shard([[0, 1, 0, 0]], start=2))
    save_shard(tmp_path / "b.safetensors", a_shard([[0, 2, 0, 0], [0, 3, 0, 0]], start=0))

    shards = read_shards([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])

    assert select_rows(shards, HEADS, ratio=1.0).score_R.tolist() == [2, 3, 1]


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    save_shard(tmp_path / "a.safetensors", a_shard([[0, 1, 0, 0]], start=2))

    with pytest.raises(AssertionError, match="expected 0"):
        list(read_shards([tmp_path / "a.safetensors"]))


def test_the_file_holds_the_text_of_kept_rows_alone(tmp_path: Path) -> None:
    rows = [Row(f"prompt {n}", f"answer {n}", line=10 * n) for n in range(3)]
    selection = select_rows([a_shard([[0, n, 0, 0] for n in (1, 3, 2)])], HEADS, ratio=0.5)
    write_selection(tmp_path / "selection.jsonl", selection, rows)

    assert list(load_kept(tmp_path / "selection.jsonl")) == [rows[1], rows[2]]
    first, second, _ = read_selection(tmp_path / "selection.jsonl")
    assert (first.kept, first.prompt, first.rank, first.line) == (False, None, 2, 0)
    assert (second.kept, second.prompt, second.rank, second.score) == (True, "prompt 1", 0, 3.0)
    assert "prompt 0" not in (tmp_path / "selection.jsonl").read_text()


def test_the_summary_gives_the_border_of_what_was_kept() -> None:
    summary = summarise(select_rows([a_shard([[0, n, 0, 0] for n in range(10)])], HEADS, ratio=0.3))

    assert (summary.rows, summary.kept, summary.kept_score_min) == (10, 3, 7.0)
    assert summary.score_quantiles[0] == 0.0


def test_a_choice_among_equal_scores_is_told() -> None:
    tied = summarise(select_rows([a_shard([[0.0, 5.0, 0.0, 0.0]] * 9 + [[0.0, 6.0, 0.0, 0.0]])], HEADS, ratio=0.3))
    clear = summarise(select_rows([a_shard([[0.0, 5.0, 0.0, 0.0]] * 7 + [[0.0, 6.0, 0.0, 0.0]] * 3)], HEADS, ratio=0.3))

    assert tied.warnings[0].startswith("9 rows share the score at which the selection ends. The 2 of them")
    assert clear.warnings == []


def test_no_scored_row_at_all_stops_the_job() -> None:
    none = replace(
        a_shard([[0.0, 5.0, 0.0, 0.0]] * 3), row_R=np.zeros(0, dtype=np.int64), response_RN=np.zeros((0, 4), np.float16)
    )

    with pytest.raises(ConfigError, match="could score no row"):
        select_rows([none], HEADS, ratio=0.3)


def test_selecting_and_reporting_leave_torch_alone() -> None:
    code = "import sys, p2d.steps, p2d.selection, p2d.report, p2d.plans, p2d.jobs; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True)
