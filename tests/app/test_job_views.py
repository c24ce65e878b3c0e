"""Laws of reading one job: conditional reads and changes, its frozen configuration, its attempts."""

from __future__ import annotations

import platform

import httpx
import pytest

import p2d
from tests.app.conftest import Api, a_job


def patch(api: Api, job_id: str, body: object, **headers: str) -> httpx.Response:
    """PATCH /jobs/{id}."""
    return api.http.patch(
        f"/jobs/{job_id}", json=body, headers={name.replace("_", "-"): v for name, v in headers.items()}
    )


def test_a_job_that_the_client_has_already_is_not_sent_again(api: Api) -> None:
    job_id = api.job()
    first = api.http.get(f"/jobs/{job_id}")

    again = api.http.get(f"/jobs/{job_id}", headers={"If-None-Match": first.headers["ETag"]})
    weak = api.http.get(f"/jobs/{job_id}", headers={"If-None-Match": f'"x", W/{first.headers["ETag"]}'})
    api.http.post(f"/jobs/{job_id}/pause")
    changed = api.http.get(f"/jobs/{job_id}", headers={"If-None-Match": first.headers["ETag"]})

    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", first.headers["ETag"])
    assert weak.status_code == 304
    assert (changed.status_code, changed.json()["status"]) == (200, "paused")
    assert changed.headers["ETag"] != first.headers["ETag"]


def test_a_priority_is_shown_changed_and_copied_and_has_bounds(api: Api) -> None:
    job_id = api.job(priority=3)
    assert api.http.get(f"/jobs/{job_id}").json()["priority"] == 3
    assert api.http.post(f"/jobs/{job_id}/clone").json()["priority"] == 3

    assert patch(api, job_id, {"name": "x"}).json()["priority"] == 3
    assert patch(api, job_id, {"priority": -10}).json()["priority"] == -10
    assert patch(api, job_id, {"priority": None}).json()["priority"] == 0
    for wrong in (11, -11, 1.5, "high"):
        refused = patch(api, job_id, {"priority": wrong})
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (422, "/priority")
    assert api.post(a_job(dataset=api.dataset(), priority=11)).status_code == 422


def test_name_and_metadata_are_changed_by_merge_patch(api: Api) -> None:
    job_id = api.job(name="old", metadata={"team": "blue", "run": "1"})

    answer = patch(api, job_id, {"name": "new", "metadata": {"run": None, "note": "x"}})

    assert answer.status_code == 200, answer.text
    assert (answer.json()["name"], answer.json()["metadata"]) == ("new", {"team": "blue", "note": "x"})
    read = api.http.get(f"/jobs/{job_id}")
    assert (read.json(), read.headers["ETag"]) == (answer.json(), answer.headers["ETag"])
    assert patch(api, job_id, {}).json() == answer.json()
    emptied = patch(api, job_id, {"name": None, "metadata": None}).json()
    assert (emptied["name"], emptied["metadata"]) == ("", {})


def test_a_change_of_a_job_that_is_not_as_it_was_read_is_refused(api: Api) -> None:
    job_id = api.job(name="old")
    seen = api.http.get(f"/jobs/{job_id}").headers["ETag"]

    assert patch(api, job_id, {"name": "first"}, If_Match=seen).status_code == 200
    refused = patch(api, job_id, {"name": "second"}, If_Match=seen)

    assert (refused.status_code, refused.json()["code"]) == (412, "request.precondition_failed")
    assert refused.json()["facts"]["etag"] == api.http.get(f"/jobs/{job_id}").headers["ETag"]
    assert patch(api, job_id, {"name": "third"}, If_Match="*").json()["name"] == "third"


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"status": "paused"}, "/status"),
        ({"name": 5}, "/name"),
        ({"name": "x" * 201}, "/name"),
        ({"metadata": {"a": 1}}, "/metadata/a"),
        ({"metadata": {f"key {n}": "x" for n in range(17)}}, "/metadata"),
    ],
)
def test_a_change_that_is_none_is_refused_with_its_place(api: Api, body: dict[str, object], pointer: str) -> None:
    job_id = api.job(name="old")

    answer = patch(api, job_id, body)

    assert answer.status_code == 422, answer.text
    assert [fault["pointer"] for fault in answer.json()["errors"]] == [pointer]
    assert api.http.get(f"/jobs/{job_id}").json()["name"] == "old"


def test_a_change_of_another_type_or_of_no_job_is_refused(api: Api) -> None:
    job_id = api.job()
    url = f"/jobs/{job_id}"
    assert api.http.patch(url, content=b"name=x", headers={"Content-Type": "text/plain"}).status_code == 415
    assert api.http.patch(url, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert api.http.patch(url).status_code == 400
    assert api.http.patch(url, content=b" " * 60_000).status_code == 413
    assert patch(api, "job_x", {}).status_code == 404


def test_the_configuration_says_all_that_the_job_is_computed_from(api: Api) -> None:
    job_id = api.job(training={"seed": 7, "epochs": 2})
    before = api.http.get(f"/jobs/{job_id}/config").json()
    api.finish(job_id)

    answer = api.http.get(f"/jobs/{job_id}/config")

    config, job = answer.json(), api.http.get(f"/jobs/{job_id}").json()
    assert (config["config"], config["seed"]) == (before["config"], 7)
    assert config["config"]["heads"]["scorer"] == "auto"
    assert config["resolved"]["heads"]["scorer"] == "uniform"
    assert "/heads/scorer" in config["reasons"]
    assert (config["model_digest"], config["dataset_id"]) == (job["model_digest"], job["dataset_id"])
    assert config["versions"]["p2d"] == p2d.__version__
    assert config["versions"]["python"] == platform.python_version()
    assert "torch" in config["versions"]
    etag = answer.headers["ETag"]
    assert api.http.get(f"/jobs/{job_id}/config", headers={"If-None-Match": etag}).status_code == 304


def test_every_attempt_is_listed_with_how_it_ended(api: Api) -> None:
    job_id = api.job()
    assert api.http.get(f"/jobs/{job_id}/attempts").json()["data"] == []
    api.finish(job_id)

    seen, cursor = list[dict[str, object]](), None
    while True:
        page = api.http.get(
            f"/jobs/{job_id}/attempts", params={"limit": 4} | ({"cursor": cursor} if cursor else {})
        ).json()
        seen += page["data"]
        cursor = page["next_cursor"]
        if cursor is None:
            break

    assert [(one["step"], one["shard"]) for one in seen] == [
        ("validate", 0), ("heads", 0), ("respond", 0), ("respond", 1), ("respond", 2),
        ("select", 0), ("train", 0), ("evaluate", 0), ("package", 0),
    ]  # fmt: skip
    assert {(one["attempt"], one["outcome"]) for one in seen} == {(1, "done")}
    assert all(one["seconds"] is not None and one["worker"] for one in seen)


def test_an_attempt_that_failed_shows_its_error_as_a_problem(api: Api) -> None:
    job_id = api.failed_job()

    (attempt,) = api.http.get(f"/jobs/{job_id}/attempts").json()["data"]

    assert attempt["outcome"] == "failed"
    assert attempt["error"]["code"] == api.http.get(f"/jobs/{job_id}").json()["error"]["code"]
    assert attempt["error"]["status"] >= 400


def test_a_job_is_deleted_only_as_it_was_read_where_that_is_asked(api: Api) -> None:
    job_id = api.job()
    api.http.post(f"/jobs/{job_id}/cancel")
    seen = api.http.get(f"/jobs/{job_id}").headers["ETag"]
    api.http.patch(f"/jobs/{job_id}", json={"name": "mine"})

    refused = api.http.delete(f"/jobs/{job_id}", headers={"If-Match": seen})

    assert (refused.status_code, refused.json()["code"]) == (412, "request.precondition_failed")
    assert api.http.delete(f"/jobs/{job_id}", headers={"If-Match": refused.json()["facts"]["etag"]}).status_code == 200
    assert api.http.get(f"/jobs/{job_id}").status_code == 404


def test_a_job_that_has_ended_is_deleted_with_all_that_it_made(api: Api) -> None:
    job_id = api.job()
    assert api.http.delete(f"/jobs/{job_id}").json()["facts"]["allowed"] == ["pause", "cancel"]
    api.finish(job_id)
    job = api.http.get(f"/jobs/{job_id}").json()
    artifact = api.http.get(f"/jobs/{job_id}/artifacts").json()["data"][0]["id"]

    assert api.http.delete(f"/jobs/{job_id}").status_code == 200

    for path in (
        f"/jobs/{job_id}",
        f"/jobs/{job_id}/events",
        f"/artifacts/{artifact}",
        f"/head-maps/{job['head_map']}",
    ):
        assert api.http.get(path).status_code == 404
    assert api.http.get(f"/datasets/{job['dataset_id']}").status_code == 200
    assert api.http.delete(f"/jobs/{job_id}").status_code == 404
    with api.engine.connect() as conn:
        for table in ("steps", "events", "attempts", "selections"):
            assert conn.exec_driver_sql(f"select count(*) from {table} where job_id = '{job_id}'").scalar_one() == 0


def test_a_job_whose_head_map_an_unfinished_job_reads_is_not_deleted(api: Api) -> None:
    job_id = api.job()
    api.finish(job_id)
    job = api.http.get(f"/jobs/{job_id}").json()
    reader = api.post(a_job(dataset=job["dataset_id"], heads={"head_map": job["head_map"], "proxy_rows": 8})).json()[
        "id"
    ]

    refused = api.http.delete(f"/jobs/{job_id}")

    assert (refused.status_code, refused.json()["code"]) == (409, "job.in_use")
    assert refused.json()["facts"]["by"] == [reader]
    api.http.post(f"/jobs/{reader}/cancel")
    assert api.http.delete(f"/jobs/{job_id}").status_code == 200
    gone = api.http.post(f"/jobs/{reader}/retry")
    assert (gone.status_code, gone.json()["code"]) == (404, "head_map.not_found")
