"""What a job without settings stands for, rule by rule, and that each rule says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2d.config import (
    DEFAULT_RATIO,
    MAX_EPOCHS,
    MIN_ROWS,
    MIN_STEPS,
    RECIPES,
    DataConfig,
    HeadsConfig,
    JobConfig,
    TrainingConfig,
    data_ratio,
    epochs_of,
    head_choice,
    heads_ratio,
    least_proxy_rows,
    pool_count,
    proxy_count,
    rank_of,
    top_count,
)
from p2d.config_checks import check
from p2d.errors import ConfigError
from p2d.resolution import Resolution, resolve

MEASURED = "docs/results/quality.md"


def found(rows: int = 2000, *, head_dim: int = 64, map_scorer: str | None = None, **asked: Any) -> Resolution:
    return resolve(JobConfig(**asked), rows=rows, context_length=64, head_dim=head_dim, map_scorer=map_scorer)


def test_a_job_without_settings_trains_a_low_rank_in_all_heads_on_half_of_the_rows_once() -> None:
    made = found()
    heads, data, training = made.config.heads, made.config.data, made.config.training

    assert (heads.scorer, heads.ratio) == ("uniform", 1.0)
    assert (data.scorer, data.ratio, data.mode) == ("alignment_likelihood", 0.5, "fast")
    assert (training.slices, training.rank, training.epochs) == (("v", "o"), 8, 1)
    for pointer in ("/heads/ratio", "/data/ratio", "/data/mode", "/training/rank", "/training/epochs"):
        assert MEASURED in made.reasons[pointer]
    assert "none to choose" in made.reasons["/heads/scorer"]
    assert made.warnings == ()


def test_the_recipe_of_the_paper_is_what_it_was() -> None:
    for rows, kept in ((5000, 500), (1000, MIN_ROWS), (100, 100)):
        made = found(rows, recipe="paper")
        heads, data, training = made.config.heads, made.config.data, made.config.training

        assert (heads.scorer, heads.ratio, heads.proxy_rows) == ("pad", 0.10, min(100, rows))
        assert (data.scorer, data.mode, top_count(data_ratio(data), rows)) == ("icl", "faithful", kept)
        assert (training.slices, training.rank, training.epochs) == (("q", "k", "v"), None, 3)
        assert MEASURED not in "".join(made.reasons.values())


@pytest.mark.parametrize(
    "asked",
    [
        {"kind": "identify_heads"},
        {"heads": HeadsConfig(scorer="attribution")},
        {"heads": HeadsConfig(scorer="random")},
        {"heads": HeadsConfig(head_map="hm_1"), "map_scorer": "shift"},
        {"controls": ("random_heads",)},
    ],
    ids=["no training", "a scorer", "a random scorer", "a head map", "a control of random heads"],
)
def test_what_asks_for_a_choice_of_heads_gets_whole_slices_of_the_best_tenth(asked: dict[str, Any]) -> None:
    made = found(**asked)

    assert made.config.heads.ratio == DEFAULT_RATIO
    assert made.config.heads.scorer not in ("uniform", "auto")
    assert made.config.training.rank is None
    assert "asks for a choice" in made.reasons["/heads/ratio"]


@pytest.mark.parametrize("kind", ["adapt", "select_data"])
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_where_all_heads_are_asked_for_nothing_is_paid_for_choosing(kind: Any, recipe: str) -> None:
    made = found(kind=kind, recipe=recipe, heads=HeadsConfig(ratio=1.0))

    assert made.config.heads.scorer == "uniform"
    assert proxy_count(made.config.heads) == 0
    assert "unused" in made.reasons["/heads/proxy_rows"]
    assert made.config.training.rank == RECIPES[recipe].rank
    assert "/heads/ratio" not in made.reasons
    assert found(kind="identify_heads", recipe=recipe, heads=HeadsConfig(ratio=1.0)).config.heads.scorer != "uniform"


def test_a_map_that_ranks_nothing_is_never_cut_by_default() -> None:
    given = found(heads=HeadsConfig(head_map="hm_1"), map_scorer="uniform")
    named = found(recipe="paper", heads=HeadsConfig(scorer="uniform"))

    for made in (given, named):
        assert (made.config.heads.scorer, made.config.heads.ratio) == ("uniform", 1.0)
        assert "ranks none" in made.reasons["/heads/ratio"]
    cut = found(heads=HeadsConfig(scorer="uniform", ratio=0.2))
    assert cut.config.heads.ratio == 0.2
    assert any("ranks nothing" in warning for warning in cut.warnings)


def test_a_given_ratio_of_heads_is_obeyed_and_trained_whole() -> None:
    made = found(heads=HeadsConfig(ratio=0.3))

    assert (made.config.heads.scorer, made.config.heads.ratio) == ("attribution", 0.3)
    assert made.config.training.rank is None
    assert "/heads/ratio" not in made.reasons


@pytest.mark.parametrize("asked", [{}, {"kind": "select_data"}, {"heads": HeadsConfig(ratio=1, proxy_rows=100)}])
def test_without_a_proxy_no_row_is_too_few_for_one(asked: dict[str, Any]) -> None:
    assert least_proxy_rows(JobConfig(**asked)) == 0
    assert least_proxy_rows(JobConfig(heads=HeadsConfig(scorer="random"))) == 0
    assert least_proxy_rows(JobConfig(kind="identify_heads", heads=HeadsConfig(proxy_rows=40))) == 40
    assert least_proxy_rows(JobConfig(recipe="paper", heads=HeadsConfig(proxy_rows=40))) == 40


def test_what_is_resolved_stays_as_it_is() -> None:
    for recipe in RECIPES:
        once = found(recipe=recipe).config

        assert resolve(once, rows=2000, context_length=64, head_dim=64).config == once


@pytest.mark.parametrize(("head_dim", "rank"), [(4, 4), (8, 8), (128, 8)])
def test_a_rank_left_to_the_service_is_at_most_the_width_of_a_head(head_dim: int, rank: int) -> None:
    made = found(head_dim=head_dim)

    assert rank_of(made.config.training) == rank
    assert str(rank) in made.reasons["/training/rank"]


@pytest.mark.parametrize("rank", [None, 3])
def test_a_given_rank_or_none_is_obeyed_in_all_heads_and_in_some(rank: int | None) -> None:
    for heads in (HeadsConfig(), HeadsConfig(ratio=0.1)):
        made = found(heads=heads, training=TrainingConfig(rank=rank))

        assert made.config.training.rank == rank
        assert "/training/rank" not in made.reasons


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs"),
    [(2000, 4, 1), (480, 4, 1), (473, 4, 1), (472, 4, 2), (117, 4, 2), (116, 4, 3), (8, 4, 3), (2000, 16, 1), (2000, 17, 2)],
)  # fmt: skip
def test_rows_are_seen_once_where_that_makes_steps_enough(rows: int, batch_size: int, epochs: int) -> None:
    made = found(rows, training=TrainingConfig(batch_size=batch_size))
    kept = top_count(data_ratio(made.config.data), rows)
    steps = -(-kept // batch_size)

    assert made.config.training.epochs == epochs
    assert epochs == MAX_EPOCHS or steps * epochs >= MIN_STEPS
    assert epochs == 1 or steps * (epochs - 1) < MIN_STEPS
    assert ("more rows once" in made.reasons["/training/epochs"]) == (epochs == 1)
    assert epochs_of(found(rows, training=TrainingConfig(epochs=5)).config.training) == 5


@pytest.mark.parametrize(("rows", "kept"), [(10_000, 5000), (400, 200), (399, 200), (200, 200), (50, 50)])
def test_half_of_the_rows_are_kept_but_never_so_few_that_their_number_counts(rows: int, kept: int) -> None:
    made = found(rows)

    assert top_count(data_ratio(made.config.data), rows) == kept
    assert made.warnings == ()


def test_fast_mode_is_the_default_where_it_leaves_no_row_unscored() -> None:
    for ratio, mode in ((1.0, "fast"), (0.4, "fast"), (0.39, "faithful"), (0.1, "faithful")):
        made = found(data=DataConfig(ratio=ratio))

        assert made.config.data.mode == mode
        assert pool_count(made.config.data, 2000) == 2000
        assert "/data/mode" in made.reasons
    assert found(data=DataConfig(mode="faithful")).config.data.mode == "faithful"
    assert found(data=DataConfig(ratio=0.1, mode="fast")).config.data.mode == "fast"


@pytest.mark.parametrize(
    "asked",
    [
        {"data": DataConfig(scorer="alignment")},
        {"data": DataConfig(scorer="icl")},
        {"data": DataConfig(scorer="random")},
        {"heads": HeadsConfig(scorer="pad")},
        {"training": TrainingConfig(slices=("q", "k"))},
        {"recipe": "paper", "data": DataConfig(ratio=0.5)},
    ],
)
def test_fast_mode_is_not_the_default_for_what_it_was_not_measured_with(asked: dict[str, Any]) -> None:
    assert found(**asked).config.data.mode == "faithful"
    check(JobConfig(**asked))


def test_fast_mode_may_be_asked_for_with_all_heads() -> None:
    fast = DataConfig(mode="fast")

    check(JobConfig(data=fast, heads=HeadsConfig(ratio=1.0)))
    check(JobConfig(data=fast, heads=HeadsConfig(scorer="uniform")))
    with pytest.raises(ConfigError):
        check(JobConfig(data=fast, heads=HeadsConfig(scorer="shift", ratio=1.0)))


def test_a_recipe_that_is_unknown_is_one_fault_and_stops_no_other_check() -> None:
    wrong = JobConfig(recipe="best", heads=HeadsConfig(proxy_rows=1))

    with pytest.raises(ConfigError) as caught:
        check(wrong)

    assert [error.pointer for error in caught.value.errors] == ["/recipe", "/heads/proxy_rows"]
    assert least_proxy_rows(wrong) == 0


def test_heads_are_chosen_before_any_row_is_read() -> None:
    for config in (JobConfig(), JobConfig(recipe="paper"), JobConfig(kind="identify_heads")):
        for rows in (50, 5000):
            heads = resolve(config, rows=rows, context_length=64, head_dim=64).config.heads
            assert head_choice(config) == (heads.scorer, heads_ratio(heads))
        assert head_choice(replace(config, heads=HeadsConfig(head_map="hm_1")), "kl")[0] == "kl"
