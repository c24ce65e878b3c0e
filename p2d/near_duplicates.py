"""Which rows nearly repeat a better one: the same words but for a few, in the prompt and in the answer. No model, no torch.

Rows are compared as sets of pairs of neighbouring words, part by part: earlier turns, prompt, answer; each part must share
ALIKE of its pairs (Jaccard). So the same prompt with another answer is no repetition, and neither is another prompt with the
same answer. Candidates come from MinHash and banded LSH; each is then read and compared exactly, so nothing is called alike by
an estimate. What says the same in other words is not found: only a model could know.

Bounded: 4 bytes a row for each of BANDS while it works, and the pairs of CACHED rows; rows are read where they stand. The same
rows in the same order always give the same answer, on any machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from p2d.rows import Row

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
"""Sorted, each once."""

NOTHING: Hashes = np.zeros(0, dtype=np.uint64)

ALIKE = 0.7
"""Share of common pairs from which a part repeats another. The most alike of 7,473 GSM8K rows share 0.57 in prompt and
in answer (docs/LOG.md); 30 words of which two are changed share 0.76 with what they were."""
SHORT = 10
"""Pairs. An answer of fewer, such as a label or a number, says little by itself: then only the same words are a repetition."""
FORM = 0.5
"""Share of rows from which on a pair belongs to the task's form, as instructions around each question do, and is left out."""
FORM_ROWS = 20, 256
"""Fewest rows that show a form, and most that are looked at for it."""
BANDS, BAND = 12, 6
"""Hashes of a row, and MinHashes in each. One at least is equal for 78 % of the rows that share 0.7 of their pairs, for 97 % at 0.8
and for all at 0.9; for one in 5 million at 0.05, which is what rows of one task share."""
MOST_PAIRS = 4096
"""Of a part, those of the smallest hash: a sample where a text is longer."""
CACHED = 256
"""Rows whose pairs are held."""

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_PUNCTUATION = r".,;:!?'\"`()\[\]{}\u2018-\u201d\u3001\u3002\-"
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s{_PUNCTUATION}]|(?<!\w)-")
"""A word, a character of a script without spaces, or a sign that may mean something, such as a minus that is no hyphen."""


class _Words(NamedTuple):
    """What is compared of a row."""

    parts: tuple[Hashes, ...]
    """Pairs of the earlier turns, the prompt and the answer, without those of the form."""
    whole: bytes
    """Hash of all words in their order."""


def repetitions(rows: Sequence[Row], places: Ints) -> Ints:
    """For each of the rows the better one that it nearly repeats, -1 where there is none.

    What is repeated is never itself a repetition, so that the best of rows that are alike stands for all of them.

    Args:    places: indices of rows to compare, best first.
    Returns: [len(places)]: an index of `rows`, or -1.
    """
    form = _form(rows, np.sort(places))

    @lru_cache(CACHED)
    def words(at: int) -> _Words:
        return _words(rows[int(places[at])], form)

    best_BP = np.empty((BANDS, len(places)), dtype=np.uint32)
    for at in np.argsort(places):  # as they stand in the file
        best_BP[:, at] = _band_keys(words(int(at)).parts)
    for best_P in best_BP:
        _to_best(best_P)
    leader_P = np.arange(len(places))
    for at in np.flatnonzero((best_BP != leader_P).any(axis=0)).tolist():
        for other in sorted({*leader_P[best_BP[:, at]].tolist()}):
            if other < at and _alike(words(at), words(other)):
                leader_P[at] = other
                break
    return np.where(leader_P == np.arange(len(places)), -1, places[leader_P])


def _to_best(key_P: npt.NDArray[np.uint32]) -> None:
    """Put in each key's stead the first place that has it."""
    order = np.argsort(key_P, kind="stable")
    sorted_P = key_P[order]
    first = np.flatnonzero(np.concatenate(([True], sorted_P[1:] != sorted_P[:-1])))
    key_P[order] = np.repeat(order[first], np.diff(first, append=len(order)))


def _form(rows: Sequence[Row], places: Ints) -> Hashes:
    """Pairs that at least FORM of the rows have."""
    fewest, most = FORM_ROWS
    seen = places[:: -(-len(places) // most)] if len(places) >= fewest else places[:0]
    if not len(seen):
        return NOTHING
    found = [part for at in seen.tolist() for part in _words(rows[at], NOTHING).parts]
    pairs, counts = np.unique(np.concatenate(found), return_counts=True)
    common: Hashes = pairs[counts >= FORM * len(seen)]
    return common


def words_of(text: str) -> list[str]:
    """Words, characters of scripts without spaces, and signs that may mean something, in lower case."""
    return _WORDS.findall(text.lower()) or text.split()


def _words(row: Row, form: Hashes) -> _Words:
    before = "\n".join(turn.content for turn in row.before)
    words = [words_of(text) for text in (before, row.prompt, row.answer)]
    whole = blake2b("\n".join(map(" ".join, words)).encode(), digest_size=16).digest()
    parts = tuple(_without(_pairs(part, number), form)[:MOST_PAIRS] for number, part in enumerate(words))
    return _Words(parts, whole)


def _pairs(words: Sequence[str], part: int) -> Hashes:
    """Hashes of each word with the word before it. Args: part: another's pairs are other pairs."""
    if not words:
        return NOTHING
    word_W = np.array([0, *[crc32(word.encode()) for word in words]], dtype=np.uint64)
    return np.unique(_mixed((word_W[:-1] << np.uint64(32)) + word_W[1:] + part))


def _without(pairs: Hashes, form: Hashes) -> Hashes:
    """Pairs without those of the form, but of a text that is nothing else."""
    if not len(form):
        return pairs
    own: Hashes = pairs[form.take(np.searchsorted(form, pairs), mode="clip") != pairs]
    return own if len(own) else pairs


def _mixed(value: Hashes) -> Hashes:
    """Spread over 64 bits (the end of splitmix64)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


_FACTORS = _mixed(np.arange(1, BANDS * BAND + 1, dtype=np.uint64)) | np.uint64(1)


def _band_keys(parts: Sequence[Hashes]) -> npt.NDArray[np.uint32]:
    """[BANDS]: equal, but for chance, where all MinHashes of a band are: `common share ** BAND`."""
    least = (np.concatenate(parts)[:, None] * _FACTORS).min(axis=0).reshape(BANDS, BAND)
    keys: npt.NDArray[np.uint32] = (_mixed(least * _FACTORS[:BAND]).sum(axis=1) >> np.uint64(32)).astype(np.uint32)
    return keys


def _alike(some: _Words, others: _Words) -> bool:
    if some.whole == others.whole:
        return True
    if min(len(some.parts[-1]), len(others.parts[-1])) < SHORT:
        return False
    return all(_common(a, b) >= ALIKE for a, b in zip(some.parts, others.parts, strict=True))


def _common(some: Hashes, others: Hashes) -> float:
    """Share of the pairs of either that both have."""
    shared = len(np.intersect1d(some, others, assume_unique=True))
    either = len(some) + len(others) - shared
    return shared / either if either else 1.0
