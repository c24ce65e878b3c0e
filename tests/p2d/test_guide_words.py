"""Rows that do not read like the guide's are found by their words alone, and what words cannot see is left to the model."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from p2d.guide_words import FEWEST, unlike_guide
from p2d.rows import Row, Turn, read_rows

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "gsm8k"


def example(name: str) -> list[Row]:
    return [row for row in read_rows(EXAMPLE / name, "jsonl") if isinstance(row, Row)]


POOL, GUIDE = example("train.jsonl")[:150], example("test.jsonl")[:32]


def judged(rows: list[Row], guide: list[Row] = GUIDE) -> list[bool]:
    return [bool(unlike) for unlike in unlike_guide(rows, np.arange(len(rows)), guide)]


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
        "another's answer": [Row(row.prompt, other.answer, row.line) for row, other in zip(POOL, POOL[7:], strict=False)],
        "the prompt again": [Row(row.prompt, row.prompt, row.line) for row in POOL],
        "another task": [Row(" ".join(random.Random(n).sample(POEM.split(), 12)), POEM, n) for n in range(50)],
    }[kind]  # fmt: skip

    unlike = np.array(judged(with_bad(bad, seed)))

    assert unlike[::3].mean() >= 0.9
    assert np.delete(unlike, np.arange(0, len(unlike), 3)).mean() <= 0.1


def test_a_wrong_number_reads_like_a_right_one() -> None:
    wrong = [Row(row.prompt, row.answer.rpartition(" ")[0] + " 7", row.line) for row in POOL]

    assert np.mean(judged(with_bad(wrong, 0))) <= 0.1


def test_what_was_said_before_the_prompt_is_a_part_of_it() -> None:
    chats = [Row("Well?", row.answer, row.line, (Turn("user", row.prompt), Turn("assistant", "Yes."))) for row in POOL]
    guide = [Row("Well?", row.answer, row.line, (Turn("user", row.prompt), Turn("assistant", "Yes."))) for row in GUIDE]

    assert np.mean(judged(chats, guide)) <= 0.1
    assert np.mean(judged([Row(row.prompt, row.answer, row.line) for row in chats], guide)) >= 0.9


def test_a_guide_too_small_to_say_how_far_is_far_says_nothing() -> None:
    rows = with_bad([Row(row.prompt, row.prompt, row.line) for row in POOL], 0)

    assert not any(judged(rows, GUIDE[: FEWEST - 1]))
    assert any(judged(rows, GUIDE[:FEWEST]))


def test_by_a_number_that_the_guide_s_rows_share_no_row_is_unlike() -> None:
    same = [Row("Is it so?", "yes", line) for line in range(20)]

    assert not any(judged([*same, Row("Is it so?", "Is it so?", 21), Row("Why?", "no", 22)], same))


def test_neither_the_order_of_the_rows_nor_their_place_matters() -> None:
    rows = with_bad([Row(row.prompt, other.answer, row.line) for row, other in zip(POOL, POOL[7:], strict=False)], 0)
    order = np.random.default_rng(0).permutation(len(rows))

    assert unlike_guide(rows, order, GUIDE).tolist() == np.array(judged(rows))[order].tolist()
