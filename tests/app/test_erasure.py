"""Laws of deleting a dataset: what jobs have made of its rows is named, and gone with it where that is asked."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.api import jobs
from app.core.garbage import clear
from app.db.datasets import Dataset, delete_dataset, lock_dataset
from app.db.tables import metadata
from tests.app.conftest import Api, a_job, rows
from tests.rig import wait_for

CANARY = "canary in the coal mine"


def content(count: int) -> bytes:
    """A dataset whose every row holds a text that stands nowhere else."""
    lines = [json.dumps({"question": f"{CANARY} {n}?", "answer": f"{CANARY} {n}!"}) for n in range(count)]
    return "\n".join(lines).encode()


def traces(api: Api) -> list[str]:
    """Where the text stands: objects of the store, tables of the ledger, files on the disk."""
    roots = [Path(api.settings.url("store_url").removeprefix("file://")), api.settings.work_dir]
    files = [path for root in roots for path in root.rglob("*") if path.is_file()]
    found = [path.name for path in files if CANARY.encode() in path.read_bytes()]
    with api.engine.connect() as conn:
        for table in metadata.sorted_tables:
            query = f"select count(*) from {table.name} t where strpos(to_jsonb(t)::text, '{CANARY}') > 0"
            found += [table.name] if conn.exec_driver_sql(query).scalar_one() else []
    return found


def sweep(api: Api) -> None:
    """What the workers' sweeps have removed a day later."""
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update objects set used_at = used_at - interval '2 days'")
        conn.exec_driver_sql("update jobs set finished_at = finished_at - interval '8 days'")
    clear(api.engine, api.blobs, api.settings)


def test_a_deleted_dataset_names_what_jobs_made_of_it_and_takes_that_along_where_it_is_asked(api: Api) -> None:
    first = api.upload(content(60)).json()["id"]
    other = api.dataset(61)
    trained = api.post(a_job(dataset=first)).json()["id"]
    judged = api.post(a_job(dataset=other, validation_dataset=first)).json()["id"]
    for query in ("", "?derived=true"):
        refused = api.http.delete(f"/datasets/{first}{query}").json()
        assert (refused["code"], refused["facts"]["by"]) == ("dataset.in_use", [trained, judged])
    api.finish(trained, judged)
    files = {job: api.http.get(f"/jobs/{job}/artifacts").json()["data"] for job in (trained, judged)}

    derived = api.http.delete(f"/datasets/{first}").json()["derived"]

    assert (derived["deleted"], derived["jobs"]) == (False, 2)
    assert {job["job_id"]: set(job["artifact_ids"]) for job in derived["listed"]} == {
        job: {file["id"] for file in made} for job, made in files.items()
    }
    assert derived["size_bytes"] == sum(file["size_bytes"] for made in files.values() for file in made)
    assert derived["artifacts"] == sum(map(len, files.values()))
    sweep(api)
    assert traces(api), "the copies of jobs stay, as the receipt says"

    again = api.upload(content(60)).json()["id"]
    assert again != first
    whole = api.http.delete(f"/datasets/{again}?derived=true").json()

    assert whole["derived"]["deleted"] is True
    assert [job["job_id"] for job in whole["derived"]["listed"]] == [trained, judged]
    assert {api.http.get(f"/jobs/{job}").status_code for job in (trained, judged)} == {404}
    for job in whole["derived"]["listed"]:
        (entry,) = of(api, job["job_id"], "job.delete")
        assert entry["id"] == job["audit_id"]
    (entry,) = of(api, again, "dataset.delete")
    assert entry["facts"]["derived"] == {
        **{name: whole["derived"][name] for name in ("deleted", "jobs", "artifacts", "size_bytes")},
        "job_ids": [trained, judged],
    }
    sweep(api)
    assert traces(api) == []
    assert api.http.get(f"/datasets/{other}").status_code == 200


def of(api: Api, object_id: str, action: str) -> list[dict[str, Any]]:
    """Entries of the audit log about a deed."""
    entries = api.http.get("/audit", params={"object": object_id}).json()["data"]
    return [entry for entry in entries if entry["action"] == action]


def test_nothing_is_deleted_where_another_job_still_needs_what_one_made(api: Api) -> None:
    dataset, other = api.dataset(62), api.dataset(63)
    maker = api.post(a_job(dataset=dataset, kind="identify_heads")).json()["id"]
    api.finish(maker)
    head_map = api.http.get(f"/jobs/{maker}").json()["head_map"]
    reader = api.post(a_job(dataset=other, heads={"head_map": head_map})).json()["id"]

    refused = api.http.delete(f"/datasets/{dataset}?derived=true")

    assert (refused.status_code, refused.json()["facts"]["by"]) == (409, [reader])
    assert api.http.get(f"/datasets/{dataset}").status_code == 200
    assert api.http.get(f"/jobs/{maker}").status_code == 200
    assert api.http.post(f"/jobs/{reader}/cancel").is_success
    assert api.http.delete(f"/datasets/{dataset}?derived=true").json()["derived"]["jobs"] == 1


def someone_waits(api: Api) -> bool:
    """Whether a transaction waits for a lock of another."""
    with api.engine.connect() as conn:
        waiting = "wait_event_type = 'Lock' and datname = current_database()"
        return bool(conn.exec_driver_sql(f"select count(*) from pg_stat_activity where {waiting}").scalar_one())


def test_a_dataset_is_not_deleted_under_a_job_that_comes_with_the_same_file(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, record = api.dataset(33, start=5000), jobs._record
    with ThreadPoolExecutor(1) as pool:
        deleting: list[Future[httpx.Response]] = []

        def recorded(*args: Any) -> Dataset:
            found = record(*args)
            deleting.append(pool.submit(api.http.delete, f"/datasets/{found.id}"))
            wait_for(lambda: deleting[0].done() or someone_waits(api), "the request to delete")
            return found

        monkeypatch.setattr(jobs, "_record", recorded)
        made = api.send(a_job(), rows(33, start=5000))
        refused = deleting[0].result()

    assert (made.status_code, made.json()["dataset_id"]) == (202, dataset)
    assert (refused.status_code, refused.json()["code"]) == (409, "dataset.in_use")


def test_a_file_whose_dataset_is_just_being_deleted_becomes_a_new_one(api: Api) -> None:
    dataset = api.dataset(34, start=5000)
    with ThreadPoolExecutor(1) as pool, api.engine.begin() as conn:
        assert lock_dataset(conn, dataset) is not None
        sending = pool.submit(api.upload, rows(34, start=5000))
        wait_for(lambda: sending.done() or someone_waits(api), "the upload")
        delete_dataset(conn, dataset)
        conn.commit()
        answer = sending.result()

    assert (answer.status_code, answer.json()["id"] != dataset) == (201, True)
