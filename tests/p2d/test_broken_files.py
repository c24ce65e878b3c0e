"""Whatever bytes a dataset file holds, reading it ends in rows or in an error of ours; good rows come back as they were."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2d.errors import P2DError
from p2d.rows import load_rows
from p2d.validation import DataFile, DatasetLimits, check_files

LIMITS = DatasetLimits(max_bytes=1_000_000, max_rows=1000, max_row_bytes=10_000)
WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5)
Pairs = list[tuple[str, str]]


def jsonl(pairs: Pairs) -> bytes:
    return b"".join(json.dumps({"prompt": prompt, "answer": answer}).encode() + b"\n" for prompt, answer in pairs)


def array(pairs: Pairs) -> bytes:
    return json.dumps([{"prompt": prompt, "answer": answer} for prompt, answer in pairs]).encode()


def table(pairs: Pairs) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([("prompt", "answer"), *pairs])
    return text.getvalue().encode()


def parquet(pairs: Pairs) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"prompt": [one for one, _ in pairs], "answer": [one for _, one in pairs]}), sink)
    return sink.getvalue()


def zipped(pairs: Pairs) -> bytes:
    return gzip.compress(jsonl(pairs), 1)


def zstd(pairs: Pairs) -> bytes:
    return bytes(pa.compress(jsonl(pairs), codec="zstd", asbytes=True))


KINDS: dict[str, Callable[[Pairs], bytes]] = {
    "rows.jsonl": jsonl,
    "rows.json": array,
    "rows.csv": table,
    "rows.parquet": parquet,
    "rows.jsonl.gz": zipped,
    "rows.jsonl.zst": zstd,
}


@pytest.mark.parametrize("name", KINDS)
def test_good_rows_come_back(name: str, tmp_path: Path) -> None:
    @settings(max_examples=30)
    @given(pairs=PAIRS)
    def check(pairs: Pairs) -> None:
        (tmp_path / name).write_bytes(KINDS[name](pairs))
        check_files([DataFile(path=tmp_path / name, name=name)], LIMITS, normalised=tmp_path / "normalised")
        assert [(row.prompt, row.answer) for row in load_rows(tmp_path / "normalised")] == pairs

    check()


@pytest.mark.parametrize("name", KINDS)
def test_bytes_that_are_not_a_file_of_rows_end_in_an_error_of_ours(name: str, tmp_path: Path) -> None:
    @settings(max_examples=80)
    @given(pairs=PAIRS, data=st.data())
    def check(pairs: Pairs, data: st.DataObject) -> None:
        content = KINDS[name](pairs)
        at = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.integers(0, 8))
        content = content[:at] + data.draw(st.binary(max_size=8)) + content[at + cut :]
        (tmp_path / name).write_bytes(data.draw(st.sampled_from([content, content, content[:at], content[at:]])))
        with contextlib.suppress(P2DError):
            check_files([DataFile(path=tmp_path / name, name=name)], LIMITS, normalised=tmp_path / "normalised")

    check()
