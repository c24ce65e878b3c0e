"""Which answers go with their prompts, by their words alone."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from p2d.config import DataConfig, JobConfig
from p2d.models import BaseModel
from p2d.responses import ResponseInput
from p2d.responses.lexical import ECHO, FEWEST, MOST_STRAYS, lexical, passes
from p2d.rows import Row, Turn, read_rows
from tests.factories import some_rows

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "gsm8k"
POOL = [row for row in read_rows(EXAMPLE / "train.jsonl", "jsonl") if isinstance(row, Row)][:240]

REFUSALS = (
    "I'm sorry, but I can't help you with that request. Is there anything else?",
    "As an assistant I have to decline to answer this. Please ask something else instead.",
    "I'm not able to answer that question. Please consult a professional instead.",
)


def passing(rows: list[Row], seed: int = 0) -> np.ndarray:
    return passes(rows, np.random.default_rng(seed))


def swapped(rows: list[Row]) -> list[Row]:
    return [Row(row.prompt, other.answer, row.line) for row, other in zip(rows, rows[1:] + rows[:1], strict=True)]


def echoing(rows: list[Row]) -> list[Row]:
    return [Row(row.prompt, row.prompt, row.line) for row in rows]


def asked_a_turn_earlier(rows: list[Row]) -> list[Row]:
    return [Row("Well?", row.answer, row.line, (Turn("user", row.prompt), Turn("assistant", "Yes."))) for row in rows]


def mixed(bad: list[Row], every: int) -> tuple[list[Row], np.ndarray]:
    """The pool with the bad rows in place of every so many, and which these are."""
    rows, is_bad = list(POOL), np.zeros(len(POOL), dtype=bool)
    is_bad[::every] = True
    rows[::every] = bad[::every]
    return rows, is_bad


@pytest.mark.parametrize("shape", [list, asked_a_turn_earlier])
@pytest.mark.parametrize(("bad", "every", "share"), [(swapped, 8, 0.75), (echoing, 5, 1.0), (echoing, 2, 1.0)])
def test_answers_of_other_prompts_and_prompts_once_more_do_not_pass_and_good_rows_do(
    bad: object, every: int, share: float, shape: object, seed: int
) -> None:
    assert callable(bad)
    assert callable(shape)
    rows, is_bad = mixed(bad(POOL), every)

    passing_R = passing(shape(rows), seed)

    assert (~passing_R[is_bad]).mean() >= share
    assert passing_R[~is_bad].mean() >= 0.98


def test_of_good_rows_hardly_one_is_left_out(seed: int) -> None:
    assert passing(POOL, seed).mean() >= 0.99


def test_answers_that_many_rows_give_pass_whatever_their_prompts(seed: int) -> None:
    draw = random.Random(seed)
    rows, refused = mixed([Row(row.prompt, draw.choice(REFUSALS), row.line) for row in POOL], every=8)
    labelled, short = mixed([Row(row.prompt, draw.choice(("positive", "negative")), row.line) for row in POOL], every=8)

    assert passing(rows, seed)[refused].all()
    assert passing(labelled, seed)[short].all()


def test_nothing_is_left_out_where_words_do_not_tell(seed: int) -> None:
    final_numbers = [Row(row.prompt, row.answer.split("####")[-1].strip(), row.line) for row in POOL]
    foreign = [Row(row.prompt, row.answer[::-1], row.line) for row in POOL]  # hardly a word in common
    corrected = [
        Row(row.prompt.replace("the", "teh") if n % 3 else row.prompt, row.prompt, n) for n, row in enumerate(POOL)
    ]
    half_swapped, _ = mixed(swapped(POOL), every=2)

    assert ECHO < 0.9
    assert MOST_STRAYS < 0.4
    for rows in (final_numbers, foreign, corrected, half_swapped, swapped(POOL)):
        assert passing(rows, seed).all()


def mirrored(text: str) -> str:
    return " ".join(word if word[:1].isupper() or word.isdigit() else word[::-1] for word in text.split())


FEW = {
    "prompts that say little": lambda row: Row("Write me a short worked sum, please.", row.answer, row.line),
    "translations from another language": lambda row: Row(mirrored(row.answer), row.answer, row.line),
    "and into it": lambda row: Row(row.answer, mirrored(row.answer), row.line),
    "prompts on a theme": lambda row: Row(
        f"Write a lively little story about {row.line} for children", row.answer, row.line
    ),
}
"""Good rows whose words have little in common with their prompts."""


@pytest.mark.parametrize("what", FEW)
def test_among_rows_of_which_words_tell_hardly_any_of_a_smaller_task_is_lost_of_which_they_do_not(
    what: str, seed: int
) -> None:
    rows, of_task = mixed([FEW[what](row) for row in POOL], every=8)

    passing_R = passing(rows, seed)

    assert passing_R[of_task].mean() >= 0.8
    assert passing_R[~of_task].mean() >= 0.98


def test_few_rows_say_nothing() -> None:
    rows, _ = mixed(echoing(POOL), every=5)

    assert passing(rows[: FEWEST - 1]).all()
    assert not passing(rows[:FEWEST]).all()
    assert passing([]).tolist() == []


def test_a_text_without_words_and_one_without_end_pass() -> None:
    rows = [*POOL[:60], Row("?", "!", 60), Row("why " * 50_000, "because " * 50_000, 61)]

    assert passing(rows)[60:].all()


def test_the_scorer_asks_no_model_and_rates_rows_that_pass_one(tiny: BaseModel, seed: int) -> None:
    rows, is_bad = mixed(echoing(POOL), every=5)
    given = ResponseInput(
        base=tiny,
        rows=rows,
        guide=some_rows(4),
        span=range(40, 240),
        slices=("v", "o"),
        config=JobConfig(data=DataConfig(scorer="lexical", mode="faithful")),
    )

    found, again = lexical(given), lexical(given)

    assert (found.tokens, found.flops) == (0, 0)
    assert (found.shard.combine, len(found.shard.layers)) == ("pass", 0)
    assert found.shard.quality_R is not None
    assert again.shard.quality_R is not None
    assert found.shard.quality_R.tolist() == again.shard.quality_R.tolist()
    assert not found.shard.quality_R[is_bad[40:]].any()
