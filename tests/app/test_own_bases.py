"""Laws of jobs whose base model the project has merged itself: named by its weights, kept while needed, else refused."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.core.garbage import collect
from app.core.quotas import IN_FLIGHT
from app.db.jobs import lock_job
from app.db.projects import lock_project
from app.settings import Settings
from p2d.model_info import digest_of, model_digest
from tests.app.conftest import Api, a_job, serving
from tests.app.test_artifact_lives import a_finished_job, files_of
from tests.rig import wait_for

Files = dict[str, dict[str, Any]]


def merged(api: Api, *, seed: int = 0, **fields: Any) -> tuple[str, Files]:
    """An export that has merged an adapter, and its files; another seed, another adapter."""
    trained = a_finished_job(api, training={"seed": seed})
    adapter = files_of(api, trained)["heads.safetensors"]["id"]
    answer = api.http.post(f"/artifacts/{adapter}/merge", json=fields)
    assert answer.status_code == 202, answer.text
    export = str(answer.json()["id"])
    api.finish(export)
    return export, files_of(api, export)


@pytest.fixture(scope="module")
def export(api: Api) -> tuple[str, Files]:
    return merged(api, formats=["merged", "peft"])


@pytest.fixture(scope="module")
def base(export: tuple[str, Files]) -> str:
    """The weights of a merged model."""
    return str(export[1]["model.safetensors"]["id"])


def bases(api: Api) -> list[Path]:
    """Merged models on the worker's machine."""
    folder = api.settings.work_dir / "bases"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def forget_what_is_unreferenced(api: Api) -> None:
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update objects set used_at = now() - interval '2 days'")
    collect(api.engine, api.blobs, kept_h=24)


def test_a_merged_model_is_the_base_of_a_later_job(api: Api, base: str, export: tuple[str, Files]) -> None:
    job_id = str(api.post(a_job(base_model=base, dataset=api.dataset())).json()["id"])

    api.finish(job_id)

    job = api.http.get(f"/jobs/{job_id}").json()
    names = ("config.json", "tokenizer.json", "model.safetensors")
    assert (job["status"], job["base_model"], job["error"]) == ("succeeded", base, None)
    assert job["model_digest"] == digest_of({name: export[1][name]["sha256"] for name in names})
    assert job["model_digest"] != api.http.get("/models/stub").json()["digest"]
    (brought,) = bases(api)
    assert (brought.name, model_digest(brought)) == (base, job["model_digest"])
    assert {path.name for path in brought.iterdir() if path.name != "p2d-model.json"} >= set(names)
    assert not [path for path in brought.iterdir() if path.name.startswith(("adapter", "accounting"))]
    assert api.http.get("/head-maps", params={"base_model": base}).json()["data"][0]["id"] == job["head_map"]
    assert base not in api.http.get("/models").text  # which all projects see


def test_an_adapter_of_a_merged_model_is_merged_into_it(api: Api, base: str) -> None:
    job_id = a_finished_job(api, base_model=base)
    again = api.http.post(f"/artifacts/{files_of(api, job_id)['heads.safetensors']['id']}/merge").json()["id"]
    api.finish(again)
    third = api.post(a_job(base_model=files_of(api, again)["model.safetensors"]["id"], dataset=api.dataset()))

    assert api.http.get(f"/jobs/{again}").json()["status"] == "succeeded"
    assert api.http.get(f"/jobs/{again}").json()["base_model"] == base
    assert third.status_code == 202, third.text
    assert third.json()["model_digest"] != api.http.get(f"/jobs/{job_id}").json()["model_digest"]
    api.http.post(f"/jobs/{third.json()['id']}/cancel")


def test_estimates_and_clones_take_it_and_a_revision_is_its_digest(api: Api, base: str) -> None:
    body = a_job(base_model=base, dataset=api.dataset())
    job = api.post(body).json()

    assert api.http.post("/estimates", json=body).status_code == 200
    assert api.http.post(f"/jobs/{job['id']}/clone").json()["model_digest"] == job["model_digest"]
    assert api.post({**body, "revision": job["model_digest"]}).status_code == 202
    other = api.post({**body, "revision": "0" * 64})
    assert (other.status_code, other.json()["errors"][0]["pointer"]) == (404, "/revision")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "adapter_model.safetensors", "accounting-merge.json"]
)
def test_another_file_of_the_export_is_no_base_model(api: Api, export: tuple[str, Files], name: str) -> None:
    answer = api.post(a_job(base_model=export[1][name]["id"], dataset=api.dataset()))

    assert (answer.status_code, answer.json()["code"]) == (409, "artifact.not_a_base_model")
    assert answer.json()["errors"][0]["pointer"] == "/base_model"


def test_an_adapter_alone_is_no_base_model(api: Api) -> None:
    adapter = files_of(api, a_finished_job(api))["heads.safetensors"]["id"]
    body = a_job(base_model=adapter, dataset="ds_nowhere")

    alone = api.post({**body, "dataset": api.dataset()})
    both = api.post(body)

    assert (alone.status_code, alone.json()["code"]) == (409, "artifact.not_a_base_model")
    assert "merge" in alone.json()["hint"].lower()
    assert {fault["pointer"] for fault in both.json()["errors"]} == {"/base_model", "/dataset"}


def test_a_model_that_is_not_there_is_refused(api: Api) -> None:
    for name, code in (("art_00000000000000000000000000", "artifact.not_found"), ("art_other", "model.not_found")):
        answer = api.post(a_job(base_model=name, dataset=api.dataset()))
        assert (answer.status_code, answer.json()["code"]) == (404, code)


def test_a_model_that_lacks_a_file_is_refused(api: Api) -> None:
    job_id, files = merged(api)
    base, body = files["model.safetensors"]["id"], a_job(dataset=api.dataset())
    assert api.http.delete(f"/artifacts/{files['tokenizer.json']['id']}").status_code == 200

    answer = api.post({**body, "base_model": base})

    assert (answer.status_code, answer.json()["code"]) == (404, "artifact.not_found")
    assert answer.json()["errors"][0]["pointer"] == "/base_model"
    assert f"{job_id}/tokenizer.json" in answer.json()["detail"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_of_which_a_file_has_expired_is_refused(api: Api, name: str) -> None:
    _, files = merged(api)
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update artifacts set expires_at = now() where id = %s", (files[name]["id"],))

    answer = api.post(a_job(base_model=files["model.safetensors"]["id"], dataset=api.dataset()))

    assert (answer.status_code, answer.json()["code"]) == (410, "artifact.expired")
    assert answer.json()["errors"][0]["pointer"] == "/base_model"


def test_what_an_unfinished_job_has_as_its_base_is_neither_deleted_nor_collected(api: Api) -> None:
    export, files = merged(api, seed=77, artifact_ttl=3600)
    base = files["model.safetensors"]["id"]
    job_id = str(api.post(a_job(base_model=base, dataset=api.dataset(), reuse="never")).json()["id"])
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update artifacts set expires_at = now() where job_id = %s", (export,))

    paths = (f"/artifacts/{base}", f"/artifacts/{files['config.json']['id']}", f"/jobs/{export}")
    refused = [api.http.delete(path) for path in paths]
    forget_what_is_unreferenced(api)
    api.finish(job_id)

    assert [(one.status_code, one.json()["facts"]["by"]) for one in refused] == [(409, [job_id])] * 3
    assert api.http.get(f"/jobs/{job_id}").json()["status"] == "succeeded"
    forget_what_is_unreferenced(api)
    assert not api.blobs.exists(files["model.safetensors"]["sha256"])
    assert api.http.delete(f"/jobs/{export}").status_code == 200
    assert api.http.get(f"/jobs/{job_id}").json()["base_model"] == base


def test_a_job_whose_base_is_gone_is_neither_retried_nor_cloned(api: Api) -> None:
    export, files = merged(api)
    base = files["model.safetensors"]["id"]
    job_id = str(api.post(a_job(base_model=base, dataset=api.dataset())).json()["id"])
    api.http.post(f"/jobs/{job_id}/cancel")
    assert api.http.post(f"/jobs/{job_id}/retry").status_code == 202
    api.http.post(f"/jobs/{job_id}/cancel")

    assert api.http.delete(f"/jobs/{export}").status_code == 200

    for move in ("retry", "clone"):
        answer = api.http.post(f"/jobs/{job_id}/{move}")
        assert (answer.status_code, answer.json()["code"]) == (404, "artifact.not_found")


def test_a_retry_waits_for_the_maker_of_its_base_before_it_holds_anybody_up(module_settings: Settings) -> None:
    near_its_quota = module_settings.model_copy(
        update={"quota_jobs": IN_FLIGHT}
    )  # so that all jobs are counted, each time
    with serving(near_its_quota) as api, ThreadPoolExecutor(1) as pool:
        export, files = merged(api, seed=91)
        base = files["model.safetensors"]["id"]
        job_id = str(api.post(a_job(base_model=base, dataset=api.dataset())).json()["id"])
        api.http.post(f"/jobs/{job_id}/cancel")

        with api.engine.begin() as conn:
            lock_job(conn, export)
            retried = pool.submit(api.http.post, f"/jobs/{job_id}/retry")
            wait_for(lambda: somebody_waits(api), "the retry to wait for the export")
            lock_project(conn)  # as whoever makes a job over the base
            lock_job(conn, job_id)  # as whoever deletes the export

        assert retried.result().status_code == 202
        api.http.post(f"/jobs/{job_id}/cancel")


def somebody_waits(api: Api) -> bool:
    """Whether a transaction waits for another one's lock."""
    locked = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
    with api.engine.connect() as conn:
        return bool(conn.exec_driver_sql(locked).scalar_one())


def test_a_base_that_was_changed_or_lost_on_the_worker_is_fetched_again(api: Api, base: str) -> None:
    first = a_finished_job(api, base_model=base, reuse="never")
    place = api.settings.work_dir / "bases" / base
    (place / "config.json").write_text("{}")

    second = a_finished_job(api, base_model=base, reuse="never")
    shutil.rmtree(place)
    third = a_finished_job(api, base_model=base, reuse="never")

    assert {api.http.get(f"/jobs/{one}").json()["status"] for one in (first, second, third)} == {"succeeded"}
    assert model_digest(place) == api.http.get(f"/jobs/{first}").json()["model_digest"]
