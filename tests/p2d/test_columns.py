"""Laws of columns with other names: the same rows as under the accepted names, wrong mappings named, users' names used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from p2d.columns import FIELDS, mapped
from p2d.errors import DatasetError, MappingInvalid
from p2d.formats import READERS
from p2d.rows import Format
from p2d.validation import DataFile, DatasetReport, check_files
from tests.p2d.test_rows import WRITERS

ROWS: list[dict[str, Any]] = [{"Frage": f"q{number}", "Antwort": f"a{number}", "Thema": "x"} for number in range(9)]
GERMAN = {"prompt": "Frage", "completion": "Antwort"}


def check(tmp_path: Path, content: bytes, mapping: dict[str, str]) -> DatasetReport:
    path = tmp_path / "sent"
    path.write_bytes(content)
    return check_files([DataFile(path=path, name="sent")], normalised=tmp_path / "rows.jsonl", columns=mapped(mapping))


@pytest.mark.parametrize("format", READERS)
def test_mapped_columns_make_the_same_rows_in_every_format(tmp_path: Path, format: Format) -> None:
    plain = [{"prompt": row["Frage"], "completion": row["Antwort"]} for row in ROWS]

    report = check(tmp_path, WRITERS[format](ROWS), GERMAN)

    assert report.content_hash == check(tmp_path, WRITERS[format](plain), {}).content_hash
    assert report.mapping == GERMAN
    assert report.warnings == ("Fields that are not used: Thema.",)


@pytest.mark.parametrize(
    ("mapping", "row"),
    [
        ({"prompt": "Frage"}, {"Frage": "q", "completion": "a"}),
        ({"prompt": "Frage"}, {"Frage": "q", "answer": "a", "question": "not this"}),
        ({"prompt": "completion", "completion": "prompt"}, {"completion": "q", "prompt": "a"}),
        ({"answer": "Lösung"}, {"question": "q", "Lösung": "a"}),
        ({"prompt": "a/b~c d", "completion": "e"}, {"a/b~c d": "q", "e": "a", "messages": "not this"}),
    ],
)
def test_a_mapping_may_be_partial_and_goes_before_accepted_names(
    tmp_path: Path, mapping: dict[str, str], row: dict[str, str]
) -> None:
    report = check(tmp_path, WRITERS["jsonl"]([row]), mapping)

    plain = WRITERS["jsonl"]([{"prompt": "q", "completion": "a"}])
    assert report.content_hash == check(tmp_path, plain, {}).content_hash


def test_messages_and_the_optional_input_can_be_mapped(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert check(tmp_path, WRITERS["jsonl"]([{"dialog": turns}]), {"messages": "dialog"}).rows == 1

    rows = [{"instruction": "do", "text": "this", "output": "done"}, {"instruction": "do", "output": "done"}]
    given = check(tmp_path, WRITERS["jsonl"](rows), {"input": "text"})

    rows = [{"instruction": "do", "input": "this", "output": "done"}, {"instruction": "do", "output": "done"}]
    assert given.content_hash == check(tmp_path, WRITERS["jsonl"](rows), {}).content_hash


@pytest.mark.parametrize("format", READERS)
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, format: Format) -> None:
    with pytest.raises(MappingInvalid, match=r"no column 'Fragen'; it has Frage, Antwort, Thema") as refused:
        check(tmp_path, WRITERS[format](ROWS), {**GERMAN, "prompt": "Fragen"})

    assert [detail.code for detail in refused.value.errors] == ["mapping.no_such_column"]


def test_names_that_may_be_row_text_are_counted_and_not_said(tmp_path: Path) -> None:
    with pytest.raises(MappingInvalid) as refused:
        check(tmp_path, b"my secret number is 4711,Antwort\nq,a\n", GERMAN)

    assert "it has Antwort and 1 other" in refused.value.text


def test_faults_of_rows_point_at_the_users_own_columns(tmp_path: Path) -> None:
    rows = [*ROWS, {"Frage": "q"}, {"Frage": "", "Antwort": "a"}, {"Thema": "x"}]

    with pytest.raises(DatasetError) as refused:
        check(tmp_path, WRITERS["jsonl"](rows), GERMAN)

    found = [(detail.line, detail.code, detail.pointer) for detail in refused.value.errors]
    missing, empty, wrong = found
    assert missing == (10, "row.missing_field", "/Antwort")
    assert empty == (11, "row.empty", "/Frage")
    assert wrong == (12, "row.wrong_fields", None)
    assert "Expected Frage + Antwort; found Thema." in refused.value.errors[2].message


@pytest.mark.parametrize(
    ("mapping", "pointers", "said"),
    [
        ({"Frage": "prompt"}, ["/mapping/Frage"], ", ".join(FIELDS)),
        ({"my secret": "prompt", "answer": ""}, ["/mapping", "/mapping/answer"], "1 to 200 characters"),
        ({"prompt": "x", "answer": "x"}, ["/mapping/prompt", "/mapping/answer"], "given twice"),
        ({"prompt": "x", "output": "y"}, ["/mapping/prompt", "/mapping/output"], "no row together"),
        ({"messages": "x", "answer": "y"}, ["/mapping/messages", "/mapping/answer"], "no row together"),
        ({"question": "answer"}, ["/mapping/question"], "no row together"),
        ({"prompt": "x" * 201}, ["/mapping/prompt"], "1 to 200 characters"),
    ],
)
def test_a_mapping_that_makes_no_row_is_refused_with_every_fault(
    mapping: dict[str, str], pointers: list[str], said: str
) -> None:
    with pytest.raises(MappingInvalid) as refused:
        mapped(mapping)

    assert [detail.pointer for detail in refused.value.errors] == pointers
    assert said in refused.value.text
