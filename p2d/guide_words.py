"""Which rows do not read like the guide's: by their words alone, before a pass over the model is spent on them. No torch.

A row reads unlike the guide where one of three numbers of it lies far outside of what the guide's rows have:
- `grounded`, how much of its answer stands in its prompt: an answer to another prompt has little of it;
- `common`, how much the two have of all words of either: an answer that repeats its prompt has nearly all;
- `native`, how much likelier its words are among the guide's than among the pool's: those of another task are less likely.
Rare words weigh more in the first two (inverse document frequency, Sparck Jones 1972). The third is the importance weight of
data selection by importance resampling (Xie et al. 2023), of single words and with the pool as the smoothing prior.

Nothing is chosen by it alone: what reads like the guide may be wrong all the same, such as a wrong number, and of some tasks
words say nothing. `p2d.responses.alignment_likelihood` asks the model about a sample of what is left (docs/decisions/0037).

Legend: R row, G guide row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2d.near_duplicates import words_of
from p2d.response_matrix import median_and_spread
from p2d.rows import Row

FARTHEST = 2.75
"""Spreads of the guide from its median beyond which a number speaks against a row. With 32 guide rows 89 to 99 % of clean rows are
within all three bounds, and 0 to 2 % of those with another's answer, of another task or that repeat their prompt (docs/LOG.md)."""

FEWEST = 16
"""Guide rows that say how far is far: of clean rows 91 and 94 % are within, with 8 guide rows 78 and 84 %, in one draw 46 %."""

PRIOR_WORDS = 300
"""How many words of the pool's own mix are added to the guide's: a word that few guide rows could have had is no sign."""

Word = tuple[bool, str]
"""Whether it stands in the answer, and the word."""


@dataclass(slots=True)
class _Counts:
    """Words of some rows."""

    words: Counter[Word]
    rows_with: Counter[str]
    rows: int

    @classmethod
    def of(cls, rows: Iterable[tuple[list[str], list[str]]]) -> _Counts:
        counts = cls(Counter(), Counter(), 0)
        for prompt, answer in rows:
            counts.words.update(_placed(prompt, answer))
            counts.rows_with.update({*prompt, *answer})
            counts.rows += 1
        return counts


def unlike_guide(rows: Sequence[Row], row_R: npt.NDArray[np.int64], guide: Sequence[Row]) -> npt.NDArray[np.bool_]:
    """Whether each of the rows reads unlike the guide's, [R].

    No row does by a guide of fewer than FEWEST rows, nor by a number that most of its rows share. Rows are read twice, not held.

    Args:   row_R: indices of `rows`.
    """
    unlike_R = np.zeros(len(row_R), dtype=bool)
    if len(guide) < FEWEST:
        return unlike_R
    pool = _Counts.of(_words(rows[index]) for index in row_R.tolist())
    own = [_words(row) for row in guide]
    known = _Counts.of(own)
    of_guide = np.array([_numbers(*words, pool, known, left_out=True) for words in own])
    of_rows = np.array([_numbers(*_words(rows[index]), pool, known, left_out=False) for index in row_R.tolist()])
    for number, (lower, upper) in enumerate(((True, True), (False, True), (True, False))):
        median, spread = median_and_spread(of_guide[:, number])
        away_R = of_rows[:, number] - median
        bound = FARTHEST * spread or math.inf
        unlike_R |= (lower & (away_R < -bound)) | (upper & (away_R > bound))
    return unlike_R


def _words(row: Row) -> tuple[list[str], list[str]]:
    """Of the prompt, earlier turns included, and of the answer."""
    prompt = [word for turn in row.before for word in words_of(turn.content)]
    return prompt + words_of(row.prompt), words_of(row.answer)


def _placed(prompt: Iterable[str], answer: Iterable[str]) -> Iterator[Word]:
    yield from ((False, word) for word in prompt)
    yield from ((True, word) for word in answer)


def _numbers(
    prompt: list[str], answer: list[str], pool: _Counts, guide: _Counts, *, left_out: bool
) -> tuple[float, float, float]:
    """`grounded`, `common` and `native` of a row. left_out: the row is one of the guide's, and is judged by the others."""

    def weight(words: Iterable[str]) -> float:
        return math.fsum(math.log((pool.rows + 1) / (pool.rows_with[word] + 0.5)) for word in words)

    asked, answered = set(prompt), set(answer)
    both = weight(asked & answered)
    own = Counter(_placed(prompt, answer))
    total, pool_total = own.total(), pool.words.total()
    guide_total = guide.words.total() - (total if left_out else 0) + PRIOR_WORDS
    native = 0.0
    for word, count in own.items():
        share = (pool.words[word] + 0.5) / (pool_total + 1)
        seen = guide.words[word] - (count if left_out else 0)
        native += count * math.log((seen / share + PRIOR_WORDS) / guide_total)
    return both / (weight(answered) or 1.0), both / (weight(asked | answered) or 1.0), native / max(1, total)
