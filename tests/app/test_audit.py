"""Laws of the audit log: what was done is in it, with who and when; it only grows; and a deletion answers with a receipt."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from app.db.engine import for_project
from app.db.projects import DEFAULT_PROJECT
from tests.app.conftest import Api, a_job


def entries(api: Api, object_id: str | None = None) -> list[dict[str, Any]]:
    """All entries, newest first, page by page."""
    found: list[dict[str, Any]] = []
    page: dict[str, Any] = {"next_cursor": None, "has_more": True}
    while page["has_more"]:
        query = {"limit": "3", **({"cursor": page["next_cursor"]} if page["next_cursor"] else {})}
        page = api.http.get("/audit", params=query | ({"object": object_id} if object_id else {})).json()
        found += page["data"]
    return found


def deeds(api: Api, object_id: str) -> list[str]:
    """What was done to a thing, oldest first."""
    return [entry["action"] for entry in reversed(entries(api, object_id))]


def test_the_story_of_a_job_is_told_to_its_end(api: Api) -> None:
    dataset_id = api.dataset()
    asked = {"X-Request-Id": "the-first"}
    job_id = api.http.post("/jobs", json=a_job(dataset=dataset_id), headers=asked).json()["id"]
    for move in ("pause", "resume"):
        assert api.http.post(f"/jobs/{job_id}/{move}").status_code == 202
    assert api.http.patch(f"/jobs/{job_id}", json={"name": "mine", "priority": 2}).status_code == 200
    api.finish(job_id)
    artifacts = {one["name"]: one for one in api.http.get(f"/jobs/{job_id}/artifacts").json()["data"]}
    heads = artifacts["heads.safetensors"]
    content = f"/artifacts/{heads['id']}/content"

    api.http.head(content)
    whole = api.http.get(content)
    api.http.get(content, headers={"If-None-Match": whole.headers["etag"]})
    api.http.get(content, headers={"Range": "bytes=0-1"})
    receipt = api.http.delete(f"/jobs/{job_id}")

    assert deeds(api, job_id) == ["job.create", "job.pause", "job.resume", "job.update", "job.delete"]
    assert entries(api, job_id)[1]["facts"] == {"fields": ["name", "priority"]}
    first, last = entries(api, job_id)[-1], entries(api, job_id)[0]
    assert (first["actor"], first["request_id"]) == ("loopback", "the-first")
    assert first["facts"] == {"kind": "adapt", "dataset_id": dataset_id}
    # What was sent is told; what the client had already, or only asked about, is not.
    part, all_of_it = entries(api, heads["id"])
    assert all_of_it["facts"] == {"job_id": job_id, "name": "heads.safetensors", "sha256": heads["sha256"]}
    assert part["facts"]["range"] == whole_range(heads["size_bytes"])
    body = receipt.json()
    assert receipt.status_code == 200
    assert (body["id"], body["what"], body["audit_id"]) == (job_id, "job", last["id"])
    assert body["deleted_at"] == last["created_at"]
    assert body["sha256"] == last["facts"]["sha256"] == sorted({one["sha256"] for one in artifacts.values()})


def whole_range(size: int) -> str:
    return f"bytes 0-1/{size}"


def test_a_dataset_is_made_once_and_its_deletion_has_a_receipt(api: Api) -> None:
    dataset_id = api.dataset(70)
    assert api.dataset(70) == dataset_id
    (made,) = entries(api, dataset_id)
    assert made["action"] == "dataset.create"
    assert made["facts"]["sha256"] in api.stored()

    body = api.http.delete(f"/datasets/{dataset_id}").json()

    assert (body["what"], body["sha256"]) == ("dataset", [made["facts"]["sha256"]])
    assert deeds(api, dataset_id) == ["dataset.create", "dataset.delete"]
    assert api.http.delete(f"/datasets/{dataset_id}").status_code == 404
    assert len(entries(api, dataset_id)) == 2


def test_what_is_refused_or_replayed_leaves_no_entry(api: Api) -> None:
    dataset_id = api.dataset()
    job_id = api.post(a_job(dataset=dataset_id), **{"Idempotency-Key": "once"}).json()["id"]
    before = entries(api)

    assert api.post(a_job(dataset=dataset_id), **{"Idempotency-Key": "once"}).json()["id"] == job_id
    assert api.http.delete(f"/jobs/{job_id}").status_code == 409
    assert api.http.delete(f"/datasets/{dataset_id}").status_code == 409
    assert api.post(a_job(dataset="ds_none")).status_code == 404

    assert entries(api) == before


def test_an_upload_in_parts_is_a_dataset_that_was_made(api: Api) -> None:
    content = b'{"question": "1?", "answer": "1"}\n' * 20
    upload = api.http.post("/uploads", json={"size_bytes": len(content)}).json()
    for number in range(upload["part_count"]):
        part = content[number * upload["part_bytes"] :][: upload["part_bytes"]]
        api.http.put(f"/uploads/{upload['id']}/parts/{number + 1}", content=part)
    dataset_id = api.http.post(f"/uploads/{upload['id']}/complete").json()["id"]

    assert deeds(api, dataset_id) == ["dataset.create"]


@pytest.mark.parametrize("statement", ["update audit set actor = 'x'", "delete from audit", "truncate audit"])
def test_the_log_only_grows(api: Api, statement: str) -> None:
    api.dataset()
    before = entries(api)
    assert before

    with pytest.raises(DBAPIError, match="only grows"), api.engine.begin() as conn:
        conn.exec_driver_sql(statement)
    with pytest.raises(DBAPIError, match="permission denied"), for_project(api.engine, DEFAULT_PROJECT).begin() as conn:
        conn.exec_driver_sql(statement)

    assert entries(api) == before
