"""What is good enough: rows are measured by the guide's own, and chance decides among those that reach it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2d.guide_scale import outscored
from p2d.response_matrix import ResponseShard, read_shards, save_shard
from p2d.rows import Row
from p2d.selection import select_rows, summarise
from p2d.selection_reasons import explain
from tests.p2d.test_selection import HEADS, a_shard, selected

GUIDE = [[0.0, response, 0, 0] for response in (1, 2, 3, 4, 5)]
"""With the same qualities: median 3, spread 1.48, and the bar is 0.4 of the way up: 2.6 in both."""


def rated(responses: list[float], qualities: list[float]) -> ResponseShard:
    return a_shard(
        [[0, response, 0, 0] for response in responses],
        qualities,
        combine="guide",
        guide_response_GN=np.array(GUIDE, dtype=np.float16),
        guide_quality_G=np.array([1, 2, 3, 4, 5], dtype=np.float32),
    )


def test_rows_that_are_as_good_as_most_of_the_guides_come_first_in_an_order_by_chance(seed: int) -> None:
    good, bad = [(3 + n, 10 - n) for n in range(8)], [(9, 2.4), (2.0, 9), (0, 0), (1.5, 1.5)]
    shard = rated(*map(list, zip(*(bad + good), strict=True)))
    rows = [Row(f"prompt{n}", f"answer{n}", line=n) for n in range(12)]

    selections = [select_rows([shard], HEADS, 0.5, rows, seed=seed + n) for n in range(200)]

    assert {one.good_enough for one in selections} == {8}
    for one in selections:
        assert set(one.rank_R[4:].tolist()) == set(range(8))
        assert one.rank_R[:4].tolist() == [8, 9, 11, 10]
    firsts = {int(np.flatnonzero(one.rank_R == 0)[0]) for one in selections}
    assert firsts == set(range(4, 12))
    again = select_rows([shard], HEADS, 0.5, rows, seed=seed)
    assert again.score_R.tolist() == selections[0].score_R.tolist()
    assert len(set(again.score_R.tolist())) == 12


def test_below_the_bar_a_score_is_the_lesser_part_in_spreads_from_the_guides_median() -> None:
    score_R = selected([rated([2, 9, 1], [9, 0, 1])], HEADS, 1.0).score_R

    assert score_R.tolist() == pytest.approx([-1 / 1.4826, -3 / 1.4826, -2 / 1.4826])


def test_a_guide_of_rows_that_are_all_alike_measures_in_units() -> None:
    shard = replace(rated([2, 3, 4], [3, 3, 3]), guide_response_GN=np.array([GUIDE[2]] * 5, dtype=np.float16))

    selection = selected([shard], HEADS, 1.0)

    assert selection.score_R[0] == -1
    assert selection.good_enough == 2


LIKE = [1.0, 2, 3, 4, 5] * 4
"""Scores as the guide's own."""


@pytest.mark.parametrize(("bad", "like_guide"), [(0, True), (2, True), (10, False), (20, False)])
def test_of_a_pool_that_scores_like_the_guide_every_row_is_good_enough(bad: int, like_guide: bool) -> None:
    values = LIKE + [-9] * bad
    rows = [Row(f"prompt{n}", f"answer{n}", line=n) for n in range(len(values))]

    selection = select_rows([rated(values, values)], HEADS, 0.5, rows, seed=0, guide_apart=True)

    assert selection.like_guide == like_guide
    assert selection.good_enough == (len(values) if like_guide else 12)
    if like_guide:
        assert summarise(selection).warnings == []
        assert summarise(selection).like_guide
        assert len(set(selection.score_R.tolist())) == len(values)
        assert not set(selection.kept_rows) <= {n for n, value in enumerate(values) if value >= 3}


def test_rows_held_out_of_the_pool_itself_say_nothing_of_how_good_it_is() -> None:
    selection = selected([rated(LIKE, LIKE)], HEADS, 0.5)

    assert (selection.like_guide, selection.good_enough) == (False, 12)


@pytest.mark.parametrize(
    ("guide", "pool", "share"),
    [
        ([1, 2], [1, 2], 0.5),
        ([3, 4], [1, 2], 1.0),
        ([0, 0], [1, 2], 0.0),
        ([2, 2], [2, 2, 2], 0.5),
        ([2], [1, 2, 3, 0], 0.625),
    ],
)
def test_how_often_the_guide_outscores_the_pool_counts_every_pair_and_ties_half(
    guide: list[float], pool: list[float], share: float
) -> None:
    assert outscored(np.array(guide, dtype=float), np.array(pool, dtype=float)) == share


def test_a_pool_of_one_row_and_a_guide_that_is_all_alike_are_measured_too() -> None:
    alike = replace(rated([3], [3]), guide_response_GN=np.array([GUIDE[2]] * 5, dtype=np.float16))
    rows = [Row("prompt", "answer", line=1)]

    for shard in (rated([9], [9]), rated([-9], [-9]), alike):
        selection = select_rows([shard], HEADS, 1.0, rows, seed=0, guide_apart=True)
        assert selection.kept_rows == [0]
        assert np.isfinite(selection.score_R).all()


def test_in_fast_mode_rows_that_were_not_scored_stay_behind_a_pool_like_the_guide() -> None:
    shard = replace(rated([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]), span=range(8), row_R=np.array([0, 2, 4, 5, 7]))
    rows = [Row(f"prompt{n}", f"answer{n}", line=n) for n in range(8)]

    selection = select_rows([shard], HEADS, 1.0, rows, seed=0, guide_apart=True)

    assert selection.like_guide
    assert selection.kept_rows == [0, 2, 4, 5, 7]
    assert np.isnan(selection.score_R[[1, 3, 6]]).all()


@pytest.mark.parametrize(("good", "bad", "seem_good"), [(12, 8, 20), (6, 14, 10), (3, 17, 5), (0, 20, 0), (20, 0, 20)])
def test_as_many_rows_seem_good_as_the_guides_own_share_above_the_bar_makes_of_those_above_it(
    good: int, bad: int, seem_good: int
) -> None:
    values = [4.0] * good + [-9.0] * bad  # of the guide 3 of 5 reach the bar, and so many of all good rows

    selection = selected([rated(values, values)], HEADS, 0.5)

    assert (selection.seem_good, selection.good_enough) == (seem_good, good)


def test_a_ratio_that_is_left_open_keeps_as_many_as_seem_good_best_first_and_a_tenth_at_least() -> None:
    some, none = ([4.0] * good + [1.0] + [-9.0] * (29 - good) for good in (6, 0))

    assert selected([rated(some, some)], HEADS, "auto").kept_rows[:8] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert selected([rated(some, some)], HEADS, "auto").kept == 10
    assert selected([rated(none, none)], HEADS, "auto").kept_rows == [0, 1, 2]


def test_a_ratio_that_is_left_open_keeps_a_pool_like_the_guide_but_for_what_repeats() -> None:
    rows = [Row(f"the same question of ever the same words {n // 19}", "its answer", line=n) for n in range(20)]

    selection = select_rows([rated(LIKE, LIKE)], HEADS, "auto", rows, seed=0, guide_apart=True)

    assert selection.like_guide
    assert selection.kept == selection.seem_good == len(rows) - int((selection.repeats_R >= 0).sum()) < 20
    assert summarise(selection).warnings == []


def sampled(start: int, stop: int) -> ResponseShard:
    """A shard of which five rows were scored, and the rest is taken to be like the guide."""
    return replace(
        rated([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        span=range(start, stop),
        row_R=np.arange(start, start + 5),
        rest_like_guide=True,
    )


def test_rows_that_a_sample_vouches_for_are_as_good_as_any() -> None:
    selection = selected([sampled(0, 40)], HEADS, 0.5)

    assert (selection.scored, selection.trusted, selection.kept, selection.good_enough) == (5, 35, 20, 40)
    assert len(set(selection.score_R.tolist())) == 40
    assert not set(selection.kept_rows) <= set(range(20))
    assert selection.quality_R is not None
    assert np.isnan(selection.quality_R).sum() == 35
    assert summarise(selection).warnings == []


def test_rows_that_do_not_read_like_the_guide_are_not_vouched_for_and_come_last(tmp_path: Path) -> None:
    shard = replace(
        sampled(0, 40),
        response_RN=np.array([[0, value, 0, 0] for value in (1, 2, 3, -9, 5)], dtype=np.float16),
        unlike_R=np.array([3, 4, *range(10, 25)]),
    )
    save_shard(tmp_path / "a.safetensors", shard)

    (read,) = read_shards([tmp_path / "a.safetensors"])
    texts = [Row(f"prompt{n}", f"answer{n}", line=n) for n in range(40)]
    selection = select_rows([read], HEADS, "auto", texts, seed=0, guide_apart=True)

    assert (selection.scored, selection.trusted, selection.unlike, selection.like_guide) == (5, 20, 15, False)
    # A row that was scored all the same is judged by its score: the one of the two that reaches the bar stands for two.
    assert selection.kept == selection.seem_good == 3 + 20 + 2
    assert selection.kept_rows == [*range(10), *range(25, 40)]
    assert np.isnan(selection.score_R[10:25]).all()
    assert sorted(selection.rank_R[10:25].tolist()) == list(range(25, 40))
    assert summarise(selection).unlike == 15


def test_all_rows_that_read_like_the_guide_are_not_the_pool_and_where_they_are_too_few_it_is_told() -> None:
    like = replace(sampled(0, 40), unlike_R=np.arange(5, 39))
    texts = [Row(f"prompt{n}", f"answer{n}", line=n) for n in range(40)]
    few = select_rows([like], HEADS, "auto", texts, seed=0, guide_apart=True)
    bad = replace(like, response_RN=np.array([[0, -9, 0, 0]] * 5, dtype=np.float16), unlike_R=np.arange(1, 39))
    worse = select_rows([bad], HEADS, "auto", texts, seed=0, guide_apart=True)

    assert (few.kept, few.seem_good, few.like_guide) == (6, 6, False)  # none of the scored ones is doubted
    assert (worse.kept, worse.seem_good) == (4, 2)  # a tenth at least
    assert any("About 2 rows seem to be like the held-out ones, and 4" in text for text in summarise(worse).warnings)


def test_a_sample_vouches_for_its_own_shard_alone() -> None:
    doubted = replace(
        rated([4.0] * 3 + [-9.0] * 7, [4.0] * 3 + [-9.0] * 7), span=range(40, 50), row_R=np.arange(40, 50)
    )
    rows = [Row(f"prompt{n}", f"answer{n}", line=n) for n in range(50)]

    selection = select_rows([sampled(0, 40), doubted], HEADS, "auto", rows, seed=0, guide_apart=True)

    assert (selection.like_guide, selection.scored, selection.trusted) == (False, 15, 35)
    assert selection.kept == selection.seem_good == 45
    assert set(selection.kept_rows) > set(range(43))


def test_where_more_is_kept_than_seems_good_it_is_told() -> None:
    values = [3, 4, 3, 1, 0, -1, -2, -3, -4.0, -5]
    shard = rated(values, values)

    enough, too_few, every = (summarise(selected([shard], HEADS, ratio)) for ratio in (0.6, 0.8, 1.0))

    assert (enough.warnings, every.warnings, enough.good_enough, enough.seem_good) == ([], [], 3, 5)
    assert too_few.warnings[0].startswith(
        "About 5 rows seem to be like the held-out ones, and 8 that repeat no other were kept"
    )


def test_copies_are_not_called_bad() -> None:
    rows = [Row(f"the same question of ever the same words {n // 2}", "its answer", line=n) for n in range(20)]

    warnings = summarise(select_rows([rated(LIKE, LIKE)], HEADS, 0.9, rows, seed=0, guide_apart=True)).warnings

    assert warnings
    assert not any("seem to be like" in warning for warning in warnings)


def test_a_guide_that_is_too_small_to_measure_is_told() -> None:
    shard = replace(
        a_shard([[0, 3, 0, 0], [0, 2, 0, 0]], [3.0, 2.0], combine="worse_rank"), scorer="alignment_likelihood"
    )

    assert summarise(selected([shard], HEADS, 0.5)).warnings[0].startswith("Too few held-out rows guide the choice")
    assert summarise(selected([shard], HEADS, 1.0)).warnings == []
    assert summarise(selected([replace(shard, scorer="alignment_information")], HEADS, 0.5)).warnings == []


def test_the_measure_is_of_the_heads_that_were_chosen() -> None:
    guide = np.array([[0, response, 10, 0] for response in (1, 2, 3, 4, 5)], dtype=np.float16)
    shard = replace(rated([3, 9], [3, 3]), guide_response_GN=guide)

    assert selected([shard], [(0, 1)], 0.5).good_enough == 2
    assert selected([shard], HEADS, 0.5).good_enough == 0  # 9 alone is less than 2 and 10


def test_shards_of_two_versions_are_joined_by_what_both_know() -> None:
    older = a_shard([[0, 2, 0, 0], [0, 3, 0, 0]], [3.0, 2.0], start=4, combine="worse_rank")

    selection = selected([rated([5, 4, 1, 0], [5, 4, 1, 0]), older], HEADS, 0.5)

    assert (selection.combine, selection.good_enough) == ("worse_rank", None)
    assert selection.kept_rows == [0, 1, 4]


def test_a_guide_that_was_rated_reads_back(tmp_path: Path) -> None:
    shard = rated([2, 3], [2, 3])
    save_shard(tmp_path / "a.safetensors", shard)

    (found,) = read_shards([tmp_path / "a.safetensors"])

    for name in ("guide_response_GN", "guide_quality_G"):
        np.testing.assert_array_equal(getattr(found, name), getattr(shard, name))


def test_of_rows_that_pass_or_do_not_all_that_pass_are_kept_and_chance_decides_among_equals(seed: int) -> None:
    shard = a_shard([[]] * 12, [1.0, 0.0] * 6, combine="pass", layers=range(0))
    rows = [Row(f"prompt{n}", f"answer{n}", line=n) for n in range(10)]
    rows += [Row("prompt2", "answer2", line=10), Row("prompt11", "answer11", line=11)]

    selection = select_rows([shard], HEADS, "auto", rows, seed=seed)

    assert selection.kept_rows == [0, 2, 4, 6, 8] or selection.kept_rows == [
        0,
        4,
        6,
        8,
        10,
    ]  # one of two that are the same
    assert (selection.good_enough, selection.seem_good, selection.bar, selection.like_guide) == (6, 5, 1.0, False)
    assert summarise(selection).warnings == []
    firsts = {int(np.flatnonzero(select_rows([shard], HEADS, 0.2, rows, seed=n).rank_R == 0)[0]) for n in range(60)}
    assert firsts == {0, 2, 4, 6, 8, 10}
    more = summarise(select_rows([shard], HEADS, 0.9, rows, seed=seed))
    assert [warning.split(",")[0] for warning in more.warnings] == [
        "About 5 rows have answers that go with their prompts"
    ]


def test_why_a_row_that_passed_has_its_score() -> None:
    shard = a_shard([[]] * 2, [1.0, 0.0], combine="pass", layers=range(0))

    reason = explain(shard, 0, HEADS)

    assert reason is not None
    assert (reason.quality, reason.bar, reason.guide) == (1.0, 1.0, None)
    assert "1 where the row passes" in reason.formula
