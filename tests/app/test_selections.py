"""Laws of selections over HTTP: made alone, every row explained, another ratio as a view, the kept rows as a file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from app.api import selections
from app.api.selections import _exported
from app.core.garbage import collect
from p2d.rows import Row, Turn, conversation, row_line
from p2d.selection_reasons import UNLIKE, RowReason
from tests.app.conftest import MODEL, Api, a_job, rows
from tests.app.test_artifacts import all_rows

ROWS = 60
ASKED = {"base_model": MODEL, "heads": {"proxy_rows": 8, "ratio": 0.5}}


@pytest.fixture(scope="module")
def dataset(api: Api) -> str:
    return api.dataset(ROWS)


@pytest.fixture(scope="module")
def made(api: Api, dataset: str) -> dict[str, Any]:
    """A selection that was made alone."""
    answer = api.http.post("/selections", json={**ASKED, "dataset": dataset})
    assert answer.status_code == 202, answer.text
    api.finish(answer.json()["id"])
    job = api.http.get(answer.headers["location"]).json()
    assert (job["kind"], job["status"]) == ("select_data", "succeeded")
    return dict(api.http.get(f"/selections/{job['selection']}").json())


@pytest.mark.parametrize("later", [{"kind": "adapt"}, {"controls": []}, {"data": {"selection": "x"}}])
def test_what_only_training_needs_is_refused(api: Api, dataset: str, later: dict[str, Any]) -> None:
    answer = api.http.post("/selections", json={**ASKED, "dataset": dataset, **later})

    assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid")


def test_a_selection_is_made_of_an_earlier_head_map(api: Api, made: dict[str, Any], dataset: str) -> None:
    head_map = api.http.get(f"/jobs/{made['job_id']}").json()["head_map"]
    answer = api.http.post(
        "/selections", json={"base_model": MODEL, "dataset": dataset, "heads": {"head_map": head_map}}
    )

    api.finish(answer.json()["id"])

    later = api.http.get(f"/jobs/{answer.json()['id']}").json()
    reason = api.http.get(f"/selections/{later['selection']}/rows/9").json()
    assert (later["head_map"], len(reason["heads"])) == (None, 1)  # of the default ratio


def test_the_list_is_filtered(api: Api, made: dict[str, Any], dataset: str) -> None:
    wanted = {"dataset": dataset, "base_model": MODEL, "scorer": "alignment_likelihood"}
    mine = api.http.get("/selections", params=wanted).json()

    assert made["id"] in [one["id"] for one in mine["data"]]
    assert made in mine["data"]
    assert api.http.get("/selections", params={"scorer": "icl"}).json()["data"] == []
    first = api.http.get("/selections", params={"limit": 1}).json()
    assert len(first["data"]) == 1


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [None, True, False])
def test_best_first_is_the_same_rows_in_the_order_of_their_ranks(
    api: Api, made: dict[str, Any], kept: bool | None
) -> None:
    only = {} if kept is None else {"kept": kept}
    expected = sorted(all_rows(api, made["id"], limit=100, **only), key=lambda row: row["rank"])

    for limit in (1, 7, 100):
        assert all_rows(api, made["id"], limit=limit, order="score", **only) == expected


@pytest.mark.parametrize("order", ["row", "score"])
@pytest.mark.parametrize("ratio", [0.01, 0.05, 0.5, 1.0])
def test_another_ratio_is_another_view_of_the_same_scores(
    api: Api, made: dict[str, Any], ratio: float, order: str
) -> None:
    own = {row["row"]: row for row in all_rows(api, made["id"], limit=100)}
    view = api.http.get(f"/selections/{made['id']}", params={"ratio": ratio}).json()

    seen = all_rows(api, made["id"], limit=9, order=order, ratio=ratio)

    best = sorted(own, key=lambda row: own[row]["rank"])[: view["kept"]]
    assert view["kept"] == max(1, -(-round(ratio * made["rows"] * 100) // 100))
    assert {row["row"] for row in seen if row["kept"]} == set(best)
    assert [(row["score"], row["rank"]) for row in sorted(seen, key=lambda row: row["row"])] == [
        (row["score"], row["rank"]) for row in own.values()
    ]
    assert all(row["kept"] for row in seen if "prompt" in row)
    assert all_rows(api, made["id"], order=order, ratio=ratio, kept=True) == [row for row in seen if row["kept"]]


def test_a_selection_that_ranks_nothing_has_no_other_views(api: Api, dataset: str) -> None:
    body = {"base_model": MODEL, "dataset": dataset, "data": {"scorer": "uniform"}}
    job = api.http.post("/selections", json=body).json()
    api.finish(job["id"])
    path = "/selections/" + api.http.get(f"/jobs/{job['id']}").json()["selection"]

    for part in ("", "/rows", "/rows/1", "/export"):
        answer = api.http.get(path + part, params={"ratio": 0.2})
        assert (answer.status_code, answer.json()["code"]) == (409, "selection.ranks_nothing")
    whole = api.http.get(path, params={"ratio": 1}).json()
    assert whole["kept"] == whole["rows"]


def test_a_cursor_of_one_order_is_none_of_the_other(api: Api, made: dict[str, Any]) -> None:
    for order, other in (("row", "score"), ("score", "row")):
        page = api.http.get(f"/selections/{made['id']}/rows", params={"order": order, "limit": 3}).json()
        answer = api.http.get(f"/selections/{made['id']}/rows", params={"order": other, "cursor": page["next_cursor"]})
        assert (answer.status_code, answer.json()["code"]) == (422, "request.cursor")


def test_a_row_that_was_left_out_says_why_and_has_no_figures(
    api: Api, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    left_out = RowReason(
        combine="guide",
        heads=(),
        stand_ins=0,
        stand_in=0.0,
        response=0.0,
        quality=None,
        guide=None,
        unscored=UNLIKE,
    )
    monkeypatch.setattr(selections, "reason_of", lambda *_: left_out)

    reason = api.http.get(f"/selections/{made['id']}/rows/1").json()

    assert (reason["formula"], reason["response"], reason["heads"], reason["drawn"]) == (UNLIKE, None, [], False)


def test_every_row_is_explained_by_figures_that_add_up(api: Api, made: dict[str, Any]) -> None:
    content = rows(ROWS).splitlines()

    for row in all_rows(api, made["id"], limit=100):
        reason = api.http.get(f"/selections/{made['id']}/rows/{row['row']}").json()
        assert {name: reason[name] for name in ("row", "line", "score", "rank", "kept")} == {
            name: row[name] for name in ("row", "line", "score", "rank", "kept")
        }
        assert reason["repeats"] == row.get("repeats")
        assert reason["formula"] == "score = response"
        assert sum(head["response"] for head in reason["heads"]) == reason["response"] == row["score"]
        assert len(reason["heads"]) == 4  # half of eight
        if row["kept"]:
            sent = json.loads(content[row["line"] - 1])
            assert (reason["prompt"], reason["answer"]) == (sent["question"], sent["answer"])
        neighbour = reason["nearest_dropped" if row["kept"] else "nearest_kept"]
        assert abs(neighbour["rank"] - row["rank"]) == min(
            abs(at["rank"] - row["rank"]) for at in all_rows(api, made["id"], limit=100) if at["kept"] != row["kept"]
        )
        assert (row["score"] >= reason["border"]) == row["kept"]
    last = max(row["row"] for row in all_rows(api, made["id"], limit=100))
    assert api.http.get(f"/selections/{made['id']}/rows/{last}").json()["repeats"] == 0  # so says the stub


def test_a_row_alone_or_all_rows_have_no_neighbours(api: Api, made: dict[str, Any]) -> None:
    everything = api.http.get(f"/selections/{made['id']}/rows/0", params={"ratio": 1.0}).json()
    best = api.http.get(f"/selections/{made['id']}/rows/0", params={"ratio": 0.001}).json()

    assert everything["nearest_dropped"] is None
    assert best["nearest_kept"] is None
    assert best["nearest_dropped"]["rank"] == 1


def test_a_row_that_is_not_there_is_404(api: Api, made: dict[str, Any]) -> None:
    answer = api.http.get(f"/selections/{made['id']}/rows/{made['rows']}")

    assert (answer.status_code, answer.json()["code"]) == (404, "selection.row_not_found")
    assert api.http.get(f"/selections/{made['id']}/rows/-1").status_code == 422


# --- the kept rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [None, 0.01, 0.5, 1.0])
def test_the_kept_rows_come_as_a_dataset(api: Api, made: dict[str, Any], ratio: float | None) -> None:
    query = {} if ratio is None else {"ratio": ratio}
    kept = [row["line"] for row in all_rows(api, made["id"], limit=100, **query) if row["kept"]]
    sent = [json.loads(line) for line in rows(ROWS).splitlines()]

    answer = api.http.get(f"/selections/{made['id']}/export", params=query)

    assert answer.headers["content-type"] == "application/x-ndjson"
    exported = [json.loads(line) for line in answer.text.splitlines()]
    assert exported == [{"prompt": sent[i - 1]["question"], "answer": sent[i - 1]["answer"]} for i in kept]
    assert api.upload(answer.content).status_code in (200, 201)


def test_kept_conversations_come_as_a_dataset_file_has_them() -> None:
    plain, chat = Row("q", "a", 3), Row("q", "a", 4, (Turn("system", "s"),))
    stored = [row_line(row).rstrip("\n").encode() for row in (plain, chat)]

    assert b"".join(_exported(iter(stored), {3, 4})) == b'{"prompt":"q","answer":"a"}\n' + conversation(chat)


def test_an_export_stands_in_the_audit_log(api: Api, made: dict[str, Any]) -> None:
    api.http.get(f"/selections/{made['id']}/export")

    newest = api.http.get(f"/audit?object={made['id']}").json()["data"][0]
    assert (newest["action"], newest["facts"]["rows"]) == ("selection.export", made["kept"])


# --- deleted -----------------------------------------------------------------------------------------------------------


def test_what_was_deleted_is_named_and_the_score_stays(api: Api) -> None:
    dataset = api.dataset(ROWS, start=900)
    job_id = api.http.post("/selections", json={**ASKED, "dataset": dataset}).json()["id"]
    api.finish(job_id)
    job = api.http.get(f"/jobs/{job_id}").json()
    api.http.delete(f"/head-maps/{job['head_map']}")
    api.http.delete(f"/datasets/{dataset}")

    reason = api.http.get(f"/selections/{job['selection']}/rows/0").json()
    export = api.http.get(f"/selections/{job['selection']}/export")

    assert (reason["not_known"], reason["formula"], reason["heads"]) == (["head_map.json"], None, [])
    assert (reason["score"], reason["kept"], reason["prompt"] is not None) == (0.0, True, True)
    assert (export.status_code, export.json()["code"]) == (404, "dataset.not_found")


def test_a_selection_that_a_job_needs_is_not_deleted(api: Api) -> None:
    dataset = api.dataset(ROWS, start=700)
    job_id = api.http.post("/selections", json={**ASKED, "dataset": dataset}).json()["id"]
    api.finish(job_id)
    job = api.http.get(f"/jobs/{job_id}").json()
    body = a_job(dataset=dataset, heads={"head_map": job["head_map"]}, data={"selection": job["selection"]})
    reader = api.post(body).json()["id"]

    refused = api.http.delete(f"/selections/{job['selection']}")
    api.http.post(f"/jobs/{reader}/cancel")
    receipt = api.http.delete(f"/selections/{job['selection']}")

    assert (refused.status_code, refused.json()["code"]) == (409, "selection.in_use")
    assert refused.json()["facts"]["by"] == [reader]
    assert (receipt.status_code, receipt.json()["what"]) == (200, "selection")
    assert api.http.get(f"/selections/{job['selection']}").status_code == 404
    assert api.http.get(f"/jobs/{job_id}").json()["selection"] is None
    assert api.post(body).json()["code"] == "selection.not_found"


def test_what_has_expired_is_named_too(api: Api) -> None:
    dataset = api.dataset(ROWS, start=1300)
    job_id = api.http.post("/selections", json={**ASKED, "dataset": dataset, "artifact_ttl": 60}).json()["id"]
    api.finish(job_id)
    selection = api.http.get(f"/jobs/{job_id}").json()["selection"]
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update artifacts set expires_at = now() where expires_at is not null")
        conn.exec_driver_sql("update objects set used_at = now() - interval '2 days'")
    collect(api.engine, api.blobs, kept_h=24)

    last = api.http.get(f"/selections/{selection}/rows/47").json()

    assert (last["not_known"], last["score"], last["prompt"]) == (["responses-00002.safetensors"], -23.5, None)
    assert api.http.get(f"/selections/{selection}/rows", params={"order": "score"}).status_code == 200
