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

HETEROGENEOUS = 0.15
"""Share of the guide's rows outside of their own bounds beyond which words say too little of the task: of GSM8K 0 to 12 % are, and
more where a quarter of the guide is bad or answers quote their prompts now and then; many good rows would be, too (docs/LOG.md)."""

FEWEST = 16
"""Guide rows that say how far is far: of clean rows 91 and 94 % are within, with 8 guide rows 78 and 84 %, in one draw 46 %."""

MOST_CHARACTERS = 20_000
"""Of a prompt and of an answer that are looked at: how a text reads shows in its beginning, and it must not fill the memory."""

PRIOR_WORDS = 300
"""How many words of the pool's own mix are added to the guide's: a word that few guide rows could have had is no sign."""

SIDES = ((True, True), (False, True), (True, False))
"""Whether less, and whether more, than the guide has speaks against a row: of `grounded`, `common` and `native`."""

Floats = npt.NDArray[np.float64]

Word = tuple[bool, str]
"""Whether it stands in the answer, and the word."""


@dataclass(slots=True)
class _Counts:
    """Words of some rows."""

    words: Counter[Word]
    total: int
    """Of these."""
    rows_with: Counter[str]
    rows: int

    @classmethod
    def of(cls, rows: Iterable[tuple[list[str], list[str]]]) -> _Counts:
        counts = cls(Counter(), 0, Counter(), 0)
        for prompt, answer in rows:
            counts.words.update(_placed(prompt, answer))
            counts.rows_with.update({*prompt, *answer})
            counts.rows += 1
        counts.total = counts.words.total()
        return counts


def unlike_guide(rows: Sequence[Row], row_R: npt.NDArray[np.int64], guide: Sequence[Row]) -> npt.NDArray[np.bool_]:
    """Whether each of the rows reads unlike the guide's, [R].

    No row does by a guide of fewer than FEWEST rows, or of which HETEROGENEOUS read unlike the others, nor by a number that most of
    its rows share. Rows are read twice and not held; every word is, once, in up to 250 bytes.

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
    bounds = [_bounds(of_guide[:, number], sides) for number, sides in enumerate(SIDES)]
    if _outside(of_guide, bounds).mean() > HETEROGENEOUS:
        return unlike_R
    return _outside(of_rows, bounds)


def _bounds(value_G: Floats, sides: tuple[bool, bool]) -> tuple[float, float]:
    median, spread = median_and_spread(value_G)
    far = FARTHEST * spread or math.inf
    return median - (far if sides[0] else math.inf), median + (far if sides[1] else math.inf)


def _outside(values: Floats, bounds: Sequence[tuple[float, float]]) -> npt.NDArray[np.bool_]:
    """Whether one of a row's numbers is out of its bounds; [rows, 3] -> [rows]."""
    lower, upper = np.array(bounds).T
    outside_R: npt.NDArray[np.bool_] = ((values < lower) | (values > upper)).any(axis=1)
    return outside_R


def _words(row: Row) -> tuple[list[str], list[str]]:
    """Of the prompt, earlier turns included, and of the answer."""
    prompt = "\n".join(row.texts[:-1])
    return words_of(prompt[:MOST_CHARACTERS]), words_of(row.answer[:MOST_CHARACTERS])


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
    total = own.total()
    guide_total = guide.total - (total if left_out else 0) + PRIOR_WORDS
    native = 0.0
    for word, count in own.items():
        share = (pool.words[word] + 0.5) / (pool.total + 1)
        seen = guide.words[word] - (count if left_out else 0)
        native += count * math.log((seen / share + PRIOR_WORDS) / guide_total)
    return both / (weight(answered) or 1.0), both / (weight(asked | answered) or 1.0), native / max(1, total)
