"""Laws of checking a file: all of it is read, all bad lines are counted, a good file is described."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2d.errors import DatasetEmpty, DatasetError, DatasetTooLarge
from p2d.faults import SHOWN, read_faults
from p2d.rows import content_hash, load_rows
from p2d.validation import DataFile, DatasetLimits, check_files, validate_file


def write(tmp_path: Path, lines: list[str]) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    return path


def row(number: int, **more: object) -> str:
    return json.dumps({"question": f"q{number}", "answer": "a" * number, **more})


def test_a_good_file_is_described_and_normalised_in_one_pass(tmp_path: Path) -> None:
    path = write(tmp_path, [row(1, topic="x"), row(5), row(1), row(1)])

    report = validate_file(path, "jsonl", normalised=tmp_path / "rows.jsonl")

    rows = load_rows(tmp_path / "rows.jsonl")
    assert [one.line for one in rows] == [1, 2, 3, 4]
    assert report.content_hash == content_hash(rows)
    assert (report.rows, report.size_bytes, report.longest_row_chars) == (4, path.stat().st_size, 7)
    assert (report.duplicates, report.duplicate_lines) == (2, (3, 4))
    assert report.warnings == ("2 rows repeat an earlier row.", "Fields that are not used: topic.")


def test_every_bad_line_is_listed_and_counted_by_code(tmp_path: Path) -> None:
    lines = [row(number) for number in range(1, 401)]
    lines[316] = "{broken"
    lines[50] = row(0)

    with pytest.raises(DatasetError) as caught:
        validate_file(write(tmp_path, lines), "jsonl")

    assert [(fault.line, fault.code) for fault in caught.value.errors] == [(51, "row.empty"), (317, "row.not_json")]
    counts = {"errors_by_code": {"row.empty": 1, "row.not_json": 1}, "good_rows": 398}
    assert caught.value.facts == {**counts, "format": "jsonl"}


def test_an_error_names_the_first_bad_lines_a_list_holds_more_and_the_counts_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2d.faults.MAX_LISTED", 3 * SHOWN)
    path, listed = write(tmp_path, ["{", row(0)] * (2 * SHOWN)), tmp_path / "listed"

    with pytest.raises(DatasetError, match="400 lines") as caught:
        check_files([DataFile(path=path, name="x.jsonl")], normalised=tmp_path / "rows", listed=listed)

    found = list(read_faults(listed))
    assert [fault.line for fault in found] == list(range(1, 3 * SHOWN + 1))
    assert caught.value.errors == tuple(found[:SHOWN])
    assert caught.value.errors_total == 4 * SHOWN
    assert caught.value.facts["errors_by_code"] == {"row.not_json": 2 * SHOWN, "row.empty": 2 * SHOWN}


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_file_without_rows_is_empty(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty"
    path.write_bytes(content)
    with pytest.raises(DatasetEmpty):
        validate_file(path, "jsonl")


def test_limits_hold_for_bytes_rows_and_one_row(tmp_path: Path) -> None:
    path = write(tmp_path, [row(1), row(2), row(200)])

    with pytest.raises(DatasetTooLarge, match="bytes"):
        validate_file(path, "jsonl", DatasetLimits(max_bytes=10))
    with pytest.raises(DatasetTooLarge, match="more than 2 rows"):
        validate_file(path, "jsonl", DatasetLimits(max_rows=2))
    with pytest.raises(DatasetError) as caught:
        validate_file(path, "jsonl", DatasetLimits(max_row_bytes=100))
    assert [(fault.line, fault.code) for fault in caught.value.errors] == [(3, "row.too_large")]
