"""Rows that repeat a better one are found, others never; the best of them stays; the same on every machine."""

from __future__ import annotations

import random
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2d.near_duplicates import ALIKE, CACHED, repetitions
from p2d.rows import Row, Turn
from p2d.sequences import MadeSequence

WORDS = [f"word{n}" for n in range(3000)]


def text(seed: object, words: int = 50) -> str:
    return " ".join(random.Random(repr(seed)).choices(WORDS, k=words))


def row(seed: object, *, prompt: str | None = None, answer: str | None = None) -> Row:
    return Row(prompt or text((seed, "prompt")), answer or text((seed, "answer")), line=1)


def repeats(*rows: Row) -> list[int]:
    return [int(leader) for leader in repetitions(rows, np.arange(len(rows)))]


def edited(written: str, *, changed: int = 0, dropped: int = 0) -> str:
    words = written.split()
    for place in range(changed):
        words[7 + 11 * place] = f"other{place}"
    return " ".join(words[: len(words) - dropped])


@pytest.mark.parametrize(
    "edit", [{"changed": 1}, {"changed": 3}, {"dropped": 1}, {"dropped": 6}, {"changed": 2, "dropped": 3}]
)
def test_a_row_with_a_few_words_changed_or_dropped_repeats_it(edit: dict[str, int]) -> None:
    one = row("one")

    assert repeats(one, row("two"), Row(edited(one.prompt, **edit), edited(one.answer, **edit), 2)) == [-1, -1, 0]


@pytest.mark.parametrize("wording", [str.upper, lambda text: text.replace(" ", ",\n\t"), lambda text: f"'{text}'."])
def test_case_space_and_punctuation_make_no_other_row(wording: object) -> None:
    one = row("one", answer="Yes, of course")
    assert callable(wording)

    assert repeats(one, Row(wording(one.prompt), wording(one.answer), 2)) == [-1, 0]


def test_many_words_changed_make_another_row() -> None:
    one = row("one")

    assert repeats(one, row("one", prompt=" ".join(WORDS[:20] + one.prompt.split()[20:]))) == [-1, -1]
    assert repeats(one, row("one", answer=" ".join(one.answer.split()[:25] + WORDS[:25]))) == [-1, -1]


def test_several_answers_to_one_question_all_stand() -> None:
    rows = [row(n, prompt=text("question")) for n in range(30)]

    assert repeats(*rows) == [-1] * 30


def test_one_answer_to_several_questions_stands_each_time() -> None:
    rows = [row(n, answer=text("answer")) for n in range(30)]

    assert repeats(*rows) == [-1] * 30


TEMPLATE = text("template", 200)


@pytest.mark.parametrize("rows", [6, 60])
def test_labels_of_one_template_stand_whatever_the_template_weighs(rows: int) -> None:
    asked = [f"{TEMPLATE} {text(n, 8)} {TEMPLATE}" for n in range(rows)]

    assert repeats(*[row(n, prompt=prompt, answer=f"label {n % 2}") for n, prompt in enumerate(asked)]) == [-1] * rows


def test_of_one_template_with_long_answers_of_one_form_none_repeats() -> None:
    rows = [
        row(n, prompt=f"{TEMPLATE} {text(n, 30)}", answer=f"{text('form', 100)} {text((n, 'value'), 30)}")
        for n in range(60)
    ]

    assert repeats(*rows) == [-1] * 60
    assert repeats(*rows, Row(edited(rows[4].prompt, dropped=2), edited(rows[4].answer, dropped=1), 1))[60] == 4


def test_the_same_question_with_another_label_is_another_row() -> None:
    one = row("one", answer="positive")

    assert repeats(
        one, row("one", answer="negative"), row("one", answer="Positive."), row("one", answer="\U0001f600")
    ) == [
        -1,
        -1,
        0,
        -1,
    ]
    assert repeats(row("one", answer="\U0001f600"), row("one", answer="\U0001f641")) == [-1, -1]


def test_a_short_answer_does_not_tell_so_one_word_of_the_prompt_does() -> None:
    one = row("one", answer="42")

    assert repeats(one, row("one", prompt=edited(one.prompt, changed=1), answer="42")) == [-1, -1]


@pytest.mark.parametrize("share", [2, 4])
def test_what_many_rows_say_still_tells_rows_with_labels_apart(share: int) -> None:
    rows = [
        row(n, prompt=f"{text(n // 2, 20)} {'fever' if n % share else 'no'} today", answer="yes") for n in range(60)
    ]

    assert repeats(*rows).count(-1) == (60 if share == 2 else 45)


def test_code_that_differs_by_a_sign_is_other_code() -> None:
    assert repeats(row("add", answer="return a + b"), row("add", answer="return a * b")) == [-1, -1]


@pytest.mark.parametrize(
    ("one", "other"), [("2", "-2"), ("a b a b a", "a b a b"), ("0 1 1 0 1", "0 1 0 1 1"), ("3 > 2", "3 < 2")]
)
def test_what_is_short_must_be_the_same_word_by_word(one: str, other: str) -> None:
    assert repeats(row("x", answer=one), row("x", answer=other)) == [-1, -1]
    assert repeats(row("x", prompt=one, answer="Yes"), row("x", prompt=other, answer="Yes")) == [-1, -1]
    assert repeats(row("x", answer="well known"), row("x", answer="Well-known.")) == [-1, 0]


def test_a_script_without_spaces_is_compared_by_its_characters() -> None:
    signs = [chr(0x4E00 + n) for n in range(400)]
    chosen = random.Random(0).sample(signs, 60)
    one, other = "".join(chosen), "".join([*chosen[:30], "\u9fa0", *chosen[31:]])

    assert repeats(Row(one, one, 1), Row(other, other, 2), Row(one[::-1], other[::-1], 3)) == [-1, 0, -1]


def test_earlier_turns_belong_to_the_row() -> None:
    def after(turn: str) -> Row:
        return Row(
            text("prompt"), text("answer"), 1, (Turn("system", TEMPLATE), Turn("user", turn), Turn("assistant", "Yes."))
        )

    assert repeats(after(text(1, 150)), after(text(2, 150)), after(edited(text(1, 150), changed=3)), row("x")) == [
        -1,
        -1,
        0,
        -1,
    ]
    assert repeats(after(text(1)), Row(text("prompt"), text("answer"), 2)) == [-1, -1]


def test_what_is_repeated_repeats_nothing_itself() -> None:
    one = text("chain", 40).split()
    chain = [Row(" ".join(one[n:] + WORDS[:n]), " ".join(one[n:] + WORDS[:n]), n) for n in range(0, 30, 3)]

    found = repeats(*chain)

    assert all(leader == -1 or found[leader] == -1 for leader in found)
    assert found[1] == 0
    assert found[-1] != 0  # no drift: the last has nothing of the first
    assert found.count(-1) > 1


def test_the_order_decides_who_repeats_whom_and_places_are_those_of_the_rows() -> None:
    one = row("one")
    rows = [row("a"), one, row("b"), Row(one.prompt, edited(one.answer, dropped=1), 2), row("c")]

    assert repetitions(rows, np.array([3, 0, 1])).tolist() == [-1, -1, 3]
    assert repetitions(rows, np.array([1, 4, 2])).tolist() == [-1, -1, -1]
    assert repetitions(rows, np.array([1, 3])).tolist() == [-1, 1]


texts = st.text("ab \n.é+字", min_size=1, max_size=30).filter(str.strip)
some = st.lists(st.builds(Row, texts, texts, st.just(1)), min_size=1, max_size=12)


def words_shared(one: str, other: str) -> float:
    """Jaccard of pairs, written down another way. Of these letters, é, + and 字 are words of their own or part of one."""
    pairs = []
    for said in (one, other):
        spread = said.lower().replace("+", " + ").replace("字", " 字 ").replace(".", " ")
        words = ["", *(spread.split() or said.split())]
        pairs.append(set(pairwise(words)))
    return len(pairs[0] & pairs[1]) / len(pairs[0] | pairs[1])


@settings(max_examples=150, deadline=None)
@given(some)
@example([Row(".", "a", 1), Row(". ", "a", 1)])
def test_whatever_is_called_a_repetition_is_alike_by_the_rule_and_the_twin_of_a_row_always_is(rows: list[Row]) -> None:
    found = repeats(*rows)

    for at, leader in enumerate(found):
        if leader >= 0:
            assert leader < at
            assert found[leader] == -1
            assert words_shared(rows[at].prompt, rows[leader].prompt) >= ALIKE
            assert words_shared(rows[at].answer, rows[leader].answer) >= ALIKE
    assert repeats(*rows, rows[0])[-1] == 0  # the first is nobody's repetition
    assert repeats(*rows) == found


def test_other_processes_find_the_same() -> None:
    code = (
        "import numpy as np; from tests.p2d.test_near_duplicates import *;"
        "rows = [row(n % 40, prompt=edited(text(n % 40), changed=n % 4)) for n in range(120)];"
        "print(repetitions(rows, np.arange(120)).tolist())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": "."},
        ).stdout
        for seed in ("1", "2")
    }

    assert len(seen) == 1
    assert seen.pop().count("-1") == 40


class Made(MadeSequence[Row]):
    """Rows that are made when they are looked at, every second one of them nearly the one before."""

    def __init__(self, count: int) -> None:
        self.rows, self.looks = count, 0

    def __len__(self) -> int:
        return self.rows

    def at(self, place: int) -> Row:
        self.looks += 1
        return Row(edited(text(place // 2, 20), dropped=place % 2), text((place // 2, "answer"), 20), place)


def peak_bytes(rows: Sequence[Row]) -> int:
    tracemalloc.start()
    try:
        assert (repetitions(rows, np.arange(len(rows))) >= 0).sum() == len(rows) // 2
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_by_some_numbers_a_row_and_rows_are_read_a_bounded_number_of_times() -> None:
    few, many = Made(4 * CACHED), Made(20 * CACHED)

    growth = (peak_bytes(many) - peak_bytes(few)) / (len(many) - len(few))

    assert growth < 160
    assert many.looks <= 3 * len(many)
