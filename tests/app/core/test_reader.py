"""Laws of reading a stranger's file apart: what is too much ends that process within its bounds, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from app.core.reader import check_apart
from app.dataset_errors import DatasetReaderDied, DatasetTooCostly
from app.settings import Settings
from p2d.check_process import Bounds, CheckRequest
from p2d.columns import ACCEPTED
from p2d.errors import DatasetError, DatasetTooLarge
from p2d.validation import DataFile, DatasetLimits, DatasetReport
from tests.app.conftest import rows
from tests.rig import wait_for

MiB = 1 << 20
BOUNDS = Bounds(memory_bytes=2048 * MiB, seconds=60, file_bytes=256 * MiB)


def bounded(**limits: float) -> Settings:
    return Settings.model_validate({"check_max_s": 60, "check_file_bytes": 256 * MiB, **limits})


def check(path: Path, **limits: float) -> DatasetReport:
    """Check the file apart, and see that it leaves no process and no file but the rows of a good one."""
    normalised = path.with_name("rows")
    try:
        files = [DataFile(path=path, name=path.name)]
        listed = path.with_name("listed")
        return check_apart(files, bounded(**limits), normalised=normalised, listed=listed, columns=ACCEPTED)
    finally:
        assert {one.name for one in path.parent.iterdir()} <= {path.name, "rows", "listed"}
        assert readers() == []


def readers() -> list[psutil.Process]:
    """The reading processes of this one."""
    return [child for child in psutil.Process().children() if "p2d.check_process" in child.cmdline()]


def request(path: Path, bounds: Bounds = BOUNDS) -> CheckRequest:
    return CheckRequest(
        files=[(str(path), path.name)],
        limits=DatasetLimits(),
        normalised=str(path.with_name("rows")),
        listed=str(path.with_name("listed")),
        mapping={},
        result=str(path.with_name("result")),
        bounds=bounds,
    )


def found(path: Path) -> dict[str, Any]:
    """What the process writes about a file."""
    env = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", "-m", "p2d.check_process"]
    subprocess.run(command, input=request(path).to_json(), text=True, check=True, env=env, timeout=60)
    result: dict[str, Any] = json.loads(path.with_name("result").read_text())
    return result


def long_text(path: Path, size: int, *, count: int = 1) -> Path:
    """A small Parquet file of `count` rows that all hold one text of `size` characters."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count), pyarrow.array(["a" * size]))
    table = pyarrow.table({"question": texts, "answer": pyarrow.array(["b"] * count)})
    pyarrow.parquet.write_table(table, path, compression="zstd", write_statistics=False)
    assert path.stat().st_size < MiB
    return path


def test_a_good_file_is_reported_as_it_would_be_here(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(rows(30))

    report = check(path)

    assert (report.format, report.rows, report.warnings) == ("jsonl", 30, ())
    assert len((tmp_path / "rows").read_bytes().splitlines()) == 30


def test_a_reader_that_hangs_is_killed_at_its_deadline(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    os.mkfifo(path)  # nobody ever writes into it: opening it waits for ever
    began = time.monotonic()

    with pytest.raises(DatasetTooCostly, match="more than 1 seconds"):
        check(path, check_max_s=1)

    assert time.monotonic() - began < 10


def test_a_reader_whose_parent_is_gone_ends_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    os.mkfifo(path)
    asked = request(path, replace(BOUNDS, seconds=-4.5))  # the alarm rings five seconds after the deadline
    command = [sys.executable, "-P", "-m", "p2d.check_process"]

    done = subprocess.run(command, input=asked.to_json(), text=True, check=False, timeout=30)

    assert done.returncode == -signal.SIGALRM


def test_a_small_file_that_fills_the_memory_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert check(long_text(tmp_path / "data.parquet", 1000), check_memory_bytes=700 * MiB).rows == 1
    (tmp_path / "data.parquet").unlink()

    with pytest.raises(DatasetTooCostly, match="bytes of memory") as refused:
        check(long_text(tmp_path / "bomb.parquet", 100 * MiB), check_memory_bytes=700 * MiB)

    assert (refused.value.code, refused.value.fault) == ("dataset.too_costly", "user")
    assert "P2D_CHECK_MEMORY_BYTES" in refused.value.hint


def test_a_small_file_that_would_fill_the_disk_is_refused(tmp_path: Path) -> None:
    path = long_text(tmp_path / "bomb.parquet", MiB // 2, count=200)

    with pytest.raises(DatasetTooLarge, match="rows take more than"):
        check(path, check_file_bytes=20 * MiB)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGSEGV, DatasetReaderDied), (signal.SIGKILL, DatasetTooCostly)])
def test_a_reader_that_is_killed_is_the_files_fault(tmp_path: Path, number: int, error: type[DatasetError]) -> None:
    path = tmp_path / "data.jsonl"
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(check, path)
        wait_for(readers, "the process")[0].send_signal(number)

        with pytest.raises(error):
            checking.result(timeout=30)


BOMBS = {
    "deep nesting": b'{"question": ' + b"[" * 900_000,
    "a closed deep nesting": b'{"question": "q", "answer": "a", "x": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    "a number of a million digits": b'{"question": ' + b"9" * 1_000_000 + b"}",
    "a million little lists": b'{"question": [' + b"[]," * 300_000 + b"[]]}",
    "an array that never ends": b"[" + b"[" * 3_000_000,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_of_json_is_a_bad_row_and_stays_small(tmp_path: Path, bomb: bytes) -> None:
    path = tmp_path / "bomb.json"
    path.write_bytes(bomb)

    result = found(path)

    assert result["error"]["code"] == "dataset.invalid"
    assert result["peak_bytes"] < 128 * MiB


def test_fifty_bad_lines_of_100k_are_all_found_in_memory_that_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(count: int) -> tuple[int, list[int]]:
        folder = tmp_path / str(count)
        folder.mkdir()
        lines = rows(count).splitlines(keepends=True)
        for number in bad[:: 100_000 // count]:
            lines[number * count // 100_000] = b'{"question": "q"}\n'
        path = folder / "data.jsonl"
        path.write_bytes(b"".join(lines))
        result = found(path)
        return result["peak_bytes"], [detail["line"] for detail in result["error"]["errors"]]

    bad = list(range(500, 100_000, 2000))
    small, _ = peak(1000)
    large, lines = peak(100_000)

    assert lines == [number + 1 for number in bad]
    assert len(lines) == 50
    assert large < 64 * MiB
    assert large - small < 8 * MiB

    worst = tmp_path / "data.jsonl"
    worst.write_bytes(b"{\n" * 100_000)
    result = found(worst)
    assert result["error"]["errors_total"] == 100_000
    assert len(result["error"]["errors"]) == 100
    assert result["peak_bytes"] - small < 8 * MiB


def test_the_process_knows_no_secret_and_no_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    monkeypatch.setenv("P2D_DATABASE_URL", "canary")
    from app.core.reader import _environment

    script = "import os, sys, p2d.check_process; print(dict(os.environ), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=_environment(), capture_output=True, text=True, check=True
    )

    assert "canary" not in done.stdout
    assert done.stdout.strip().endswith("False")


def test_a_fault_of_the_file_comes_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"question": "q"}\nnonsense\n' + rows(2))

    with pytest.raises(DatasetError) as refused:
        check(path)

    assert [(detail.code, detail.line) for detail in refused.value.errors] == [
        ("row.missing_field", 1),
        ("row.not_json", 2),
    ]
    counts = {"errors_by_code": {"row.missing_field": 1, "row.not_json": 1}, "good_rows": 2}
    assert refused.value.facts == {**counts, "format": "jsonl"}
