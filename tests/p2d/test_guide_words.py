"""Rows that do not read like the guide's are found by their words alone, and what words cannot see is left to the model."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from p2d import guide_words as module
from p2d.guide_words import FARTHEST, FEWEST, unlike_guide
from p2d.response_matrix import median_and_spread
from p2d.rows import Row, Turn, read_rows

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "gsm8k"


def example(name: str) -> list[Row]:
    return [row for row in read_rows(EXAMPLE / name, "jsonl") if isinstance(row, Row)]


POOL, GUIDE = example("train.jsonl")[:150], example("test.jsonl")[:32]


def judged(rows: list[Row], guide: list[Row] = GUIDE) -> list[bool]:
    return [bool(unlike) for unlike in unlike_guide(rows, np.arange(len(rows)), guide)]


def echoes(rows: list[Row]) -> list[Row]:
    return [Row(row.prompt, row.prompt, row.line) for row in rows]


def answers_of_others(rows: list[Row]) -> list[Row]:
    return [Row(row.prompt, other.answer, row.line) for row, other in zip(rows, rows[7:], strict=False)]


def chats(rows: list[Row]) -> list[Row]:
    """The same questions, asked a turn earlier."""
    return [Row("Well?", row.answer, row.line, (Turn("user", row.prompt), Turn("assistant", "Yes."))) for row in rows]


def with_bad(bad: list[Row], seed: int) -> list[Row]:
    """The pool, every third row of it bad."""
    rows = list(POOL)
    random.Random(seed).shuffle(bad)
    rows[::3] = bad[:50]
    return rows


POEM = "the wind goes over the hill and whispers to the trees of a night without any moon"


@pytest.mark.parametrize(
    "kind",
    ["another's answer", "the prompt again", "another task"],
)
def test_most_bad_rows_read_unlike_the_guide_and_hardly_any_good_one(kind: str, seed: int) -> None:
    bad = {
        "another's answer": answers_of_others(POOL),
        "the prompt again": echoes(POOL),
        "another task": [Row(" ".join(random.Random(n).sample(POEM.split(), 12)), POEM, n) for n in range(50)],
    }[kind]

    unlike = np.array(judged(with_bad(bad, seed)))

    assert unlike[::3].mean() >= 0.9
    assert np.delete(unlike, np.arange(0, len(unlike), 3)).mean() <= 0.1


def test_a_wrong_number_reads_like_a_right_one() -> None:
    wrong = [Row(row.prompt, row.answer.rpartition(" ")[0] + " 7", row.line) for row in POOL]

    assert np.mean(judged(with_bad(wrong, 0))) <= 0.1


def test_what_was_said_before_the_prompt_is_a_part_of_it() -> None:
    rows, guide = chats(POOL), chats(GUIDE)

    assert np.mean(judged(rows, guide)) <= 0.1
    assert np.mean(judged([Row(row.prompt, row.answer, row.line) for row in rows], guide)) >= 0.9


def test_a_guide_too_small_to_say_how_far_is_far_says_nothing() -> None:
    rows = with_bad(echoes(POOL), 0)

    assert not any(judged(rows, GUIDE[: FEWEST - 1]))
    assert any(judged(rows, GUIDE[:FEWEST]))


def test_by_a_number_that_the_guide_s_rows_share_no_row_is_unlike() -> None:
    same = [Row("Is it so?", "yes", line) for line in range(20)]

    assert not any(judged([*same, Row("Is it so?", "Is it so?", 21), Row("Why?", "no", 22)], same))


def test_neither_the_order_of_the_rows_nor_their_place_matters() -> None:
    rows = with_bad(answers_of_others(POOL), 0)
    order = np.random.default_rng(0).permutation(len(rows))

    assert unlike_guide(rows, order, GUIDE).tolist() == np.array(judged(rows))[order].tolist()


@pytest.mark.parametrize(
    ("numbers", "unlike"),
    [
        ("50 50 50", False),
        ("30 50 50", False),  # 24.46 away is far
        ("8 50 50", True),
        ("92 50 50", True),
        ("50 8 50", False),  # that prompt and answer have little in common speaks against no row
        ("50 92 50", True),
        ("50 50 8", True),
        ("50 50 92", False),
    ],
)
def test_each_number_has_its_bounds(numbers: str, unlike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_numbers", lambda _, answer, *__, left_out: tuple(map(float, answer)))
    guide = [Row("", f"{n} {n} {n}", n) for n in (*range(40, 61), 40, 60)]  # half of them 10 or less from 50

    spread = median_and_spread(np.array([float(row.answer.split()[0]) for row in guide]))[1]

    assert spread * FARTHEST == pytest.approx(24.46, abs=0.01)
    assert judged([Row("", numbers, 0)], guide) == [unlike]


def test_a_guide_whose_own_rows_read_unlike_each_other_sets_nothing_apart() -> None:
    rows, bad = with_bad(echoes(POOL), 0), echoes(GUIDE)

    assert any(judged(rows, [*GUIDE[:31], *bad[31:]]))
    assert not any(judged(rows, [*GUIDE[:24], *bad[24:]]))


def test_only_the_beginning_of_a_long_text_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(row.prompt, row.answer + " and so on" * 1000, row.line) for row in POOL]
    monkeypatch.setattr(module, "MOST_CHARACTERS", 60)

    assert judged(rows) == judged([Row(row.prompt[:60], row.answer[:60], row.line) for row in rows])
