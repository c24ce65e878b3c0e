"""A set of rows that holds none: it answers as a set of rows would."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2d.row_keys import RowKeys
from p2d.rows import Row
from tests.factories import some_rows


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["", "x", '","'])), max_size=40))
def test_it_answers_as_a_set_of_texts_would(texts: list[tuple[str, str]]) -> None:
    keys, seen = RowKeys(), set[tuple[str, str]]()

    for line, (prompt, answer) in enumerate(texts):
        row = Row(prompt, answer, line)
        assert (row in keys) == ((prompt, answer) in seen)
        assert keys.add(row) == ((prompt, answer) not in seen)
        seen.add((prompt, answer))


def test_a_full_bucket_still_tells_its_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2d.row_keys.BUCKETS", 1)
    keys, rows = RowKeys(), some_rows(3000)

    assert all(keys.add(row) for row in rows[:2000])
    assert not any(keys.add(row) for row in rows[:2000])
    assert not any(row in keys for row in rows[2000:])


def test_a_row_more_costs_its_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("p2d.row_keys.BUCKETS", 64)
    keys, rows = RowKeys(), some_rows(40_000)
    tracemalloc.start()
    for row in rows:
        keys.add(row)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert held / len(rows) < 10
