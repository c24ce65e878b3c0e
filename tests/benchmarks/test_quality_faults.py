"""What is wrong with a run of the quality matrix is said: bad options before anything is computed, the rest on its page."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality.__main__ import _options, main
from benchmarks.quality.arms import ARMS, REFERENCE
from benchmarks.quality.cells import Cells, Laboratory
from benchmarks.quality.matrix import Matrix, distinct, run, shown_in
from benchmarks.quality.pools import PoolSpec, build, dialogsum
from benchmarks.quality.tables import Before, page
from p2d.errors import Diverged, OutOfMemory
from p2d.optimization import SliceTrainer
from p2d.rows import Row, write_rows
from tests.benchmarks.test_quality import OTHER, TASK, found, options_of
from tests.factories import some_rows

ONE = "LoRA rank 8, all rows, 1 epoch"


def test_a_page_names_rows_that_leak_and_pools_too_small_to_judge_a_tenth(tmp_path: Path) -> None:
    options = options_of(tmp_path, arm=["all rows, 1 epoch"], share=0.0)
    whole, prompt, near = some_rows(1, first=50)[0], some_rows(1, first=55)[0].prompt, some_rows(1, first=56)[0]
    nearly, long = Row(near.prompt.lower(), f"{near.answer}.", 20), Row("How far?", "far " * 300, 21)
    write_rows(tmp_path / "train.jsonl", [*some_rows(17), whole, Row(prompt, "another answer", 19), nearly, long])
    write_rows(tmp_path / "test.jsonl", [*some_rows(8, first=50), nearly])

    page_of_run = run(options, lambda line: None)

    assert "Left out of gsm8k: 3 training rows. What was kept apart" in page_of_run
    assert "Left out of gsm8k: 1 row kept apart" in page_of_run
    assert "Left out of gsm8k: 1 training row of more than 220 tokens (--max-tokens)." in page_of_run
    assert "not the difference of the two losses" in page_of_run
    assert "gsm8k, 16 rows, clean: 10% of it is 2 rows" in page_of_run
    few = options_of(tmp_path, arm=["all rows, 1 epoch"], share=0.0, rows=8, minutes=0.0, out=tmp_path / "few")
    assert "gsm8k, 8 rows, clean: 10% of it is 1 row." in run(few, lambda line: None)
    write_rows(tmp_path / "train.jsonl", some_rows(17))
    write_rows(tmp_path / "test.jsonl", some_rows(8, first=50))
    assert "Left out" not in run(options, lambda line: None)


def test_held_out_rows_that_repeat_each_other_are_not_counted_twice(tmp_path: Path) -> None:
    options = options_of(tmp_path)
    write_rows(tmp_path / "test.jsonl", [*some_rows(7, first=50), *some_rows(1, first=50)])

    with pytest.raises(ValueError, match="gsm8k has 7 test rows, without 1 that nearly repeats another; 8 are wanted"):
        run(options, lambda line: None)

    rows = [*some_rows(4), *some_rows(7, first=50), *some_rows(1, first=50)]
    lines = [json.dumps({"dialogue": row.prompt, "summary": row.answer}) for row in rows]
    (tmp_path / "validation.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="dialogsum has 7 rows at the end of its file to set apart, without 1 that"):
        dialogsum(tmp_path, validation=4, held_out=4)


def diverging(monkeypatch: pytest.MonkeyPatch, where: Any) -> None:
    """Training ends in numbers that are none where `where(seed, rate)` says so."""
    advance = SliceTrainer.advance

    def broken(trainer: SliceTrainer, schedule: Any) -> Any:
        if where(int(trainer._seed), schedule.peak):
            raise Diverged("not finite", step=1, rows=[])
        return advance(trainer, schedule)

    monkeypatch.setattr(SliceTrainer, "advance", broken)


def test_a_seed_that_diverged_is_named_and_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverging(monkeypatch, lambda seed, rate: seed == 1)

    text = run(options_of(tmp_path, arm=[ONE], share=0.0, seeds=3), lambda line: None)

    line = next(line for line in text.splitlines() if line.startswith(f"| {ONE} |"))
    rate, seeds = line.split(" | ")[5:7]
    rate = rate.removesuffix(" (border)")
    assert seeds == "2"
    assert f"{ONE} diverged on gsm8k, 16 rows, clean: seed 1 at {rate}. Its figures are those of the others." in text


def test_an_arm_that_diverges_at_first_is_tried_at_lower_rates_and_both_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(monkeypatch, lambda seed, rate: rate > 5e-4)

    text = run(options_of(tmp_path, arm=[ONE], share=0.0), lambda line: None)

    assert f"{ONE} diverged on gsm8k, 16 rows, clean: seed 0 at 0.002, seed 0 at 0.001. Its figures" in text
    assert "| 0.0005 (border) | 1 |" in text


def test_an_arm_that_diverges_at_every_rate_is_named_though_no_line_is_left_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging(monkeypatch, lambda seed, rate: True)

    text = run(options_of(tmp_path, arm=[ONE], share=0.0), lambda line: None)

    assert "seed 0 at 0.001, seed 0 at 0.0005. Nothing of it is left to show." in text
    assert f"| {ONE} |" not in text


def test_an_arm_that_fails_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = Laboratory.best

    def failing(self: Laboratory, arm: Any, seeds: int) -> Any:
        if arm.name == ONE:
            raise OutOfMemory("There is not enough memory.")
        return best(self, arm, seeds)

    monkeypatch.setattr(Laboratory, "best", failing)

    text = run(options_of(tmp_path, arm=["all rows, 1 epoch"], share=0.0), lambda line: None)

    assert f"{ONE} on gsm8k, 16 rows, clean failed: There is not enough memory." in text
    assert "| LoRA rank 6, all rows, 1 epoch |" in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--rows=0", "argument --rows: '0' is not a whole number from 1 on"),
        ("--validation=0", "argument --validation: '0' is not a whole"),
        ("--held-out=-3", "argument --held-out: '-3' is not a whole"),
        ("--batch=x", "argument --batch: 'x' is not a whole"),
        ("--share=1.5", "argument --share: '1.5' is no number between 0 and 1"),
        ("--junk=dust", "argument --junk: 'dust' is none of"),
    ],
)
def test_an_option_out_of_range_is_refused(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        _options(["--model=x", given])

    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_model_that_is_not_there_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--model={tmp_path / 'nothing'}", f"--out={tmp_path}"]) == 2

    assert capsys.readouterr().err == "quality: There is no model 'nothing'.\n"


@pytest.mark.parametrize(
    ("stored", "why"),
    [("{", "Expecting property name"), ("[]", "no attribute 'get'"), ('{"cells": {"key": {}}}', "'stages'")],
)
def test_a_file_that_holds_no_cells_is_refused_by_name_and_left_alone(
    stored: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quality.json").write_text(stored)

    assert main([f"--model={tmp_path / 'nothing'}", f"--out={tmp_path}"]) == 2

    said = capsys.readouterr().err
    assert said.startswith(f"quality: {tmp_path / 'quality.json'} does not hold cells of an earlier run: ")
    assert why in said
    assert said.endswith("Move it away, or name another folder by --out.\n")
    assert (tmp_path / "quality.json").read_text() == stored


def test_a_folder_that_cannot_be_written_to_is_refused_before_a_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")

    assert main([f"--model={tmp_path / 'nothing'}", f"--out={tmp_path / 'file'}"]) == 2

    assert capsys.readouterr().err == f"quality: --out {tmp_path / 'file'} cannot be written to: File exists\n"


@pytest.mark.parametrize(
    ("more", "lost"),
    [
        ({"arm": ["DoRA"]}, r"'LoRA rank 8, all rows, 1 epoch', which this run does not have:"),
        ({"share": 0.0}, r"'gsm8k, 16 rows, 50% echo', which this run does not have:"),
    ],
)
def test_a_page_that_shows_more_than_a_run_has_is_not_replaced(more: dict[str, Any], lost: str, tmp_path: Path) -> None:
    told: list[str] = []
    whole = run(options_of(tmp_path, arm=[ONE]), told.append)
    (tmp_path / "results" / "quality.svg").write_text("a picture")
    told.clear()

    with pytest.raises(ValueError, match=rf"quality\.md shows {lost} move it away, or name another folder by --out"):
        run(options_of(tmp_path, **{"arm": [ONE]} | more), told.append)

    assert told == []
    assert (tmp_path / "results" / "quality.md").read_text() == whole
    assert (tmp_path / "results" / "quality.svg").exists()
    assert shown_in(run(options_of(tmp_path, arm=["all rows, 1 epoch"]), told.append)).keys() == shown_in(whole).keys()


def test_two_runs_do_not_write_into_one_folder_at_once(tmp_path: Path) -> None:
    options = options_of(tmp_path, arm=[ONE], share=0.0)
    refused: list[str] = []

    def meanwhile(line: str) -> None:
        with pytest.raises(ValueError, match="another run writes into --out") as error:
            run(options, lambda line: None)
        refused.append(str(error.value))

    run(options, meanwhile)

    assert refused
    assert ONE in run(options, lambda line: None)  # free again


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"arm": ["Random Rows", "nobody"]}, "no arm has 'nobody' in its name; there are, the nearest first: "),
        (
            {"pool": "clear"},
            "no pool has 'clear' in its name; there are: gsm8k, 16 rows, 50% echo; gsm8k, 16 rows, clean",
        ),
        ({"max_tokens": 2}, "gsm8k has no training row of at most 2 tokens"),
        ({"junk": [("off task",)]}, "off-task rows come from another task: give a second --task"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_anything_is(more: dict[str, Any], text: str, tmp_path: Path) -> None:
    said: list[str] = []

    with pytest.raises(ValueError, match=text):
        run(options_of(tmp_path, **more), said.append)

    assert said == []


def test_an_arm_is_found_in_any_case_and_where_none_is_the_nearest_comes_first(tmp_path: Path) -> None:
    matrix = Matrix(options_of(tmp_path, arm=["dora"]), Cells(tmp_path / "quality.json"), lambda line: None, 0.0)
    assert [arm.name for arm in matrix.arms] == ["DoRA rank 8, all rows"]

    with pytest.raises(ValueError, match="the nearest first: paper recipe; "):
        run(options_of(tmp_path, arm=["paper recipes"]), lambda line: None)


def test_a_task_that_is_given_twice_and_minutes_without_end_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = options_of(tmp_path)
    with pytest.raises(ValueError, match="gsm8k is given twice"):
        run(Namespace(**{**vars(options), "task": options.task * 2}), lambda line: None)

    for minutes in ("nan", "inf", "-1"):
        with pytest.raises(SystemExit):
            _options(["--model=m", f"--minutes={minutes}"])
        assert f"{minutes!r} is no number of minutes from 0 on" in capsys.readouterr().err


def test_a_kind_of_bad_rows_that_a_task_cannot_have_names_the_task() -> None:
    wordy = tuple(Row(f"Say {row.prompt}.", "#Person1# asks #Person12#.", row.line) for row in some_rows(8))

    with pytest.raises(ValueError, match="of dialogsum has no number that could be made wrong"):
        build(PoolSpec("dialogsum", 8, ("wrong number",), 0.5), type(OTHER)("dialogsum", wordy, (), ()), TASK)


def test_a_page_says_how_it_was_made_and_nothing_of_where(tmp_path: Path) -> None:
    given = [
        "--model=/home/me/model",
        "--task=gsm8k=/home/me/data",
        "--rows=12",
        "--core",
        "--minutes=1",
        "--threads=3",
    ]

    options = _options([*given, "--junk=echo+off task", "--text=/home/me/text.txt", "--arm=all rows", "--arm=rank"])

    assert options.command == (
        "./run quality --model DIR --task gsm8k=DIR --text FILE --rows 12 --junk 'echo+off task' "
        "--arm 'all rows' --arm rank --core"
    )
    assert f"Command: `{options_of(tmp_path).command}`." in run(
        options_of(tmp_path, arm=[ONE], share=0.0, minutes=0.0), lambda line: None
    )


def test_an_arm_that_was_tried_at_one_rate_alone_stands_beside_the_tables() -> None:
    shown, tried = found("shown", 100, 1.0, 2.0), found("tried", 100, 3e12, 1.5).cells[0]
    stored = [
        *shown.cells,
        replace(tried, seed=1, rate=8e-3),
        replace(tried, rate=8e-3),
        replace(tried, diverged=True, measured=None),
    ]

    renamed = replace(shown, arm=replace(shown.arm, name="the same"))

    text, other = (
        page({"pool": [one]}, base={"pool": Before(4.0)}, facts={}, notes=[], stored={"pool": stored})
        for one in (shown, renamed)
    )

    assert "| shown |" not in other
    assert "| tried | 4 | 0% | 0.008 | 0, 1 | 1.5000 | 3 |" in text
    assert text.count("| shown |") == text.count("| tried |") == 1


def test_a_page_shows_how_many_rows_each_seed_kept_where_they_differ() -> None:
    one, tried = found("the guide decides", 100, 1.0, 2.0), found("tried", 100, 3e12, 1.5)
    differing = replace(one, cells=[*one.cells, replace(one.cells[0], seed=1, rows=7)])
    stored = [*tried.cells, replace(tried.cells[0], seed=1, rows=6)]

    text = page({"pool": [differing]}, base={"pool": Before(4.0)}, facts={}, notes=[], stored={"pool": stored})

    assert "| the guide decides | 4 to 7 | 0% |" in text
    assert "| tried | 4 to 6 | 0% |" in text


def test_arms_that_only_their_names_tell_apart_are_computed_and_shown_once() -> None:
    once, twice = ([replace(arm, epochs=arm.epochs or epochs) for arm in ARMS] for epochs in (1, 2))

    arms = distinct(once)

    names = [arm.name for arm in arms]
    assert names[0] == REFERENCE
    assert "LoRA rank 8, all rows, 1 epoch" not in names  # with one epoch it is the reference
    low_rank = next(arm for arm in arms if arm.name == "rank 8 in all heads, all rows, 1 epoch")
    assert {"core", "weights"} <= low_rank.groups  # the one of the weights' table has no line of its own
    assert distinct(twice) == twice
