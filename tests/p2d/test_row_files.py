"""Rows as a sequence over a file: the same rows at any place, with or without an index, and no memory for them."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from p2d.config import DATA_SCORERS, DataConfig, JobConfig
from p2d.models import BaseModel
from p2d.plans import leaked, split_rows
from p2d.registry import load
from p2d.response_matrix import ResponseShard
from p2d.responses import DataScorer, ResponseInput
from p2d.row_files import RowFile, line_starts, open_rows, write_row_file
from p2d.rows import Row, content_hash, load_rows, write_rows
from p2d.selection import select_rows, summarise
from p2d.selection_file import load_kept, write_selection
from p2d.validation import validate_file
from tests.factories import some_rows

ODD = [
    Row('a "quote"', "b", 1),
    Row("line\nbreak \u2028", "é \U0001f600", 3),
    Row("x", "y" * 5000, 9),
    Row("q", "r", 10),
]


@pytest.mark.parametrize("write", [write_rows, write_row_file])
def test_a_file_of_rows_reads_as_the_rows_themselves(tmp_path: Path, write: Callable[[Path, list[Row]], int]) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, ODD)

    rows = open_rows(path)

    assert list(rows) == load_rows(path) == ODD
    assert [rows[place] for place in (3, 0, -1, 2)] == [ODD[place] for place in (3, 0, -1, 2)]
    assert rows[1:3] == ODD[1:3]
    assert (len(rows), rows[::-2]) == (4, ODD[::-2])
    with pytest.raises(IndexError):
        rows[4]


def test_the_rows_have_the_same_bytes_with_an_index_and_without(tmp_path: Path) -> None:
    write_rows(tmp_path / "plain.jsonl", ODD)
    write_row_file(tmp_path / "indexed.jsonl", ODD)

    assert (tmp_path / "plain.jsonl").read_bytes() == (tmp_path / "indexed.jsonl").read_bytes()
    assert (tmp_path / "indexed.index").stat().st_size == 8 * len(ODD)


def test_an_index_of_another_file_is_noticed(tmp_path: Path) -> None:
    write_row_file(tmp_path / "rows.jsonl", ODD)
    write_rows(tmp_path / "rows.jsonl", ODD[:2])

    with pytest.raises(AssertionError, match="another"):
        open_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("scorer", ["alignment", "icl"])
def test_a_shard_reads_its_own_rows_and_the_queries_alone(tiny: BaseModel, tmp_path: Path, scorer: str) -> None:
    path, read = tmp_path / "rows.jsonl", set[int]()
    write_rows(path, some_rows(400))

    def parse(line: bytes) -> Row:
        row = Row(**json.loads(line))
        read.add(row.line - 1)
        return row

    respond: DataScorer = load(DATA_SCORERS, scorer, what="data scorer", pointer="/data/scorer")
    respond(
        ResponseInput(
            base=tiny,
            rows=RowFile(path, line_starts(path), parse),
            guide=some_rows(3, first=500),
            span=range(200, 206),
            slices=("v",),
            config=JobConfig(data=DataConfig(scorer=scorer, mode="faithful")),
        )
    )

    assert read >= set(range(200, 206))
    assert len(read) <= 6 + (0 if scorer == "alignment" else 64)


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that Python held at once during the work, beyond what it held before."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def row_stream(count: int) -> Iterator[Row]:
    return (row for first in range(0, count, 1000) for row in some_rows(1000, first=first))


def growth_per_row(tmp_path: Path, work: Callable[[Path], object]) -> float:
    """Peak memory of the work on a file of 12,000 rows less that on 3,000, per row more."""
    peaks = []
    for count in (3_000, 12_000):
        path = tmp_path / f"{count}.jsonl"
        write_row_file(path, row_stream(count))
        peaks.append(peak_bytes(lambda path=path: work(path)))  # type: ignore[misc]
    return (peaks[1] - peaks[0]) / 9_000


def test_going_through_all_rows_holds_none_of_them(tmp_path: Path) -> None:
    assert growth_per_row(tmp_path, lambda path: content_hash(open_rows(path))) < 0.5


def test_a_file_without_an_index_costs_its_places(tmp_path: Path) -> None:
    def without_index(path: Path) -> None:
        path.with_suffix(".index").unlink()
        content_hash(open_rows(path))

    assert growth_per_row(tmp_path, without_index) < 20  # 8 bytes, and as many again while the array grows


def test_validating_a_file_costs_a_hash_a_row(tmp_path: Path) -> None:
    def validate(path: Path) -> None:
        assert validate_file(path, "jsonl", normalised=tmp_path / "normalised.jsonl").duplicates == 0

    assert growth_per_row(tmp_path, validate) < 32


def test_setting_rows_apart_costs_a_place_and_a_hash_a_row(tmp_path: Path) -> None:
    def split(path: Path) -> None:
        apart = split_rows(open_rows(path), None, seed=0, proxy_rows=4)
        assert leaked(apart) == 0
        write_row_file(tmp_path / "train.jsonl", apart.train)

    assert growth_per_row(tmp_path, split) < 64


def test_kept_rows_are_read_when_they_are_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "selection.jsonl"
    with path.open("w") as file:
        for number, row in enumerate(row_stream(20_000)):
            kept = number % 10 == 0
            text = f',"prompt":"{row.prompt}","answer":"\\"kept\\":true"' if kept else ""
            file.write(
                f'{{"row":{number},"line":{row.line},"score":0.5,"quality":null,"rank":{number},'
                f'"kept":{"true" if kept else "false"}{text}}}\n'
            )

    kept_rows = load_kept(path)

    assert len(kept_rows) == 2000
    assert kept_rows[3] == Row("What is 30 plus 2?", '"kept":true', 31)
    assert peak_bytes(lambda: content_hash(load_kept(path))) < 100_000


def test_selecting_costs_a_few_numbers_a_row_and_one_shard(tmp_path: Path) -> None:
    heads = 64

    def shards(count: int) -> Iterator[ResponseShard]:
        for start in range(0, count, 500):
            span = range(start, min(start + 500, count))
            response_RN = np.random.default_rng(start).random((len(span), heads)).astype(np.float16)
            yield ResponseShard(
                span=span,
                row_R=np.arange(span.start, span.stop),
                layers=range(4),
                n_heads=heads // 4,
                response_RN=response_RN,
                scorer="alignment",
                combine="response",
            )

    def select(path: Path) -> None:
        rows = open_rows(path)
        selection = select_rows(shards(len(rows)), [(1, 2), (3, 4)], 0.1, rows, seed=0)
        summarise(selection)
        write_selection(tmp_path / "selection.jsonl", selection, rows)

    assert growth_per_row(tmp_path, select) < 160  # most while rows are compared by 48 bytes of hashes a row
