"""What `./run load` makes of its measurements. The measuring itself needs a quiet machine: `./run load --quick` tries it."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.service import Figure, as_markdown, percentile, row, write_stub_model
from p2d.model_info import read_model_info
from p2d.rows import read_rows


def test_a_percentile_is_a_value_that_was_measured() -> None:
    values = [float(value) for value in range(100, 0, -1)]

    assert (percentile(values, 50), percentile(values, 99), percentile([7.0], 99)) == (51.0, 100.0, 7.0)


def test_the_page_says_which_targets_are_met() -> None:
    figures = [Figure("a", 9.0, "ms", 10.0), Figure("b", 11.0, "ms", 10.0), Figure("c", 1.0, "s")]

    page = as_markdown({"command": "./run load", "machine": "m", "load_before": 0.5, "seconds": 1.0}, figures)

    assert page.splitlines()[-3:] == [
        "| a | 9 ms | <= 10 ms | met |",
        "| b | 11 ms | <= 10 ms | missed |",
        "| c | 1 s |  |  |",
    ]


def test_the_service_takes_its_rows_and_its_model(tmp_path: Path) -> None:
    write_stub_model(tmp_path / "small")
    (tmp_path / "rows.jsonl").write_bytes(row(1) + row(2, 900))

    assert read_model_info(tmp_path / "small").name == "small"
    assert [one.answer for one in read_rows(tmp_path / "rows.jsonl", "jsonl") if hasattr(one, "answer")] == ["2", "3"]
    assert len(json.loads(row(2, 900))["question"]) > 900
