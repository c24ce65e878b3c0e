"""Task metrics on texts: what a generated answer is worth against the reference. A table of plain functions, no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

_FINAL = "####"
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_match(prediction: str, reference: str) -> float:
    """1.0 if the answers are the same after white space and case are evened out, else 0.0.

    Where the reference ends in a marked final answer (`... #### 42`, as in GSM8K), only the final answers are compared,
    as numbers where they are numbers; a prediction without the mark is wrong.
    """
    if _FINAL in reference:
        if _FINAL not in prediction:
            return 0.0
        prediction, reference = (text.rsplit(_FINAL, 1)[1] for text in (prediction, reference))
        expected, found = _NUMBER.fullmatch(reference.strip()), _NUMBER.search(prediction)
        if expected and found:
            return float(_number(found.group()) == _number(expected.group()))
    return float(_even(prediction) == _even(reference))


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1; case and punctuation do not count.

    On ASCII text the same numbers as `rouge-score` 0.1.2 without stemming (docs/decisions/0012).
    """
    a, b = (_WORD.findall(text.lower()) for text in (prediction, reference))
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    common = row[-1]
    return 2 * common / (len(a) + len(b))


def _even(text: str) -> str:
    return " ".join(text.lower().split())


def _number(text: str) -> float:
    return float(text.replace(",", ""))


METRICS: Mapping[str, Callable[[str, str], float]] = {"exact_match": exact_match, "rouge_l": rouge_l}
"""Metric name -> function of (prediction, reference)."""
