"""What a job without settings stands for, rule by rule, and that each rule says why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2d.config import (
    DEFAULT_RATIO,
    MAX_EPOCHS,
    MIN_GUIDE,
    MIN_ROWS,
    MIN_STEPS,
    RECIPES,
    DataConfig,
    HeadsConfig,
    JobConfig,
    TrainingConfig,
    epochs_of,
    head_choice,
    heads_ratio,
    least_proxy_rows,
    most_kept,
    pool_count,
    proxy_count,
    rank_of,
    samples_first,
)
from p2d.config_checks import check
from p2d.errors import ConfigError
from p2d.resolution import Resolution, resolve, settled

MEASURED = "docs/results/quality.md"
CHOSEN = DataConfig(scorer="alignment_likelihood")
OWN_GUIDE = "Rows held out of the dataset itself guide the choice of rows"


def found(
    rows: int = 2000, *, head_dim: int = 64, map_scorer: str | None = None, validation_guide: int = 0, **asked: Any
) -> Resolution:
    return resolve(
        JobConfig(**asked),
        rows=rows,
        context_length=64,
        head_dim=head_dim,
        map_scorer=map_scorer,
        validation_guide=validation_guide,
    )


def test_a_job_without_settings_trains_a_low_rank_in_all_heads_once_on_the_rows_that_pass_by_their_words() -> None:
    made = found()
    heads, data, training = made.config.heads, made.config.data, made.config.training

    assert (heads.scorer, heads.ratio) == ("uniform", 1.0)
    assert (data.scorer, data.ratio, data.mode) == ("lexical", "auto", "faithful")
    assert (training.slices, training.rank, training.epochs) == (("v", "o"), 8, 1)
    for pointer in ("/heads/ratio", "/data/scorer", "/training/rank", "/training/epochs"):
        assert MEASURED in made.reasons[pointer]
    assert "none to choose" in made.reasons["/heads/scorer"]
    assert "no validation dataset of 20 rows or more vouches for a choice" in made.reasons["/data/scorer"]
    assert "all rows but those whose answer goes better with other prompts" in made.reasons["/data/ratio"]
    assert made.warnings == ()


@pytest.mark.parametrize(
    "asked",
    [
        {"kind": "select_data"},
        {"controls": ("random_data",)},
        {"data": DataConfig(scorer="alignment_likelihood")},
        {"data": DataConfig(mode="fast")},
        {"data": DataConfig(selection="sel_0")},
        {"recipe": "paper"},
    ],
)
def test_rows_are_chosen_without_a_validation_dataset_where_anything_asks_for_it(asked: dict[str, Any]) -> None:
    data = found(**asked).config.data

    assert (data.scorer, data.ratio) == (("icl", 0.1) if "recipe" in asked else ("alignment_likelihood", 0.5))


def test_words_decide_how_many_rows_are_kept_where_the_data_scorer_is_theirs_unless_a_ratio_is_given() -> None:
    for kind in ("adapt", "select_data"):
        made = found(data=DataConfig(scorer="lexical"), kind=kind, validation_guide=32)
        assert (made.config.data.ratio, made.config.data.mode) == ("auto", "faithful")
        assert samples_first(made.config) is False  # there is no sample: all rows are looked at
    half = found(data=DataConfig(scorer="lexical", ratio=0.5)).config

    config, reasons = settled(found(100).config, found(100).reasons, kept=80, rows=100)

    assert half.data.ratio == 0.5
    assert config.data.ratio == 0.8
    assert reasons["/data/ratio"].startswith("all rows but those whose answer goes better with other prompts")


def test_a_data_scorer_that_ranks_nothing_keeps_the_first_rows_and_says_so() -> None:
    made = found(data=DataConfig(scorer="uniform", ratio=0.3))

    assert made.config.data.ratio == 0.3
    assert any("ranks nothing: data.ratio keeps the first rows" in warning for warning in made.warnings)
    whole = found(data=DataConfig(scorer="uniform"), kind="select_data")
    assert (whole.config.data.ratio, whole.warnings) == (1.0, ())


@pytest.mark.parametrize(("rows", "kept", "epochs"), [(300, 30, 3), (300, 66, 2), (1000, 220, 1), (1000, 1000, 1)])
def test_once_the_run_knows_how_many_rows_are_kept_epochs_are_as_many_as_these_ask_for(
    rows: int, kept: int, epochs: int
) -> None:
    made = found(rows, validation_guide=32)

    config, reasons = settled(made.config, made.reasons, kept=kept, rows=rows)

    same = found(rows, data=DataConfig(ratio=kept / rows)).config.training
    assert config.data.ratio == kept / rows
    assert (config.training.epochs, config.training) == (epochs, same)
    assert reasons["/data/ratio"] == "as many rows as seemed to be like those of the validation dataset"
    assert f"{epochs}: " in reasons["/training/epochs"]
    given = found(rows, validation_guide=32, training=TrainingConfig(epochs=5))
    assert settled(given.config, given.reasons, kept=kept, rows=rows)[0].training.epochs == 5
    named = found(rows, data=DataConfig(ratio=0.3))
    assert settled(named.config, named.reasons, kept=kept, rows=rows) == (named.config, named.reasons)


def test_a_rate_that_was_searched_for_is_told_and_one_that_was_given_stays() -> None:
    made = found()
    given = found(training=TrainingConfig(learning_rate=1e-3))

    config, reasons = settled(made.config, made.reasons, learning_rate=2e-3)

    assert (config.training.learning_rate, config.data) == (2e-3, made.config.data)
    assert reasons["/training/learning_rate"] == "the best of a short search on held-out rows"
    assert settled(given.config, given.reasons, learning_rate=2e-3) == (given.config, given.reasons)


def test_a_validation_dataset_decides_how_many_rows_are_kept_inside_the_run() -> None:
    made = found(rows=5000, validation_guide=32)
    data = made.config.data

    assert (data.scorer, data.ratio, data.mode) == ("alignment_likelihood", "auto", "fast")
    assert (most_kept(data, 5000), pool_count(data, 5000), epochs_of(made.config.training)) == (5000, 5000, 1)
    assert "as many rows as seem to be like those of the validation dataset" in made.reasons["/data/ratio"]


@pytest.mark.parametrize(("rows", "told"), [(300, "30 of 300"), (1990, "199 of 1990"), (2000, None)])
def test_a_dataset_of_which_a_tenth_is_too_few_rows_is_told_so_before_the_run(rows: int, told: str | None) -> None:
    warnings = found(rows, validation_guide=32).warnings

    assert [f"keeps as few as {told} rows" in warning for warning in warnings] == ([] if told is None else [True])


@pytest.mark.parametrize(
    "asked",
    [
        {"recipe": "paper"},
        {"data": DataConfig(scorer="alignment")},
        {"data": DataConfig(ratio=0.3)},
        {"data": DataConfig(scorer="alignment_likelihood"), "validation_guide": MIN_GUIDE - 1},
        {"data": DataConfig(selection="sel_0")},
    ],
)
def test_the_ratio_is_a_number_where_no_guide_of_another_dataset_measures_rows(asked: dict[str, Any]) -> None:
    ratio = found(**{"validation_guide": 32} | asked).config.data.ratio

    assert ratio == {"paper": DEFAULT_RATIO}.get(
        asked.get("recipe", ""), 0.3 if asked.get("data") == DataConfig(ratio=0.3) else 0.5
    )


def test_the_recipe_of_the_paper_is_what_it_was() -> None:
    for rows, kept in ((5000, 500), (1000, MIN_ROWS), (100, 100)):
        made = found(rows, recipe="paper")
        heads, data, training = made.config.heads, made.config.data, made.config.training

        assert (heads.scorer, heads.ratio, heads.proxy_rows) == ("pad", 0.10, min(100, rows))
        assert (data.scorer, data.mode, most_kept(data, rows)) == ("icl", "faithful", kept)
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


@pytest.mark.parametrize(
    ("rows", "apart", "asked", "told"),
    [
        (2000, False, {}, False),  # all rows are kept
        (2000, False, {"controls": ("random_data",)}, True),
        (2000, True, {}, False),
        (200, False, {"data": DataConfig(scorer="alignment_likelihood")}, False),
        (2000, False, {"kind": "identify_heads"}, False),
        (2000, False, {"kind": "select_data"}, True),
        (2000, False, {"data": DataConfig(selection="sel_1")}, False),
        (2000, False, {"data": DataConfig(scorer="random")}, False),
        (2000, False, {"recipe": "paper"}, False),
    ],
)
def test_rows_of_the_dataset_itself_vouch_for_no_others(
    rows: int, apart: bool, asked: dict[str, Any], told: bool
) -> None:
    made = found(rows, validation_guide=32 if apart else 0, **asked)

    assert any("as clean as it is" in warning for warning in made.warnings) == told
    assert len(made.warnings) == told


@pytest.mark.parametrize(
    ("rows", "asked", "named"),
    [
        (50, {"controls": ("random_data", "lora")}, ["data.ratio"]),
        (2000, {"controls": ("random_data",), "data": DataConfig(ratio=1.0)}, ["data.ratio"]),
        (2000, {"controls": ("random_heads",), "heads": HeadsConfig(ratio=1.0)}, ["heads.ratio"]),
        (
            50,
            {"controls": ("random_heads", "random_data"), "heads": HeadsConfig(ratio=1)},
            ["heads.ratio", "data.ratio"],
        ),
        (2000, {"controls": ("random_heads", "random_data", "lora")}, []),
        (50, {"controls": ("random_data",), "data": DataConfig(selection="sel_1")}, []),
        (50, {}, []),
    ],
)
def test_a_control_that_draws_what_the_job_has_already_is_warned_of(
    rows: int, asked: dict[str, Any], named: list[str]
) -> None:
    warnings = [warning for warning in found(rows, **asked).warnings if not warning.startswith(OWN_GUIDE)]

    assert all(warning.endswith(f"set {name} below 1.") for warning, name in zip(warnings, named, strict=True))


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
    [(2000, 4, 1), (117, 4, 1), (116, 4, 2), (57, 4, 2), (56, 4, 3), (8, 4, 3), (2000, 34, 1), (2000, 35, 2)],
)  # fmt: skip
def test_rows_are_seen_once_where_that_makes_steps_enough(rows: int, batch_size: int, epochs: int) -> None:
    made = found(rows, training=TrainingConfig(batch_size=batch_size), data=CHOSEN)
    kept = most_kept(made.config.data, rows)
    steps = -(-kept // batch_size)

    assert made.config.training.epochs == epochs
    assert epochs == MAX_EPOCHS or steps * epochs >= MIN_STEPS
    assert epochs == 1 or steps * (epochs - 1) < MIN_STEPS
    assert ("more rows once" in made.reasons["/training/epochs"]) == (epochs == 1)
    assert epochs_of(found(rows, training=TrainingConfig(epochs=5)).config.training) == 5


@pytest.mark.parametrize(("rows", "kept"), [(10_000, 5000), (400, 200), (399, 200), (200, 200), (50, 50)])
def test_half_of_the_rows_are_kept_but_never_so_few_that_their_number_counts(rows: int, kept: int) -> None:
    made = found(rows, data=CHOSEN)

    assert most_kept(made.config.data, rows) == kept
    assert len(made.warnings) == (kept < rows)


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
