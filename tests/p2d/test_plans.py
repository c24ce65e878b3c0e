"""Nothing is chosen by the rows that the result is judged on, and a plan survives its file."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2d.config import MIN_PROXY_ROWS, Auto, HeadsConfig, JobConfig, least_proxy_rows, proxy_count
from p2d.errors import DatasetTooSmall
from p2d.model_info import ModelInfo
from p2d.plans import GUIDE_ROWS, HELD_OUT_ROWS, Plan, RowCounts, leaked, load_plan, save_plan, split_rows
from p2d.resolution import resolve
from p2d.rows import Row

ROWS = [Row(f"p{n}", f"a{n}", n) for n in range(1000)]


def test_the_three_sets_are_disjoint_and_lose_no_row() -> None:
    split = split_rows(ROWS[:200], None, seed=1, proxy_rows=100)

    lines = [row.line for rows in (split.train, split.guide, split.evaluation) for row in rows]
    assert sorted(lines) == list(range(200))
    assert (len(split.train), len(split.guide), len(split.evaluation)) == (160, 16, 24)


def test_held_out_rows_are_capped_however_large_the_dataset() -> None:
    split = split_rows(ROWS, None, seed=1, proxy_rows=100)

    assert len(split.guide) == GUIDE_ROWS
    assert len(split.guide) + len(split.evaluation) == HELD_OUT_ROWS


def test_a_validation_dataset_leaves_all_rows_to_training() -> None:
    split = split_rows(ROWS[:300], ROWS[300:360], seed=0, proxy_rows=24)

    assert split.train == ROWS[:300]
    assert (len(split.guide), len(split.evaluation)) == (24, 36)


def test_the_split_follows_from_the_seed() -> None:
    def guides(seed: int) -> list[Row]:
        return list(split_rows(ROWS, None, seed=seed, proxy_rows=4).guide)

    assert guides(5) == guides(5) != guides(6)


@pytest.mark.parametrize(("rows", "validation", "proxy"), [(110, None, 100), (100, 2, 100), (12, None, 4), (3, 10, 4)])
def test_too_few_rows_are_refused_with_numbers(rows: int, validation: int | None, proxy: int) -> None:
    held_out = None if validation is None else ROWS[500 : 500 + validation]

    with pytest.raises(DatasetTooSmall) as caught:
        split_rows(ROWS[:rows], held_out, seed=0, proxy_rows=proxy)

    assert caught.value.facts["rows"] < caught.value.facts["needed"]


def test_proxy_rows_left_to_auto_are_what_small_data_allow() -> None:
    for rows, expected in ((1000, 100), (100, 100), (99, 99), (16, 16)):
        found = resolve(JobConfig(kind="identify_heads"), rows=rows, context_length=64, head_dim=64)
        assert proxy_count(found.config.heads) == expected
        assert str(expected) in found.reasons["/heads/proxy_rows"]
    asked = JobConfig(heads=HeadsConfig(scorer="shift", proxy_rows=40))
    given = resolve(asked, rows=1000, context_length=64, head_dim=64)
    assert proxy_count(given.config.heads) == 40
    assert "/heads/proxy_rows" not in given.reasons


@pytest.mark.parametrize(("rows", "needed"), [("auto", MIN_PROXY_ROWS), (40, 40)])
def test_an_automatic_proxy_has_a_floor_and_a_given_one_is_obeyed_or_refused(rows: int | Auto, needed: int) -> None:
    proxy_rows = least_proxy_rows(JobConfig(heads=HeadsConfig(scorer="attribution", proxy_rows=rows)))

    assert len(split_rows(ROWS[: needed * 5 // 4], None, seed=0, proxy_rows=proxy_rows).train) == needed
    with pytest.raises(DatasetTooSmall, match=f"needs at least {needed}"):
        split_rows(ROWS[: needed * 5 // 4 - 2], None, seed=0, proxy_rows=proxy_rows)


def test_held_out_rows_that_stand_in_training_are_counted() -> None:
    again = [Row("p3", "a3", 1), Row("new", "a", 2), Row("p5", "another answer", 3)]

    assert leaked(split_rows(ROWS[:300], again, seed=0, proxy_rows=4)) == 1


def test_a_plan_reads_back_as_it_was_written(tmp_path: Path) -> None:
    counts = RowCounts(rows=3, tokens=30, answer_tokens=10, longest=12)
    info = ModelInfo(
        name="m", digest="d", model_type="llama", n_layers=1, n_heads=2, n_kv_groups=1, head_dim=4, hidden_size=8,
        intermediate_size=16, vocab_size=32, context_length=64, parameters=999, dtype="fp32",
    )  # fmt: skip
    plan = Plan(
        config=resolve(JobConfig(controls=("random_heads",)), rows=300, context_length=64, head_dim=64).config,
        reasons={"/data/ratio": "because"},
        warnings=["mind"],
        model=info,
        train=counts,
        guide=counts,
        evaluation=counts,
        content_hash="h",
        device="cpu",
        dtype="fp32",
        estimate_s={"heads": 1.5},
    )

    save_plan(tmp_path / "plan.json", plan)

    assert load_plan(tmp_path / "plan.json") == plan
