"""Laws of reading: the same rows from any format, every bad line named, no text repeated, memory bounded."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2d.errors import DatasetError, DatasetTooLarge, ErrorDetail
from p2d.formats import READERS
from p2d.row_files import open_rows
from p2d.rows import Format, Row, Turn, content_hash, conversation, load_rows, read_rows, sniff_format, write_rows

Fields = list[dict[str, Any]]


def as_jsonl(rows: Fields) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_json(rows: Fields) -> bytes:
    return json.dumps(rows, indent=2).encode()


def as_csv(rows: Fields) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Fields) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


WRITERS: dict[Format, Callable[[Fields], bytes]] = {
    "jsonl": as_jsonl,
    "json": as_json,
    "csv": as_csv,
    "parquet": as_parquet,
}


def read(tmp_path: Path, content: bytes, format: Format | None = None) -> list[Row | ErrorDetail]:
    path = tmp_path / "file"
    path.write_bytes(content)
    return list(read_rows(path, format or sniff_format(path)))


def faults(found: list[Row | ErrorDetail]) -> list[tuple[int | None, str, str | None]]:
    return [(one.line, one.code, one.pointer) for one in found if isinstance(one, ErrorDetail)]


# --- every format ----------------------------------------------------------------------------------------------------


def test_every_format_has_a_writer_here() -> None:
    assert set(WRITERS) == set(READERS)


@pytest.mark.parametrize("format", WRITERS)
def test_the_same_rows_come_out_of_every_format(tmp_path: Path, format: Format) -> None:
    content = [{"question": 'two\nlines, a "quote"', "answer": "é \u2028 \U0001f600"}, {"question": "q", "answer": "a"}]

    found = read(tmp_path, WRITERS[format](content))

    assert [(row.prompt, row.answer) for row in found if isinstance(row, Row)] == [
        (row["question"], row["answer"]) for row in content
    ]


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize(
    ("fields", "prompt", "answer"),
    [
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"prompt": "q", "answer": "a"}, "q", "a"),
        ({"instruction": "do", "input": "it", "output": "a"}, "do\n\nit", "a"),
        ({"instruction": "do", "input": "", "output": "a"}, "do", "a"),
        ({"instruction": "do", "output": "a"}, "do", "a"),
        ({"question": "q", "answer": "a", "id": "7", "prompt": "p"}, "q", "a"),
    ],
)
def test_known_fields_make_a_row(
    tmp_path: Path, format: Format, fields: dict[str, str], prompt: str, answer: str
) -> None:
    (row,) = read(tmp_path, WRITERS[format]([fields]), format)

    assert isinstance(row, Row)
    assert (row.prompt, row.answer) == (prompt, answer)


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize(
    ("fields", "code", "pointer"),
    [
        ({"question": "q", "solution": "a"}, "row.missing_field", "/answer"),
        ({"output": "a", "x": "y"}, "row.missing_field", "/instruction"),
        ({"x": "y"}, "row.wrong_fields", None),
        ({"question": "q", "answer": ""}, "row.empty", "/answer"),
        ({"question": "q", "answer": " \n\t"}, "row.empty", "/answer"),
        ({"question": "", "answer": "a"}, "row.empty", "/question"),
        ({"question": "q\x00", "answer": "a"}, "row.nul", "/question"),
    ],
)
def test_wrong_fields_are_named(
    tmp_path: Path, format: Format, fields: dict[str, str], code: str, pointer: str | None
) -> None:
    found = read(tmp_path, WRITERS[format]([fields]), format)

    assert [(code_, pointer_) for _, code_, pointer_ in faults(found)] == [(code, pointer)]


@pytest.mark.parametrize("format", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("value", [3, 1.5, True, None, ["a"], {"b": "c"}])
def test_only_text_is_text(tmp_path: Path, format: Format, value: Any) -> None:
    found = read(tmp_path, WRITERS[format]([{"question": "q", "answer": value}]), format)

    assert [code for _, code, _ in faults(found)] == ["row.wrong_type"]


SYSTEM, USER, ASSISTANT = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))


@pytest.mark.parametrize("format", ["jsonl", "json", "parquet"])
def test_a_conversations_last_answer_is_the_rows_and_all_before_is_shown(tmp_path: Path, format: Format) -> None:
    conversations = [[USER, ASSISTANT], [SYSTEM, USER, ASSISTANT], [USER, ASSISTANT] * 2]

    found = read(tmp_path, WRITERS[format]([{"messages": turns} for turns in conversations]), format)

    system, user, assistant = Turn("system", "s"), Turn("user", "u"), Turn("assistant", "a")
    rows = [Row("u", "a", 1), Row("u", "a", 2, (system,)), Row("u", "a", 3, (user, assistant))]
    assert found == rows
    assert len({content_hash([row]) for row in rows}) == 3
    write_rows(tmp_path / "rows.jsonl", rows)
    assert load_rows(tmp_path / "rows.jsonl") == rows == list(open_rows(tmp_path / "rows.jsonl"))
    again = b"".join(map(conversation, rows))
    assert [row for row in read(tmp_path, again) if isinstance(row, Row)] == rows


def test_a_row_of_one_exchange_is_stored_and_hashed_as_it_always_was(tmp_path: Path) -> None:
    row = Row("q\u00e4", "a", 7)

    write_rows(tmp_path / "rows.jsonl", [row])

    assert (tmp_path / "rows.jsonl").read_text() == '{"prompt":"q\u00e4","answer":"a","line":7}\n'
    assert content_hash([row]) == hashlib.sha256('["q\u00e4","a"]\n'.encode()).hexdigest()


@pytest.mark.parametrize(
    ("turns", "code", "pointer"),
    [
        ([], "row.messages", "/messages"),
        ([USER], "row.messages", "/messages/0/role"),
        ([SYSTEM, USER, ASSISTANT, USER], "row.messages", "/messages/3/role"),
        ([ASSISTANT], "row.messages", "/messages/0/role"),
        ([SYSTEM, ASSISTANT], "row.messages", "/messages/1/role"),
        ([USER, SYSTEM, ASSISTANT], "row.messages", "/messages/1/role"),
        ([USER, USER, ASSISTANT], "row.messages", "/messages/1/role"),
        ([USER, ASSISTANT, ASSISTANT], "row.messages", "/messages/2/role"),
        ([USER, {"role": "tool", "content": "x"}], "row.role", "/messages/1/role"),
        ([USER, {"role": ["user"], "content": "x"}], "row.role", "/messages/1/role"),
        ([USER, {"content": "x"}], "row.role", "/messages/1/role"),
        ([{"role": "system", "content": " "}, USER, ASSISTANT], "row.empty", "/messages/0/content"),
        ([USER, {"role": "assistant", "content": None}], "row.wrong_type", "/messages/1/content"),
        (["u", "a"], "row.wrong_type", "/messages"),
        ("ua", "row.wrong_type", "/messages"),
    ],
)
def test_a_turn_that_is_wrong_is_named(tmp_path: Path, turns: Any, code: str, pointer: str) -> None:
    content = json.dumps({"messages": turns}).encode() + b"\n"

    assert faults(read(tmp_path, content)) == [(1, code, pointer)]


# --- lines -----------------------------------------------------------------------------------------------------------


def test_each_bad_line_of_json_lines_is_named_with_its_number_and_the_rest_is_read(tmp_path: Path) -> None:
    good = b'{"question": "q", "answer": "a"}'
    lines = [
        good,
        b"",
        b"{bad",
        b"[1]",
        b'"text"',
        b'{"question": "\\ud800", "answer": "a"}',
        b'{"question": "q", "answer": "a", "n": NaN}',
        b'{"question": "q", "answer": "a", "n": 1e999}',
        b'{"question": "q", "answer": "a", "n": ' + b"9" * 5000 + b"}",
        b'{"question": "q", "question": "q", "answer": "a"}',
        b'{"question": "\xff", "answer": "a"}',
        b"[" * 100_000,
        b'\xef\xbb\xbf{"question": "q", "answer": "a"}',
        b'{"question": "' + b"x" * (1 << 20) + b'", "answer": "a"}',
        good,
        b"  ",
        b"",
    ]

    found = read(tmp_path, b"\xef\xbb\xbf" + b"\n".join(lines))

    assert [row.line for row in found if isinstance(row, Row)] == [1, 15]
    assert [(line, code) for line, code, _ in faults(found)] == [
        (2, "row.blank_line"),
        (3, "row.not_json"),
        (4, "row.not_object"),
        (5, "row.not_object"),
        (6, "row.surrogate"),
        (7, "row.not_finite"),
        (8, "row.not_finite"),
        (9, "row.not_json"),
        (10, "row.duplicate_key"),
        (11, "row.not_utf8"),
        (12, "row.too_deep"),
        (13, "row.not_json"),
        (14, "row.too_large"),
    ]


def test_lines_may_end_as_on_windows_or_without_an_end(tmp_path: Path) -> None:
    line = b'{"question": "q", "answer": "a"}'
    assert [row.line for row in read(tmp_path, line + b"\r\n" + line)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "codes"),
    [
        (b"[]", []),
        (b"", []),
        (b" \n", []),
        (b'[{"question": "q", "answer": "a"}', ["row.not_json"]),
        (b'[{"question": "q", "answer": "a"},]', ["row.not_json"]),
        (b'[{"question": "q", "answer": "a"}] x', ["row.not_json"]),
        (b'[{"question": "q", "answer": "a"}, 3, {"question": "q]", "answer": "\\"}"}]', ["row.not_object"]),
        (b'[{"question": "q" "answer": "a"}, {"question": "q", "answer": "a"}]', ["row.not_json"]),
        (b"[}", ["row.not_json"]),
        (b'{"question": "q", "answer": "a"}', ["row.not_json"]),
        (b'[{"question": "unterminated', ["row.not_json"]),
        (b"[" * 200_000, ["row.not_json"]),
        (b"[" * 2_000_000, ["row.too_large"]),
        (b'["' + b"x" * 2_000_000 + b'"]', ["row.too_large"]),
    ],
)
def test_a_json_array_is_split_whatever_its_elements_hold(tmp_path: Path, content: bytes, codes: list[str]) -> None:
    assert [code for _, code, _ in faults(read(tmp_path, content, "json"))] == codes


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"question,answer\n", []),
        (b"question,answer\nq,a\n\nq,b\n", [2, 4]),
        (b'question,answer\n"q\n\nq",a\nq,b\n', [2, 5]),
        (b"question,answer\nq\n", [(2, "row.cells")]),
        (b"question,answer\nq,a,b\nq,a\n", [(2, "row.cells"), 3]),
        (b"question,question\nq,a\n", [(1, "row.duplicate_key")]),
        (b'question,answer\nq,"a\n', [(2, "row.not_csv")]),
        (b'question,answer\nq,"a"x\nq,a\n', [(2, "row.not_csv"), 3]),
        (b"question,answer\n\xff,a\nq,a\n", [(2, "row.not_utf8"), 3]),
        (b"question,answer\rq,a\r", [(1, "row.not_csv")]),
        (b"\xef\xbb\xbfquestion,answer\nq,a\n", [2]),
    ],
)
def test_csv_lines_are_physical_lines(tmp_path: Path, content: bytes, expected: list[Any]) -> None:
    found = read(tmp_path, content, "csv")

    assert [one.line if isinstance(one, Row) else (one.line, one.code) for one in found] == expected


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(tmp_path: Path) -> None:
    content = b'question,answer\n"q,a\n' + b"q,a\n" * 1_000_000

    assert faults(read(tmp_path, content, "csv")) == [(2, "row.too_large", None)]


def test_a_file_that_only_claims_to_be_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="Parquet"):
        read(tmp_path, b"PAR1" + b"\x00" * 64 + b"PAR1")


def test_a_row_of_a_parquet_file_is_measured_in_bytes_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(as_parquet([{"question": "\N{GRINNING FACE}" * 600, "answer": "x"}]))

    assert faults(list(read_rows(path, "parquet", max_row_bytes=2_400))) == [(1, "row.too_large", None)]
    assert faults(list(read_rows(path, "parquet", max_row_bytes=2_401))) == []


def test_a_small_parquet_file_that_unpacks_to_a_huge_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2d.formats.MAX_ROW_GROUP_BYTES", 1 << 20)
    path = tmp_path / "bomb"
    column = pyarrow.array(["x" * 10_000] * 200)
    table = pyarrow.table({"question": column, "answer": column})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)

    assert path.stat().st_size < 100_000
    with pytest.raises(DatasetTooLarge):
        list(read_rows(path, "parquet"))


def test_messages_never_hold_row_text(tmp_path: Path) -> None:
    secret = "my secret number is 4711"
    for content, format in [
        (f"{secret},{secret} too\nq,a\n".encode(), "csv"),
        (json.dumps({secret: "x"}).encode(), "jsonl"),
        (json.dumps({"question": secret, "answer": ""}).encode(), "jsonl"),
        (f'{{"question": {secret}'.encode(), "jsonl"),
    ]:
        for one in read(tmp_path, content, format):  # type: ignore[arg-type]
            assert isinstance(one, ErrorDetail)
            assert "secret" not in one.message


@pytest.mark.parametrize("format", ["jsonl", "json", "csv"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, format: Format) -> None:
    path = tmp_path / "file"
    path.write_bytes(WRITERS[format]([{"question": "q" * 1000, "answer": str(i)} for i in range(20_000)]))
    tracemalloc.start()
    count = sum(1 for _ in read_rows(path, format))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert count == 20_000
    assert peak < 4 << 20


# --- the normalised form ---------------------------------------------------------------------------------------------

plain = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1).filter(str.strip)


@given(st.lists(st.tuples(plain, plain), max_size=5))
def test_rows_survive_being_written_and_loaded(tmp_path_factory: pytest.TempPathFactory, texts: list[Any]) -> None:
    rows = [Row(prompt, answer, line) for line, (prompt, answer) in enumerate(texts, start=1)]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"

    assert write_rows(path, rows) == len(rows)

    assert load_rows(path) == rows
    assert list(read_rows(path, "jsonl")) == rows


def test_the_content_hash_knows_order_and_text_but_not_lines() -> None:
    rows = [Row("a", "b", 1), Row("c", "d", 2)]

    assert content_hash(rows) == content_hash([Row("a", "b", 7), Row("c", "d", 9)])
    assert content_hash(rows) != content_hash(rows[::-1])
    assert content_hash([Row("ab", "c", 1)]) != content_hash([Row("a", "bc", 1)])


@pytest.mark.parametrize(
    ("content", "name", "format"),
    [
        (b'{"a": 1}', "x.json", "jsonl"),
        (b' \n[{"a": 1}]', "x.jsonl", "json"),
        (b"\xef\xbb\xbf[", "", "json"),
        (b"a,b\n1,2", "", "csv"),
        (b"[a],b\n1,2", "x.CSV", "csv"),
        (b"PAR1", "x.csv", "parquet"),
        (b"", "", "jsonl"),
        (b"garbage", "x.jsonl", "jsonl"),
    ],
)
def test_the_format_is_told_from_the_content(tmp_path: Path, content: bytes, name: str, format: Format) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert sniff_format(path, name) == format
