"""Laws of exports: a job of its own kind makes them, once, from files that stay as long as it needs them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from app.core.garbage import collect
from tests.app.conftest import MODEL, Api
from tests.app.test_artifact_lives import a_finished_job, files_of, let_time_pass


@pytest.fixture(scope="module")
def trained(api: Api) -> str:
    return a_finished_job(api)


def adapter_of(api: Api, job_id: str) -> str:
    return str(files_of(api, job_id)["heads.safetensors"]["id"])


def merge(api: Api, artifact_id: str, body: dict[str, Any] | None = None, **headers: str) -> Any:
    return api.http.post(f"/artifacts/{artifact_id}/merge", json=body if body is not None else {}, headers=headers)


def content(api: Api, job_id: str, name: str) -> bytes:
    return bytes(api.http.get(f"/artifacts/{files_of(api, job_id)[name]['id']}/content").content)


def test_an_adapter_becomes_a_model_and_a_lora(api: Api, trained: str) -> None:
    answer = merge(api, adapter_of(api, trained), {"formats": ["peft", "merged"], "name": "both", "priority": 3})
    assert answer.status_code == 202, answer.text
    job_id = answer.json()["id"]
    assert answer.headers["location"] == f"/jobs/{job_id}"

    api.finish(job_id)

    job = api.http.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["kind"], job["name"], job["adapter_id"]) == (
        "succeeded",
        "export",
        "both",
        adapter_of(api, trained),
    )
    assert (job["base_model"], job["progress"], job["error"]) == (MODEL, 1.0, None)
    weights = content(api, trained, "heads.safetensors")
    assert hashlib.sha256(weights).hexdigest().encode() in content(api, job_id, "model.safetensors")
    assert content(api, job_id, "adapter_model.safetensors") == weights
    assert json.loads(content(api, job_id, "config.json"))["model_type"] == "llama"
    assert {"tokenizer.json", "adapter_config.json"} <= set(files_of(api, job_id))
    steps = {attempt["step"] for attempt in api.http.get(f"/jobs/{job_id}/attempts").json()["data"]}
    assert steps == {"merge", "export_peft"}


def test_a_full_model_is_what_is_made_by_default(api: Api, trained: str) -> None:
    job_id = api.http.post(f"/artifacts/{adapter_of(api, trained)}/merge").json()["id"]

    api.finish(job_id)

    files = set(files_of(api, job_id))
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= files
    assert "adapter_config.json" not in files
    assert job_id in [job["id"] for job in api.http.get("/jobs", params={"kind": "export"}).json()["data"]]


def test_the_same_key_is_the_same_export(api: Api, trained: str) -> None:
    adapter = adapter_of(api, trained)
    once, again = (merge(api, adapter, {}, **{"Idempotency-Key": "merge-1"}) for _ in range(2))

    assert once.json() == again.json()
    assert merge(api, adapter, {"formats": ["peft"]}, **{"Idempotency-Key": "merge-1"}).status_code == 422
    api.http.post(f"/jobs/{once.json()['id']}/cancel")


@pytest.mark.parametrize(
    "body", [{"formats": []}, {"formats": ["gguf"]}, {"formats": ["merged", "peft", "merged"]}, {"stranger": 1}]
)
def test_a_form_that_is_not_known_is_refused(api: Api, trained: str, body: dict[str, Any]) -> None:
    answer = merge(api, adapter_of(api, trained), body)

    assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid")


def test_what_is_no_adapter_is_refused(api: Api, trained: str) -> None:
    answer = merge(api, files_of(api, trained)["head_map.json"]["id"])

    assert (answer.status_code, answer.json()["code"]) == (409, "artifact.not_an_adapter")


def test_an_adapter_of_another_base_is_refused(api: Api) -> None:
    job_id = a_finished_job(api)
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update jobs set model_digest = 'x' where id = %s", (job_id,))

    answer = merge(api, adapter_of(api, job_id))

    assert (answer.status_code, answer.json()["code"]) == (422, "adapter.base_mismatch")


def test_an_export_keeps_what_it_reads(api: Api) -> None:
    job_id = a_finished_job(api, artifact_ttl=60, reuse="never", training={"seed": 11})
    adapter = adapter_of(api, job_id)
    export = merge(api, adapter).json()["id"]
    let_time_pass(api, job_id)

    refused = [api.http.delete(path) for path in (f"/artifacts/{adapter}", f"/jobs/{job_id}")]
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update objects set used_at = now() - interval '2 days'")
    collect(api.engine, api.blobs, kept_h=24)
    api.finish(export)

    assert [(one.status_code, one.json()["facts"]["by"]) for one in refused] == [(409, [export])] * 2
    assert api.http.get(f"/jobs/{export}").json()["status"] == "succeeded"
    assert merge(api, adapter).json()["code"] == "artifact.expired"
    assert api.http.delete(f"/jobs/{job_id}").status_code == 200
    gone = api.http.get(f"/jobs/{export}").json()
    assert (gone["status"], gone["adapter_id"]) == ("succeeded", None)


def test_an_export_is_cancelled_and_retried_as_any_job(api: Api) -> None:
    job_id = a_finished_job(api)
    export = merge(api, adapter_of(api, job_id)).json()["id"]
    api.http.post(f"/jobs/{export}/cancel")
    assert api.http.get(f"/jobs/{export}").json()["status"] == "cancelled"

    assert api.http.post(f"/jobs/{export}/retry").status_code == 202
    api.finish(export)

    assert api.http.get(f"/jobs/{export}").json()["status"] == "succeeded"
    assert api.http.post(f"/jobs/{export}/clone", json={}).status_code == 422
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update jobs set status = 'failed' where id = %s", (export,))
    api.http.delete(f"/artifacts/{adapter_of(api, job_id)}")
    late = api.http.post(f"/jobs/{export}/retry")
    assert (late.status_code, late.json()["code"]) == (404, "artifact.not_found")


@pytest.mark.parametrize("name", ["heads.safetensors", "manifest.json"])
def test_an_export_whose_adapter_or_its_manifest_has_expired_is_not_retried(api: Api, name: str) -> None:
    files = files_of(api, a_finished_job(api))
    export = merge(api, files["heads.safetensors"]["id"]).json()["id"]
    api.http.post(f"/jobs/{export}/cancel")
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update artifacts set expires_at = now() where id = %s", (files[name]["id"],))

    late = api.http.post(f"/jobs/{export}/retry")

    assert (late.status_code, late.json()["code"]) == (410, "artifact.expired")
    assert api.http.get(f"/jobs/{export}").json()["status"] == "cancelled"


def test_an_export_whose_adapter_lost_its_manifest_is_not_retried(api: Api) -> None:
    files = files_of(api, a_finished_job(api))
    export = merge(api, files["heads.safetensors"]["id"]).json()["id"]
    api.http.post(f"/jobs/{export}/cancel")
    api.http.delete(f"/artifacts/{files['manifest.json']['id']}")

    late = api.http.post(f"/jobs/{export}/retry")

    assert (late.status_code, late.json()["code"]) == (404, "artifact.not_found")
