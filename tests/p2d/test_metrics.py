"""A right answer counts as right however it is spelled, and a wrong one never does."""

from __future__ import annotations

import pytest

from p2d.metrics import exact_match, rouge_l


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("so 2 + 2 = 4.\n#### 4", "Two and two.\n#### 4", 1.0),
        ("#### 1,200", "#### 1200", 1.0),
        ("#### $18.00", "#### 18", 1.0),
        ("#### 18\n", "#### 18", 1.0),
        ("#### -3", "#### 3", 0.0),
        ("#### 180", "#### 18", 0.0),
        ("the answer is 18", "#### 18", 0.0),  # without the mark nobody knows what the answer is
        ("#### none", "#### 18", 0.0),
        ("  Paris ", "paris", 1.0),
        ("Paris, France", "Paris", 0.0),
        ("", "Paris", 0.0),
    ],
)
def test_exact_match(prediction: str, reference: str, score: float) -> None:
    assert exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [("a b c", "a b c", 1.0), ("a x c", "a b c", 2 / 3), ("c b a", "a b c", 1 / 3), ("", "a", 0.0), ("", "", 1.0)],
)
def test_rouge_l(prediction: str, reference: str, score: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("the cat sat on the mat", "the cat lay on a mat", 0.6666666666666666),
        ("she sells 3 sea shells", "sea shells she sells by the sea shore", 0.4615384615384615),
        ("yes, it is 42.", "Yes it is 42", 1.0),
        ("well-known, isn't it?", "It isn't well known_here", 0.36363636363636365),
    ],
)
def test_rouge_l_gives_the_numbers_of_the_usual_library(prediction: str, reference: str, score: float) -> None:
    assert rouge_l(prediction, reference) == pytest.approx(score)  # computed by rouge-score 0.1.2
