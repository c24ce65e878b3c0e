"""Data scorer `lexical`: whether an answer goes with its prompt, by their words alone; no guide, no pass over the model.

The default where no validation dataset vouches for a choice. Two kinds of rows do not pass:
- strays: more than STRAY of other prompts of the shard match the answer better than its own, and so do other answers the prompt.
  Answers that were shifted or swapped do so as often as not; this is a permutation test, whose null distribution is the shard's own
  prompts and answers beside others. Both sides are asked, for one of them may have nothing in common with anything: a text in
  another language is no stray among rows of this one;
- echoes: the answer is the prompt once more.
How well two texts match is the weight of the words that both have over that of the words of either, rare words weighing more
(inverse document frequency, Sparck Jones 1972).

Nothing is said where words do not tell: of short prompts and answers, of those that other rows have, too (labels, refusals), of
shards whose answers share hardly a word with their prompts or nearly all (corrections). Rows of another task pass, as do wrong
answers in the right words. docs/decisions/0039 has what it found, and what it is worth.

Legend: R row, O other row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2d.near_duplicates import words_of
from p2d.responses import ResponseInput, Responses, of_rows_alone
from p2d.rows import Row

FEWEST = 40
"""Rows below which all pass: so few others say little."""
OTHERS = 64
"""Most other rows, drawn at random, that each answer is set beside."""
STRAY = 0.05
"""Share of these whose prompts may match it better, and whose answers its prompt."""
MOST_STRAYS = 1 / 3
"""Of the answers that say enough: where more go better with other prompts, prompts and answers have little in common."""
NEAREST, MOST_NEAR = 16, 1 / 4
"""The same of the rows with the likest prompts: where tasks are mixed, one may be a translation, or stories on a theme."""
FEWEST_WORDS = 8
"""Different words of a prompt and of an answer that say enough to be set beside others."""
ALIKE = 0.4
"""Share of common words from which on two answers are the same one."""
GIVEN_BY = 3
"""Other rows with the same prompt or answer from which on it belongs to none of them: one may be where it was taken from."""
ECHO = 0.8
"""Match of prompt and answer beyond which one is the other. The other answers must match half as well at most, by the median, or a
text that is left as it is may be right. Both are guesses: the answers that were tried match 0.13 and 0.36, echoes 1."""
MOST_CHARACTERS = 4_000
"""Of the end of a prompt and the beginning of an answer that are looked at: memory and time are bounded."""

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]


def lexical(given: ResponseInput) -> Responses:
    """Rate each wanted row 1 if it passes, else 0; chance decides among equals (`p2d.selection`).

    Source: ours (docs/decisions/0039).
    """
    rng = np.random.default_rng([given.config.training.seed, len(given.rows), given.span.start])
    passing_R = passes((given.rows[index] for index in given.wanted().tolist()), rng).astype(np.float32)
    return Responses(shard=of_rows_alone(given, passing_R, "lexical", "pass"), tokens=0)


Words = frozenset[str]


@dataclass(frozen=True, slots=True)
class _Side:
    """A prompt, or an answer: its different words, and what they weigh together."""

    words: Words
    weight: float


@dataclass(frozen=True, slots=True)
class _Pair:
    prompt: _Side
    answer: _Side


def passes(rows: Iterable[Row], rng: np.random.Generator) -> Bools:
    """Whether each answer goes with its prompt, [R]."""
    texts = [_words(row) for row in rows]
    passing_R = np.ones(len(texts), dtype=bool)
    if len(texts) < FEWEST:
        return passing_R
    weights = _weights(texts)
    pairs = [_Pair(*(_Side(words, _weight(words, weights)) for words in both)) for both in texts]
    own_R = np.array([_match(pair.prompt, pair.answer, weights) for pair in pairs])
    other_R = own_R <= ECHO
    if other_R.any() and np.median(own_R[other_R]) <= ECHO / 2:
        passing_R &= other_R
    return passing_R & ~_strays(pairs, own_R, weights, rng)


def _strays(pairs: Sequence[_Pair], own_R: Floats, weights: Mapping[str, float], rng: np.random.Generator) -> Bools:
    """Whether prompt and answer say enough, and each goes better with those of other rows, [R]; none where words do not tell."""
    telling_R, lost_R, stray_R = np.zeros((3, len(pairs)), dtype=bool)
    having = [Counter(words) for words in zip(*((pair.prompt.words, pair.answer.words) for pair in pairs), strict=True)]
    for place, pair in enumerate(pairs):
        sides = pair.prompt.words, pair.answer.words
        if min(map(len, sides)) < FEWEST_WORDS or max(map(Counter.__getitem__, having, sides)) > GIVEN_BY:
            continue
        draw_O = rng.choice(len(pairs) - 1, size=min(OTHERS, len(pairs) - 1), replace=False)
        others = [pairs[other + (other >= place)] for other in draw_O.tolist()]
        if sum(_common(pair.answer.words, other.answer.words) >= ALIKE for other in others) >= GIVEN_BY:
            continue
        own, most = own_R[place], STRAY * len(others)
        telling_R[place] = True
        lost_R[place] = sum(_match(other.prompt, pair.answer, weights) > own for other in others) > most
        if lost_R[place]:
            stray_R[place] = sum(_match(pair.prompt, other.answer, weights) > own for other in others) > most
    if telling_R.mean() < 1 / 2 or lost_R.sum() > MOST_STRAYS * telling_R.sum():
        return np.zeros_like(stray_R)
    places = np.flatnonzero(telling_R)
    for place in np.flatnonzero(stray_R).tolist():
        near = np.array([_match(pairs[other].prompt, pairs[place].prompt, weights) for other in places.tolist()])
        nearest = places[np.argsort(-near, kind="stable")[1 : 1 + NEAREST]]  # the first is itself
        stray_R[place] = lost_R[nearest].mean() <= MOST_NEAR
    return stray_R


def _words(row: Row) -> tuple[Words, Words]:
    """Of the prompt, earlier turns included, and of the answer."""
    prompt = "\n".join(row.texts[:-1])
    return frozenset(words_of(prompt[-MOST_CHARACTERS:])), frozenset(words_of(row.answer[:MOST_CHARACTERS]))


def _weights(texts: Sequence[tuple[Words, Words]]) -> dict[str, float]:
    """Of each word, the more the fewer rows have it."""
    rows_with = Counter(word for prompt, answer in texts for word in prompt | answer)
    return {word: math.log((len(texts) + 1) / (count + 0.5)) for word, count in rows_with.items()}


def _weight(words: Words, weights: Mapping[str, float]) -> float:
    # `fsum`: a set is gone through in an order that changes from process to process.
    return math.fsum(weights[word] for word in words)


def _match(prompt: _Side, answer: _Side, weights: Mapping[str, float]) -> float:
    """Weight of the words that both have over that of the words of either, 0 to 1."""
    both = _weight(prompt.words & answer.words, weights)
    return both / ((prompt.weight + answer.weight - both) or 1.0)


def _common(some: Words, others: Words) -> float:
    """Share of the words of either that both have."""
    shared = len(some & others)
    return shared / ((len(some) + len(others) - shared) or 1)
