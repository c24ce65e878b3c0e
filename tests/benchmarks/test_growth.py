"""The growth benchmark runs whole jobs and reads a slope for what it is; eight times the rows cost eight times, and no memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.growth import PERIOD, ROOT, Facts, as_markdown, exponent, held_rows, lines, main, shows, write
from p2d.pipeline import SHARD_ROWS

ROWS, TIMES = 12 * PERIOD, 8
LEVEL = 64 << 20
"""Bytes that the larger job's peak may be above the smaller one's: 24 MiB were measured, and 257 with caches of 1,024 shapes."""

BOTH = f"""
import json
from benchmarks.growth import one_job
print(json.dumps([one_job({ROWS}, "bf16"), one_job({TIMES * ROWS}, "bf16")]))
"""


@pytest.fixture(scope="module")
def jobs() -> list[Facts]:
    """Two jobs in a process of their own, in the number type that needs most memory on a CPU."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", BOTH], check=True, capture_output=True, cwd=ROOT, env=environment)
    both: list[Facts] = json.loads(done.stdout)
    return both


def test_a_linear_cost_has_exponent_one_and_a_flat_one_zero() -> None:
    found = [{"rows": rows, "linear": 3 * rows, "square": rows**2, "flat": 7} for rows in (1000, 10_000, 100_000)]

    assert [exponent(found, name) for name in ("linear", "square", "flat")] == pytest.approx([1, 2, 0])


def test_an_exponent_is_judged_only_where_fixed_costs_are_small() -> None:
    found = [{"rows": rows, "own": rows, "mostly_fixed": rows + 5_000} for rows in (1000, 10_000, 100_000)]

    assert shows(found, "own")
    assert not shows(found, "mostly_fixed")
    assert not shows(found[:2], "own")


def test_rows_repeat_and_none_is_another() -> None:
    rows = list(lines(3000))

    assert len(set(rows)) == 3000
    assert [len(row) for row in rows] == [len(rows[place % PERIOD]) for place in range(3000)]
    assert len({len(row) for row in rows}) > 10
    assert json.loads(rows[7]) == {"question": "0000007: Add 107 to 17.??", "answer": "124"}


def test_every_step_of_a_job_is_measured(jobs: list[Facts]) -> None:
    for job in jobs:
        assert list(job["steps"]) == [
            "ingest", "validate", "heads", "respond", "select", "train", "evaluate", "package"
        ]  # fmt: skip
        assert all(cost["written_bytes"] > 0 and cost["seconds"] > 0 for cost in job["steps"].values())


def of_sets(job: Facts, what: str) -> int:
    return sum(part[what] for part in job["sets"].values())


def test_rows_tokens_and_bytes_grow_exactly_as_the_dataset(jobs: list[Facts]) -> None:
    small, large = jobs

    assert [of_sets(job, "rows") for job in jobs] == [ROWS, TIMES * ROWS]
    assert of_sets(large, "tokens") == TIMES * of_sets(small, "tokens")
    for job in jobs:
        train, guide = job["sets"]["train"], job["sets"]["guide"]
        shards = -(-job["rows"] // SHARD_ROWS)
        # Of each row two numbers of a byte pair for its four heads in the scored layer, and its place of eight bytes.
        assert job["response_bytes"] == train["rows"] * (4 * 2 + 8)
        # Every row passes once, and the guide once a shard.
        assert job["steps"]["respond"]["tokens"] == train["tokens"] + shards * guide["tokens"]
    # Beside its text every row has its line's number, in digits.
    texts = [job["steps"]["ingest"]["written_bytes"] - digits(job["rows"]) for job in jobs]
    assert texts[1] == TIMES * texts[0]


def digits(count: int) -> int:
    return sum(len(str(number)) for number in range(1, count + 1))


def test_memory_stays_level_in_bf16_whose_products_a_cpu_caches_by_shape(jobs: list[Facts]) -> None:
    small, large = jobs

    assert large["dtype"] == "bf16"
    assert large["peak_bytes"] - small["peak_bytes"] < LEVEL


def test_a_run_stays_beside_that_of_another_precision(jobs: list[Facts], tmp_path: Path) -> None:
    write(tmp_path, jobs, command="python -m benchmarks.growth", seconds=1.0)
    write(tmp_path, [{**job, "dtype": "fp32"} for job in jobs], command="python -m benchmarks.growth", seconds=1.0)

    runs: dict[str, Any] = json.loads((tmp_path / "growth.json").read_text())
    assert {dtype: run["jobs"][1]["rows"] for dtype, run in runs.items()} == dict.fromkeys(
        ("bf16", "fp32"), TIMES * ROWS
    )
    page = (tmp_path / "growth.md").read_text()
    assert page == as_markdown(runs)
    assert page.count("| **whole job** |") == 2 * 5
    assert held_rows(tmp_path, "bf16") == TIMES * ROWS  # which a smaller run does not replace
    assert held_rows(tmp_path / "elsewhere", "bf16") == 0


def test_a_larger_run_that_is_cut_replaces_none_that_was_not(
    jobs: list[Facts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        rows = int(command[command.index("--one") + 1])
        if rows == cut_at:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 0, json.dumps({**jobs[0], "rows": rows}))

    monkeypatch.setattr(subprocess, "run", child)
    cut_at, arguments = 1_000_000, ["--precision", "bf16", "--out", str(tmp_path), "--max-rows"]
    main([*arguments, "100000"])
    published = (tmp_path / "growth.json").read_bytes()

    cut_at = 100_000
    with pytest.raises(KeyboardInterrupt):
        main([*arguments, "1000000"])
    assert (tmp_path / "growth.json").read_bytes() == published

    cut_at = 0
    main([*arguments, "1000000"])
    assert held_rows(tmp_path, "bf16") == 1_000_000
