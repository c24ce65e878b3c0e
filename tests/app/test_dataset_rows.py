"""Laws of looking into a dataset: its rows in pages, what they are like, and lists that hold what was asked for."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from app.api.stored_lines import PAGE_BYTES
from tests.app.conftest import Api, mark_of, rows


def pages(api: Api, path: str, **params: Any) -> list[list[dict[str, Any]]]:
    found, cursor = [], None
    while True:
        page = api.http.get(path, params={**params, **({"cursor": cursor} if cursor else {})}).json()
        found.append(page["data"])
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
        if cursor is None:
            return found


def test_rows_come_in_pages_in_the_form_in_which_jobs_read_them(api: Api) -> None:
    content = b"Frage,Antwort\n" + b"".join(b"%d?,%d\n" % (n, n) for n in range(25))
    dataset = api.upload(content, "x.csv", {"prompt": "Frage", "answer": "Antwort"})

    found = pages(api, f"/datasets/{dataset.json()['id']}/rows", limit=10)

    assert [len(page) for page in found] == [10, 10, 5]
    assert [row for page in found for row in page] == [
        {"line": n + 2, "prompt": f"{n}?", "answer": str(n), "before": []} for n in range(25)
    ]


def test_a_conversation_is_a_row_of_its_last_answer(api: Api) -> None:
    turns = [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(("system", *["user", "assistant"] * 2))]
    line = json.dumps({"messages": turns}).encode() + b"\n"

    dataset = api.upload(line + json.dumps({"messages": turns[3:]}).encode())

    ((row, last),) = pages(api, f"/datasets/{dataset.json()['id']}/rows", limit=10)
    assert row == {"line": 1, "prompt": "user 3", "answer": "assistant 4", "before": turns[:3]}
    assert last == {**row, "line": 2, "before": []}
    assert api.http.get(f"/datasets/{dataset.json()['id']}/stats").json()["prompt_chars"]["max"] == len(
        "".join(turn["content"] for turn in turns[:4])
    )


def test_a_page_of_long_rows_ends_early(api: Api) -> None:
    content = b"".join(json.dumps({"question": f"{n}?", "answer": "x" * 90_000}).encode() + b"\n" for n in range(30))

    found = pages(api, f"/datasets/{api.upload(content).json()['id']}/rows", limit=100)

    assert sum(len(page) for page in found) == 30
    assert all(len(json.dumps(page)) < PAGE_BYTES for page in found)


@pytest.mark.parametrize("cursor", ["x", "WzFd", "Wy0xXQ"])
def test_a_made_up_cursor_is_refused(api: Api, cursor: str) -> None:
    path = f"/datasets/{api.dataset()}/rows"
    answer = api.http.get(path, params={"cursor": mark_of(api, path) + cursor})

    assert (answer.status_code, answer.json()["code"]) == (422, "request.cursor")


def test_stats_say_how_long_rows_are_what_repeats_and_what_looks_personal(api: Api) -> None:
    lines = [json.dumps({"question": "q" * n, "answer": "a" * 2 * n}) for n in range(1, 101)]
    lines += [lines[0], json.dumps({"question": "whose?", "answer": "ada@example.org"})]

    dataset = api.upload("\n".join(lines).encode()).json()
    stats = api.http.get(f"/datasets/{dataset['id']}/stats").json()
    report = api.http.get(f"/datasets/{dataset['id']}/report").json()

    assert (stats["rows"], stats["duplicates"], stats["personal"]) == (102, 1, {"email": 1})
    assert (stats["prompt_chars"]["min"], stats["prompt_chars"]["max"], stats["answer_chars"]["max"]) == (1, 100, 200)
    assert 49 <= stats["prompt_chars"]["p50"] <= 52
    assert report["personal"] == {"email": {"rows": 1, "lines": [102]}}
    assert report["warnings"] == [
        "1 row repeats an earlier row.",
        "1 row looks as if it held an e-mail address, the first in line 102.",
    ]
    assert "ada@" not in json.dumps(report)


def test_stats_of_a_dataset_that_was_checked_before_they_were_counted_are_null(api: Api) -> None:
    dataset = api.dataset(7, start=7000)
    with api.engine.begin() as conn:
        fields = "'{prompt_chars,answer_chars,personal}'"
        conn.exec_driver_sql(f"update datasets set report = report - {fields}::text[] where id = %s", (dataset,))

    stats = api.http.get(f"/datasets/{dataset}/stats").json()

    assert (stats["rows"], stats["prompt_chars"], stats["personal"]) == (7, None, {})
    assert api.http.get(f"/datasets/{dataset}/report").status_code == 200


def test_a_list_holds_what_was_asked_for_in_the_order_that_was(api: Api) -> None:
    before = datetime.now(UTC)
    made = [api.upload(rows(5, start=100_000 + 10 * n), f"sums_{n}%.jsonl").json() for n in range(4)]
    csv = api.upload(b"prompt,answer\nx,y\n", "SUMS_5.csv").json()

    def listed(**params: Any) -> list[str]:
        return [one["id"] for page in pages(api, "/datasets", limit=2, **params) for one in page]

    ids = [one["id"] for one in made]
    since = {"created_after": before.isoformat()}
    assert listed(**since) == [csv["id"], *reversed(ids)]
    assert listed(**since, order="asc") == [*ids, csv["id"]]
    assert listed(**since, format="csv") == [csv["id"]]
    assert listed(**since, q="sums_5") == [csv["id"]]
    assert listed(**since, q="_2%.") == [ids[2]]
    assert listed(content_hash=made[1]["content_hash"]) == [ids[1]]
    assert (
        listed(created_before=before.isoformat(), created_after=(before - timedelta(days=1)).isoformat(), q="sums_")
        == []
    )


@pytest.mark.parametrize(
    "params",
    [
        {"q": ""},
        {"q": "a\x00b"},
        {"format": "xml"},
        {"content_hash": "x"},
        *({"created_after": text} for text in ("2026-01-01T00:00:00", "0.5", "1767225600", "2026-01-01", "yesterday")),
        {"order": "up"},
    ],
)
def test_a_filter_that_means_nothing_is_refused(api: Api, params: dict[str, str]) -> None:
    answer = api.http.get("/datasets", params=params)

    assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid")
