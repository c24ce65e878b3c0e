"""Laws of how long artifacts live: deleted or expired files are gone for good, and never while something needs them."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any

import pytest

from app.core.garbage import collect
from tests.app.conftest import Api, a_job

STAY = {"head_map.json", "selection.jsonl"}
"""Files that a head map or a selection keeps."""


def files_of(api: Api, job_id: str) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in api.http.get(f"/jobs/{job_id}/artifacts").json()["data"]}


def a_finished_job(api: Api, **fields: Any) -> str:
    job_id = api.job(**fields)
    api.finish(job_id)
    return job_id


def let_time_pass(api: Api, job_id: str) -> None:
    """As if every time to live of the job were over."""
    with api.engine.begin() as conn:
        conn.exec_driver_sql(
            "update artifacts set expires_at = now() where expires_at is not null and job_id = %s", (job_id,)
        )


@pytest.fixture
def short(api: Api) -> str:
    """A job that has ended and whose files stay an hour."""
    return a_finished_job(api, artifact_ttl=3600, reuse="never")


# --- time to live ------------------------------------------------------------------------------------------------------


def test_a_jobs_files_live_from_its_end_on(api: Api, short: str) -> None:
    job, files = api.http.get(f"/jobs/{short}").json(), files_of(api, short)

    assert job["artifact_ttl"] == 3600
    for name, file in files.items():
        if name in STAY:
            assert file["expires_at"] is None
        else:
            lives = datetime.fromisoformat(file["expires_at"]) - datetime.fromisoformat(job["finished_at"])
            assert lives.total_seconds() == 3600
        assert not file["expired"]


def test_a_running_jobs_files_have_no_end(api: Api) -> None:
    job_id = api.job(artifact_ttl=60)

    assert api.http.get(f"/jobs/{job_id}").json()["artifact_ttl"] == 60
    assert all(file["expires_at"] is None for file in files_of(api, job_id).values())
    clone = api.http.post(f"/jobs/{job_id}/clone", json={}).json()
    assert clone["artifact_ttl"] == 60


@pytest.mark.parametrize("ttl", [0, 59, -1, 1.5, "60", 10**12])
def test_a_time_to_live_is_a_minute_to_ten_years(api: Api, ttl: Any) -> None:
    answer = api.post(a_job(dataset=api.dataset(), artifact_ttl=ttl))

    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/artifact_ttl")


def test_an_expired_file_answers_410_and_is_still_described(api: Api, short: str) -> None:
    let_time_pass(api, short)

    file = files_of(api, short)["heads.safetensors"]
    content, head = (getattr(api.http, verb)(f"/artifacts/{file['id']}/content") for verb in ("get", "head"))

    assert (file["expired"], api.http.get(f"/artifacts/{file['id']}").json()) == (True, file)
    assert (content.status_code, content.json()["code"], head.status_code) == (410, "artifact.expired", 410)
    assert api.http.get(f"/jobs/{short}/report").status_code == 410
    assert api.http.patch(f"/artifacts/{file['id']}", json={"artifact_ttl": 60}).status_code == 410
    assert api.http.get(f"/artifacts/{files_of(api, short)['head_map.json']['id']}/content").status_code == 200


def test_the_sweep_removes_expired_bytes_and_no_others(api: Api) -> None:
    dataset = api.dataset(63, start=8000)  # the stub engine makes equal files of equal rows
    ours = api.post(a_job(dataset=dataset, artifact_ttl=60)).json()["id"]
    other = api.post(a_job(dataset=dataset, training={"seed": 7})).json()["id"]
    api.finish(ours, other)
    files, others = files_of(api, ours), files_of(api, other)
    let_time_pass(api, ours)

    with api.engine.begin() as conn:
        conn.exec_driver_sql("update objects set used_at = now() - interval '1 day'")
    collect(api.engine, api.blobs, kept_h=1)

    stored = api.stored()
    shared = {file["sha256"] for file in others.values()}
    assert {file["sha256"] for file in others.values()} <= stored
    assert {files[name]["sha256"] for name in STAY} <= stored
    assert files["rows.jsonl"]["sha256"] not in shared
    assert files["rows.jsonl"]["sha256"] not in stored


def test_expired_files_are_neither_taken_by_a_later_job_nor_counted(api: Api) -> None:
    dataset = api.dataset(66, start=4000)
    first = api.post(a_job(dataset=dataset, artifact_ttl=60)).json()["id"]
    api.finish(first)
    before = api.http.get("/usage").json()["stored_bytes"]
    let_time_pass(api, first)
    after = api.http.get("/usage").json()["stored_bytes"]

    second = api.post(a_job(dataset=dataset)).json()["id"]
    api.finish(second)

    assert before - after == sum(file["size_bytes"] for name, file in files_of(api, first).items() if name not in STAY)
    events = api.http.get(f"/jobs/{second}/events", params={"limit": 1000}).json()["data"]
    hits = [event["data"]["step"] for event in events if event["type"] == "cache.hit"]
    assert "respond" not in hits
    assert api.http.get(f"/jobs/{second}").json()["status"] == "succeeded"


def test_a_patch_changes_the_end_of_one_file(api: Api, short: str) -> None:
    file = files_of(api, short)["report.json"]

    kept = api.http.patch(f"/artifacts/{file['id']}", json={"artifact_ttl": None}).json()
    later = api.http.patch(f"/artifacts/{file['id']}", json={"artifact_ttl": 86400}).json()

    assert kept["expires_at"] is None
    assert datetime.fromisoformat(later["expires_at"]) > datetime.fromisoformat(file["expires_at"])
    assert api.http.patch(f"/artifacts/{file['id']}", json={}).json() == later
    wrong = api.http.patch(f"/artifacts/{file['id']}", json={"artifact_ttl": 5, "name": "x"}).json()
    assert {fault["pointer"] for fault in wrong["errors"]} == {"/artifact_ttl", "/name"}
    held = files_of(api, short)["head_map.json"]
    refused = api.http.patch(f"/artifacts/{held['id']}", json={"artifact_ttl": 60})
    assert (refused.status_code, refused.json()["code"]) == (409, "artifact.in_use")


def test_a_failed_job_is_retried_until_its_files_have_expired(api: Api, short: str) -> None:
    def as_if_it_had_failed() -> None:
        with api.engine.begin() as conn:
            conn.exec_driver_sql("update jobs set status = 'failed' where id = %s", (short,))
            conn.exec_driver_sql("update steps set status = 'failed' where job_id = %s and step = 'evaluate'", (short,))

    as_if_it_had_failed()
    let_time_pass(api, short)
    late = api.http.post(f"/jobs/{short}/retry")
    assert (late.status_code, late.json()["code"]) == (409, "job.results_gone")

    other = a_finished_job(api, artifact_ttl=3600)
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update jobs set status = 'failed' where id = %s", (other,))
    assert api.http.post(f"/jobs/{other}/retry").status_code == 202
    assert all(file["expires_at"] is None for file in files_of(api, other).values())


# --- deleted -----------------------------------------------------------------------------------------------------------


def test_a_deleted_file_leaves_a_receipt_and_its_job(api: Api) -> None:
    job_id = a_finished_job(api)
    file = files_of(api, job_id)["heads.safetensors"]
    content = api.http.get(f"/artifacts/{file['id']}/content").content

    receipt = api.http.delete(f"/artifacts/{file['id']}").json()

    assert (receipt["what"], receipt["sha256"]) == ("artifact", [hashlib.sha256(content).hexdigest()])
    assert "heads.safetensors" not in files_of(api, job_id)
    for answer in (api.http.get(f"/artifacts/{file['id']}"), api.http.get(f"/artifacts/{file['id']}/content")):
        assert (answer.status_code, answer.json()["code"]) == (404, "artifact.not_found")
    assert api.http.delete(f"/artifacts/{file['id']}").status_code == 404
    assert api.http.get(f"/jobs/{job_id}").json()["status"] == "succeeded"


def test_a_later_equal_job_makes_anew_what_was_deleted(api: Api) -> None:
    dataset = api.dataset(66, start=5000)
    first = api.post(a_job(dataset=dataset)).json()["id"]
    api.finish(first)
    api.http.delete(f"/artifacts/{files_of(api, first)['responses-00000.safetensors']['id']}")

    second = api.post(a_job(dataset=dataset)).json()["id"]
    api.finish(second)

    assert "responses-00000.safetensors" in files_of(api, second)
    assert api.http.get(f"/jobs/{second}").json()["status"] == "succeeded"


def test_what_something_needs_is_not_deleted(api: Api) -> None:
    job_id = a_finished_job(api)
    files = files_of(api, job_id)
    for name in STAY:
        answer = api.http.delete(f"/artifacts/{files[name]['id']}")
        assert (answer.status_code, answer.json()["code"]) == (409, "artifact.in_use")
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update jobs set status = 'running', finished_at = null where id = %s", (job_id,))
    answer = api.http.delete(f"/artifacts/{files['rows.jsonl']['id']}")
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update jobs set status = 'succeeded', finished_at = now() where id = %s", (job_id,))

    assert (answer.status_code, answer.json()["facts"]["by"]) == (409, [job_id])
    assert api.http.delete(f"/artifacts/{files['rows.jsonl']['id']}").status_code == 200
