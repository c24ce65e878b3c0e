"""Selection is arithmetic: the right rows, ties by order, the same through files, and no torch."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d.config import DATA_SCORERS, Auto
from p2d.errors import ConfigError, EngineError
from p2d.response_matrix import Combine, ResponseShard, read_shards, save_shard
from p2d.rows import Row
from p2d.selection import Selection, select_rows, summarise
from p2d.selection_file import check_selection, load_kept, read_selection, write_selection
from p2d.selection_table import read_table

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
    **guide: Any,
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
        **guide,
    )


def selected(shards: list[ResponseShard], heads: list[tuple[int, int]], ratio: float | Auto) -> Selection:
    """A selection over rows that have no word in common."""
    rows = [Row(f"prompt{n}", f"answer{n}", line=n) for n in range(shards[-1].span.stop)]
    return select_rows(shards, heads, ratio, rows, seed=0)


def test_only_the_chosen_heads_count() -> None:
    selection = selected([a_shard([[9, 1, 1, 9], [0, 3, 3, 0], [9, 2, 2, 9]])], HEADS, ratio=1 / 3)

    assert selection.score_R.tolist() == [2, 6, 4]
    assert selection.kept_rows == [1]


def test_ties_are_broken_by_row_order() -> None:
    selection = selected([a_shard([[0, 1, 0, 0]] * 5)], HEADS, ratio=0.4)

    assert selection.kept_rows == [0, 1]
    assert selection.rank_R.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("ratio", "kept"), [(0.01, 1), (0.1, 1), (0.11, 2), (0.3, 3), (1.0, 10)])
def test_a_ratio_keeps_its_ceiling_and_never_nothing(ratio: float, kept: int) -> None:
    selection = selected([a_shard([[0, row, 0, 0] for row in range(10)])], HEADS, ratio=ratio)

    assert len(selection.kept_rows) == kept


def test_a_product_weighs_the_response_by_quality() -> None:
    selection = selected([a_shard([[0, 2, 0, 0], [0, 3, 0, 0]], [4.0, 1.0], combine="product")], HEADS, ratio=0.5)

    assert selection.score_R.tolist() == [8, 3]


def test_ranks_combine_whatever_the_units() -> None:
    shard = a_shard([[0, 1, 0, 0], [0, 2, 0, 0], [0, 3, 0, 0]], [0.0, 1e6, 2e6], combine="worse_rank")

    score_R = selected([shard], HEADS, ratio=0.3).score_R

    assert score_R.tolist() == pytest.approx([2 - (2 + 2 / 3), 2 - (1 + 1 / 3), 2])


def test_a_row_is_as_good_as_the_worse_opinion_of_it() -> None:
    best_for_heads, best_by_itself, good_in_both = [0.0, 4, 0, 0], [0.0, 1, 0, 0], [0.0, 3, 0, 0]
    responses = [best_for_heads, best_by_itself, good_in_both, [0.0, 2, 0, 0]]
    shard = a_shard(responses, [0.0, 3.0, 2.0, 1.0], combine="worse_rank")

    assert selected([shard], HEADS, ratio=0.25).kept_rows == [2]


def test_of_rows_whose_worse_opinion_is_the_same_the_better_one_decides() -> None:
    shard = a_shard([[0, 3, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0]], [2.0, 3.0, 1.0], combine="worse_rank")

    selection = selected([shard], HEADS, ratio=1.0)

    assert selection.rank_R.tolist() == [0, 1, 2]  # ranks 0 and 1, 2 and 0, 1 and 2
    assert len(set(selection.score_R.tolist())) == 3


def test_a_row_quality_alone_needs_no_heads() -> None:
    shard = a_shard([[], [], []], [0.5, 2.0, -1.0], combine="quality", layers=range(0))

    selection = selected([shard], HEADS, ratio=0.3)

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
    selection = selected([a_shard([[1, 5], [2, 4]], layers=range(1, 2))], heads, ratio=0.5)

    assert selection.score_R.tolist() == scores
    assert (selection.heads, selection.heads_scored) == (2, scored)


def test_a_row_outside_the_pool_is_never_kept(tmp_path: Path) -> None:
    rows = [Row(f"prompt {n}", f"answer {n}", line=n) for n in range(6)]
    shards = [
        a_shard([[0, 1, 1, 0]], scored=[2], start=0, stop=3),
        a_shard([[0, 9, 9, 0]], scored=[4], start=3, stop=6),
    ]

    selection = selected(shards, HEADS, ratio=0.5)
    write_selection(tmp_path / "selection.jsonl", selection, rows)

    assert selection.kept_rows == [2, 4]  # ratio asks for three, two were scored
    assert selection.rank_R.tolist() == [2, 3, 1, 4, 0, 5]
    assert [line.score for line in read_selection(tmp_path / "selection.jsonl")] == [None, None, 2.0, None, 18.0, None]
    summary = summarise(selection)
    assert (summary.rows, summary.scored, summary.kept, summary.score_quantiles[0]) == (6, 2, 2, 2.0)


def test_a_score_that_is_not_finite_stops_the_job() -> None:
    with pytest.raises(EngineError) as caught:
        selected([a_shard([[0, 1, 0, 0], [0, float("nan"), 0, 0]])], HEADS, ratio=0.5)

    assert caught.value.facts["rows"] == [1]


def test_sums_are_not_rounded_to_half_precision() -> None:
    selection = selected([a_shard([[0, 2048, 1, 0], [0, 2048, 0, 0]])], HEADS, ratio=0.5)

    assert selection.score_R.tolist() == [2049, 2048]  # fp16 knows no 2049


def test_shards_read_back_in_row_order_whatever_their_names(tmp_path: Path) -> None:
    save_shard(tmp_path / "a.safetensors", a_shard([[0, 1, 0, 0]], start=2))
    save_shard(tmp_path / "b.safetensors", a_shard([[0, 2, 0, 0], [0, 3, 0, 0]], start=0))

    shards = list(read_shards([tmp_path / "a.safetensors", tmp_path / "b.safetensors"]))

    assert selected(shards, HEADS, ratio=1.0).score_R.tolist() == [2, 3, 1]


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    save_shard(tmp_path / "a.safetensors", a_shard([[0, 1, 0, 0]], start=2))

    with pytest.raises(AssertionError, match="expected 0"):
        list(read_shards([tmp_path / "a.safetensors"]))


def test_the_file_holds_the_text_of_kept_rows_alone(tmp_path: Path) -> None:
    rows = [Row(f"prompt {n}", f"answer {n}", line=10 * n) for n in range(3)]
    selection = selected([a_shard([[0, n, 0, 0] for n in (1, 3, 2)])], HEADS, ratio=0.5)
    write_selection(tmp_path / "selection.jsonl", selection, rows)

    assert list(load_kept(tmp_path / "selection.jsonl")) == [rows[1], rows[2]]
    first, second, _ = read_selection(tmp_path / "selection.jsonl")
    assert (first.kept, first.prompt, first.rank, first.line) == (False, None, 2, 0)
    assert (second.kept, second.prompt, second.rank, second.score) == (True, "prompt 1", 0, 3.0)
    assert "prompt 0" not in (tmp_path / "selection.jsonl").read_text()


def test_the_summary_gives_the_border_of_what_was_kept() -> None:
    summary = summarise(selected([a_shard([[0, n, 0, 0] for n in range(10)])], HEADS, ratio=0.3))

    assert (summary.rows, summary.kept, summary.kept_score_min) == (10, 3, 7.0)
    assert summary.score_quantiles[0] == 0.0


def test_a_choice_among_equal_scores_is_told() -> None:
    tied = summarise(selected([a_shard([[0.0, 5.0, 0.0, 0.0]] * 9 + [[0.0, 6.0, 0.0, 0.0]])], HEADS, ratio=0.3))
    clear = summarise(selected([a_shard([[0.0, 5.0, 0.0, 0.0]] * 7 + [[0.0, 6.0, 0.0, 0.0]] * 3)], HEADS, ratio=0.3))

    assert tied.warnings[0].startswith("9 rows share the score at which the selection ends. The 2 of them")
    assert clear.warnings == []


def test_no_scored_row_at_all_stops_the_job() -> None:
    none = replace(
        a_shard([[0.0, 5.0, 0.0, 0.0]] * 3), row_R=np.zeros(0, dtype=np.int64), response_RN=np.zeros((0, 4), np.float16)
    )

    with pytest.raises(ConfigError, match="could score no row"):
        selected([none], HEADS, ratio=0.3)


# --- near duplicates -------------------------------------------------------------------------------------------------


def a_text(seed: object) -> str:
    return " ".join(random.Random(repr(seed)).choices([f"word{n}" for n in range(2000)], k=30))


def in_clusters(sizes: list[int]) -> list[Row]:
    """Rows of which those of one cluster are alike, clusters mixed."""
    rows = [
        Row(a_text((cluster, "prompt")), f"{a_text((cluster, 'answer'))} word{copy}", line=1)
        for cluster, size in enumerate(sizes)
        for copy in range(size)
    ]
    random.Random(0).shuffle(rows)
    return rows


def scored(scores: list[float], rows: list[Row], ratio: float = 0.5, **shard: Any) -> Selection:
    return select_rows(
        [a_shard([[0, score, 0, 0] for score in scores], stop=len(rows), **shard)], HEADS, ratio, rows, seed=0
    )


def cluster_of(row: Row) -> str:
    return row.prompt


def test_a_row_that_nearly_repeats_a_better_one_stands_behind_all_that_do_not() -> None:
    one, other = Row(a_text(1), a_text(2), 1), Row(a_text(3), a_text(4), 2)
    copy = Row(one.prompt, one.answer.rsplit(" ", 1)[0], 3)

    selection = scored([8, 1, 9], [one, other, copy], ratio=2 / 3)

    assert selection.rank_R.tolist() == [2, 1, 0]
    assert selection.repeats_R.tolist() == [2, -1, -1]
    assert selection.kept_rows == [1, 2]
    assert selection.score_R.tolist() == [8, 1, 9]  # a score is what the heads say


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
    st.lists(st.floats(0.01, 1), min_size=2, max_size=4),
    st.booleans(),
)
def test_laws_of_the_ranking(sizes: list[int], chance: random.Random, ratios: list[float], fast: bool) -> None:
    rows = in_clusters(sizes)
    places = sorted(chance.sample(range(len(rows)), (len(rows) + 1) // 2)) if fast else list(range(len(rows)))
    scores = [float(chance.randrange(20)) for _ in places]

    whole = scored(scores, rows, 1.0, scored=places)
    views = [scored(scores, rows, ratio, scored=places) for ratio in sorted(ratios)]

    assert sorted(whole.rank_R) == list(range(len(rows)))
    assert whole.kept_rows == places  # nothing that was scored is left out
    for smaller, larger in pairwise([*views, whole]):
        assert smaller.rank_R.tolist() == larger.rank_R.tolist()
        assert set(smaller.kept_rows) <= set(larger.kept_rows)
    clusters = {cluster_of(rows[at]) for at in places}
    first = np.argsort(whole.rank_R)[: len(clusters)]
    assert {cluster_of(rows[at]) for at in first} == clusters  # the best of each, before any second one
    by_score = sorted(places, key=lambda at: (-whole.score_R[at], at))
    best = {cluster: next(at for at in by_score if cluster_of(rows[at]) == cluster) for cluster in clusters}
    assert first.tolist() == sorted(best.values(), key=by_score.index)
    for at in places:
        assert whole.repeats_R[at] == (-1 if at in best.values() else best[cluster_of(rows[at])])


def test_a_row_that_was_not_scored_is_repeated_by_none_and_repeats_none() -> None:
    rows = in_clusters([4])

    selection = scored([5, 6], rows, 1.0, scored=[1, 3])

    assert selection.repeats_R.tolist() == [-1, 3, -1, -1]
    assert selection.rank_R.tolist() == [2, 1, 3, 0]


def test_scores_by_random_choose_by_nothing_else() -> None:
    rows = in_clusters([4])
    shard = replace(a_shard([[0, 5, 0, 0]] * 4), scorer="random")

    assert select_rows([shard], HEADS, 0.5, rows, seed=0).repeats_R.tolist() == [-1] * 4
    assert "random" in DATA_SCORERS


def test_the_summary_counts_repetitions_and_warns_where_some_were_kept() -> None:
    rows, scores = in_clusters([5, 1, 1]), [float(n) for n in range(7)]

    few, many, every = (summarise(scored(scores, rows, ratio)) for ratio in (0.4, 0.7, 1.0))

    assert [(one.repeating, one.kept, one.kept_repeating) for one in (few, many, every)] == [
        (4, 3, 0),
        (4, 5, 2),
        (4, 7, 4),
    ]
    assert [len(one.warnings) for one in (few, many, every)] == [0, 1, 0]
    assert many.warnings[0].startswith("2 of the 5 kept rows nearly repeat a better one")


def test_ties_are_told_among_rows_that_could_have_been_chosen() -> None:
    tied = [9.0, 9.0, 9.0, 9.0]

    assert summarise(scored(tied, in_clusters([3, 1]), 0.5)).warnings == []
    assert summarise(scored(tied, in_clusters([2, 1, 1]), 0.5)).warnings[0].startswith("3 rows share the score")


def test_the_file_says_which_row_is_repeated_and_older_files_say_nothing(tmp_path: Path) -> None:
    rows, path = in_clusters([2, 2]), tmp_path / "selection.jsonl"
    selection = scored([1, 2, 3, 4], rows, 0.5)
    write_selection(path, selection, rows)

    lines = path.read_bytes().splitlines()
    assert [line.repeats for line in read_selection(path)] == [None if at < 0 else at for at in selection.repeats_R]
    assert read_table(lines).repeats_R.tolist() == selection.repeats_R.tolist()
    check_selection(path, rows)

    older = [{name: value for name, value in json.loads(line).items() if name != "repeats"} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in older))
    assert [line.repeats for line in read_selection(path)] == [None] * 4
    assert read_table(path.read_bytes().splitlines()).repeats_R.tolist() == [-1] * 4
    check_selection(path, rows)
    assert len(load_kept(path)) == 2


def test_selecting_and_reporting_leave_torch_alone() -> None:
    code = "import sys, p2d.steps, p2d.selection, p2d.report, p2d.plans, p2d.jobs; assert 'torch' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True)
