"""The growth benchmark runs a whole job, and reads a slope for what it is."""

from __future__ import annotations

import json

import pytest

from benchmarks.growth import as_markdown, exponent, lines, one_job


def test_a_linear_cost_has_exponent_one_and_a_flat_one_zero() -> None:
    jobs = [{"rows": rows, "linear": 3 * rows, "square": rows**2, "flat": 7} for rows in (1000, 10_000, 100_000)]

    assert [exponent(jobs, name) for name in ("linear", "square", "flat")] == pytest.approx([1, 2, 0])


def test_rows_repeat_and_none_is_another() -> None:
    rows = list(lines(3000))

    assert len(set(rows)) == 3000
    assert {len(row) for row in rows} <= set(range(30, 80))
    assert json.loads(rows[7]) == {"question": "7: Add 7 to 1.", "answer": "8"}


def test_every_step_of_a_job_is_measured() -> None:
    job = one_job(130)

    assert list(job["steps"]) == [
        "ingest", "validate", "heads", "respond", "select", "train", "evaluate", "package"
    ]  # fmt: skip
    assert all(cost["written_bytes"] > 0 and cost["seconds"] > 0 for cost in job["steps"].values())
    assert "| **whole job** |" in as_markdown([job, {**job, "rows": 260}])
