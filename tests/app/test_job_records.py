"""What is on record of a job's work: notes of its workers, checkpoints, metrics, its head map and its selection."""

from __future__ import annotations

import csv
import io
from typing import Any

import pytest

from app.db.attempts import keep_log
from tests.app.conftest import Api, mark_of


@pytest.fixture(scope="module")
def done(api: Api) -> str:
    """A job that has succeeded."""
    job_id = api.job(reuse="never")
    api.finish(job_id)
    return job_id


def pages(api: Api, path: str, **params: Any) -> list[dict[str, Any]]:
    """Everything that a list has, page by page."""
    found: list[dict[str, Any]] = []
    answer = api.http.get(path, params=params)
    while True:
        assert answer.status_code == 200, answer.text
        found += answer.json()["data"]
        if not answer.json()["has_more"]:
            return found
        assert "Link" in answer.headers
        answer = api.http.get(path, params={**params, "cursor": answer.json()["next_cursor"]})


def test_the_log_tells_each_attempt_from_beginning_to_end(api: Api, done: str) -> None:
    lines = pages(api, f"/jobs/{done}/logs", limit=7)

    assert lines == pages(api, f"/jobs/{done}/logs", limit=100)
    by_attempt: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_attempt.setdefault(line["attempt_id"], []).append(line)
    attempts = pages(api, f"/jobs/{done}/attempts")
    assert list(by_attempt) == [attempt["id"] for attempt in attempts]
    for found in by_attempt.values():
        events = [line["event"] for line in found]
        assert events[0] == "attempt.began"
        assert events[-1] == "attempt.ended"
        assert {"inputs.fetched", "outputs.stored", "step.cost"} <= set(events)
        assert [line["at"] for line in found] == sorted(line["at"] for line in found)
    train = next(found for found in by_attempt.values() if found[0]["step"] == "train")
    assert {"checkpoint.stored"} <= {line["event"] for line in train}
    assert train[-1]["facts"]["outcome"] == "done"


def test_no_log_line_holds_a_word_of_a_row(api: Api, done: str) -> None:
    text = api.http.get(f"/jobs/{done}/logs", params={"limit": 100}).text

    assert "What is" not in text


def test_a_log_that_loses_its_oldest_lines_is_paged_without_gap_or_repetition(api: Api, done: str) -> None:
    first = pages(api, f"/jobs/{done}/attempts")[0]
    page = api.http.get(f"/jobs/{done}/logs", params={"limit": 3}).json()
    with api.engine.begin() as conn:
        row = conn.exec_driver_sql("select step_id, token, log from attempts where id = %s", (first["id"],)).one()
        keep_log(conn, row[0], row[1], row[2][2:], 2)

    rest = api.http.get(f"/jobs/{done}/logs", params={"limit": 100, "cursor": page["next_cursor"]}).json()["data"]

    assert (rest[0]["attempt_id"], rest[0]["event"], rest[0]["facts"]) == (
        first["id"],
        row[2][3]["event"],
        row[2][3]["facts"],
    )
    with api.engine.begin() as conn:
        keep_log(conn, row[0], row[1], row[2], 0)


def test_a_finished_job_goes_on_from_the_outputs_of_every_step(api: Api, done: str) -> None:
    found = pages(api, f"/jobs/{done}/checkpoints", limit=2)

    assert [one["step"] for one in found][:2] == ["validate", "heads"]
    assert {one["step"] for one in found} == {
        "validate", "heads", "respond", "select", "train", "evaluate", "package",
    }  # fmt: skip
    assert {one["kind"] for one in found} == {"outputs"}
    train = next(one for one in found if one["step"] == "train")
    weights = next(file for file in train["files"] if file["name"] == "heads.safetensors")
    assert api.http.get(f"/artifacts/{weights['artifact_id']}").json()["sha256"] == weights["sha256"]


def with_metrics(api: Api, count: int) -> str:
    """A job whose training told its loss so many times: the stub is through before it could tell anything."""
    job_id = api.job()
    with api.engine.begin() as conn:
        conn.exec_driver_sql(
            "insert into events (job_id, seq, type, data) select %s, 1000 + n, 'metric', jsonb_build_object('step', 'train', "
            "'shard', 0, 'attempt', 1, 'done', n, 'total', 1000, 'values', jsonb_build_object('loss', 1.0 / n)) "
            "from generate_series(1, %s) n",
            (job_id, count),
        )
    return job_id


def test_metrics_are_series_and_a_table_of_the_same(api: Api) -> None:
    job_id = with_metrics(api, 7)

    found = api.http.get(f"/jobs/{job_id}/metrics").json()
    table = api.http.get(f"/jobs/{job_id}/metrics.csv")

    assert table.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(table.text)))
    (loss,) = found["series"]
    assert (loss["step"], loss["shard"], loss["name"]) == ("train", 0, "loss")
    assert [point["value"] for point in loss["points"]] == [float(row["value"]) for row in rows]
    assert [point["done"] for point in loss["points"]] == list(range(1, 8))
    assert not found["thinned"]
    api.http.post(f"/jobs/{job_id}/cancel")


def test_long_series_are_thinned_but_for_their_ends(api: Api) -> None:
    job_id = with_metrics(api, 1000)

    found = api.http.get(f"/jobs/{job_id}/metrics", params={"points": 10}).json()

    done = [point["done"] for point in found["series"][0]["points"]]
    assert done == [1, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]
    assert found["thinned"]
    api.http.post(f"/jobs/{job_id}/cancel")


def test_a_job_leads_to_its_head_map_and_its_selection(api: Api, done: str) -> None:
    job = api.http.get(f"/jobs/{done}").json()

    assert api.http.get(f"/jobs/{done}/head-map").json() == api.http.get(f"/head-maps/{job['head_map']}").json()
    assert api.http.get(f"/jobs/{done}/selection").json() == api.http.get(f"/selections/{job['selection']}").json()


def test_a_job_that_has_not_run_has_records_but_nothing_in_them(api: Api) -> None:
    job_id = api.job()

    for path in ("logs", "checkpoints"):
        assert api.http.get(f"/jobs/{job_id}/{path}").json()["data"] == []
    assert api.http.get(f"/jobs/{job_id}/metrics").json()["series"] == []
    for path, code in (("head-map", "head_map.not_found"), ("selection", "selection.not_found")):
        answer = api.http.get(f"/jobs/{job_id}/{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, code)
    api.http.post(f"/jobs/{job_id}/cancel")


@pytest.mark.parametrize("cursor", ["x", "WzFd", "WyJhIiwgMV0"])
def test_a_made_up_cursor_is_refused(api: Api, done: str, cursor: str) -> None:
    path = f"/jobs/{done}/logs"
    answer = api.http.get(path, params={"cursor": mark_of(api, path) + cursor})

    assert (answer.status_code, answer.json()["code"]) == (422, "request.cursor")
