"""Laws of head maps over HTTP: made alone, taken in from elsewhere only where they fit, listed, compared, deleted."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import numpy as np
import pytest

from app.core.garbage import collect
from benchmarks.service import write_stub_model
from tests.app.conftest import MODEL, Api, a_job

HEADS = {"base_model": MODEL, "heads": {"proxy_rows": 8}}


@pytest.fixture(scope="module")
def dataset(api: Api) -> str:
    return api.dataset()


@pytest.fixture(scope="module")
def made(api: Api, dataset: str) -> dict[str, Any]:
    """A head map that was made alone."""
    answer = api.http.post("/head-maps", json={**HEADS, "dataset": dataset})
    assert answer.status_code == 202, answer.text
    api.finish(answer.json()["id"])
    job = api.http.get(answer.headers["location"]).json()
    return dict(api.http.get(f"/head-maps/{job['head_map']}").json())


def file_of(made: dict[str, Any], **changed: Any) -> bytes:
    """Its head_map.json, changed."""
    return json.dumps({**made["map"], **changed}).encode()


def bring(api: Api, content: bytes, **headers: str) -> Any:
    """POST /head-maps with a file."""
    return api.http.post("/head-maps", files={"head_map": ("head_map.json", content)}, headers=headers)


# --- alone -----------------------------------------------------------------------------------------------------------


def test_a_head_map_alone_is_a_job_of_its_own_kind(api: Api, made: dict[str, Any], dataset: str) -> None:
    job = api.http.get(f"/jobs/{made['job_id']}").json()

    assert (job["kind"], job["status"], job["head_map"], job["selection"]) == (
        "identify_heads",
        "succeeded",
        made["id"],
        None,
    )
    assert (made["dataset_id"], made["base_model"], made["scorer"]) == (dataset, MODEL, "attribution")
    assert made["artifact_id"] is not None


def test_it_is_made_of_a_file_that_is_sent_along(api: Api) -> None:
    lines = "\n".join(json.dumps({"question": f"{i}?", "answer": str(i)}) for i in range(70)).encode()
    files: dict[str, Any] = {
        "dataset": ("d.jsonl", lines),
        "job": (None, json.dumps({**HEADS, "name": "mine"}), "application/json"),
    }

    answer = api.http.post("/head-maps", files=files)

    assert (answer.status_code, answer.json()["name"], answer.json()["kind"]) == (202, "mine", "identify_heads")


@pytest.mark.parametrize("later", [{"kind": "adapt"}, {"data": {}}, {"controls": []}, {"heads": {"ratio": 0.5}}])
def test_what_only_later_stages_need_is_refused(api: Api, dataset: str, later: dict[str, Any]) -> None:
    answer = api.http.post("/head-maps", json={**HEADS, "dataset": dataset, **later})

    assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid")
    assert answer.json()["errors"][0]["pointer"].startswith("/" + next(iter(later)))


def test_the_same_key_is_the_same_job(api: Api, dataset: str) -> None:
    once, again = (
        api.http.post("/head-maps", json={**HEADS, "dataset": dataset}, headers={"Idempotency-Key": "hm-1"})
        for _ in range(2)
    )
    other = api.http.post(
        "/head-maps", json={**HEADS, "dataset": dataset, "name": "x"}, headers={"Idempotency-Key": "hm-1"}
    )

    assert once.json() == again.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert (other.status_code, other.json()["code"]) == (422, "idempotency.mismatch")


# --- from elsewhere ----------------------------------------------------------------------------------------------------


def test_a_downloaded_head_map_comes_back_and_serves_a_job(api: Api, made: dict[str, Any], dataset: str) -> None:
    raw = api.http.get(f"/head-maps/{made['id']}.json").content

    answer = bring(api, raw)

    assert answer.status_code == 201, answer.text
    view = answer.json()
    assert answer.headers["location"] == f"/head-maps/{view['id']}"
    assert (view["job_id"], view["artifact_id"], view["dataset_id"]) == (None, None, None)
    assert view["base_model"] == MODEL
    assert api.http.get(f"/head-maps/{view['id']}.json").content == raw
    job = api.post(a_job(dataset=dataset, heads={"head_map": view["id"]})).json()
    api.finish(job["id"])
    assert api.http.get(f"/jobs/{job['id']}").json()["status"] == "succeeded"
    report = api.http.get(f"/jobs/{job['id']}/report").json()
    assert "heads" not in [step["step"] for step in report["attempts"]]


def test_a_job_that_names_a_head_map_has_the_maps_scorer_and_no_fast_mode_with_any_other(
    api: Api, made: dict[str, Any], dataset: str
) -> None:
    brought = bring(api, file_of(made, scorer="pad")).json()["id"]

    answer = api.post(a_job(dataset=dataset, heads={"head_map": brought}, data={"mode": "fast"}))
    assert (answer.status_code, answer.json()["code"]) == (422, "config.invalid")
    (fault,) = answer.json()["errors"]
    assert (fault["code"], fault["pointer"]) == ("config.mode", "/data/mode")
    assert "the head scorer 'pad'" in fault["message"]
    named = api.post(a_job(dataset=dataset, heads={"head_map": made["id"]}, data={"mode": "fast"}))
    assert named.status_code == 202, named.text
    api.finish(named.json()["id"])

    job = api.post(a_job(dataset=dataset, heads={"head_map": brought})).json()
    for _ in range(2):  # before the rows are read, and after
        assert job["resolved"]["heads"]["scorer"] == "pad"
        assert "head map" in job["reasons"]["/heads/scorer"]
        api.finish(job["id"])
        job = api.http.get(f"/jobs/{job['id']}").json()


def test_it_is_known_by_its_models_digest_whatever_the_model_is_called(api: Api, made: dict[str, Any]) -> None:
    assert bring(api, file_of(made, model_name="as-it-was-there")).json()["base_model"] == MODEL


@pytest.mark.parametrize(
    ("changed", "pointer"),
    [
        ({"scores": [[1.0, 2.0, 3.0, 4.0]]}, "/head_map/scores"),
        ({"scores": [[1.0, 2.0, 3.0, 4.0], [1.0]]}, "/head_map/scores/1"),
        ({"scores": [[1.0, 2.0, 3.0, 4.0], [1.0, "x", 3.0, 4.0]]}, "/head_map/scores/1/1"),
        ({"halves": [[[1.0] * 4] * 2]}, "/head_map/halves"),
        ({"halves": [[[1.0] * 4] * 2, [[1.0] * 4]]}, "/head_map/halves/1"),
        ({"format": 2}, "/head_map/format"),
        ({"seed": "0"}, "/head_map/seed"),
        ({"projections": ["v", "x"]}, "/head_map/projections/1"),
        ({"stranger": 1}, "/head_map/stranger"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(
    api: Api, made: dict[str, Any], changed: dict[str, Any], pointer: str
) -> None:
    before = api.count("head_maps"), api.kept()

    answer = bring(api, file_of(made, **changed))

    assert (answer.status_code, answer.json()["code"]) == (422, "head_map.invalid")
    assert pointer in [fault["pointer"] for fault in answer.json()["errors"]]
    assert (api.count("head_maps"), api.kept()) == before


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_scores_are_numbers_that_end(api: Api, made: dict[str, Any], number: str) -> None:
    content = file_of(made, scores=[[1.0, 2.0, 3.0, 12345.5], [1.0] * 4]).replace(b"12345.5", number.encode())

    answer = bring(api, content)

    assert (answer.status_code, answer.json()["code"]) == (422, "head_map.invalid")
    assert answer.json()["errors"][0]["pointer"] == "/head_map/scores/0/3"


@pytest.mark.parametrize("content", [b"", b"[]", b"x", b"[" * 100_000, b"\xff\xfe", b'{"format": 1}'])
def test_what_is_no_head_map_is_refused(api: Api, content: bytes) -> None:
    answer = bring(api, content)

    assert (answer.status_code, answer.json()["code"]) == (422, "head_map.invalid")


def test_a_head_map_of_weights_that_are_not_here_is_refused(api: Api, made: dict[str, Any]) -> None:
    answer = bring(api, file_of(made, model_digest="0" * 64))
    unknown = bring(api, file_of(made, model_digest="0" * 64, model_name="nowhere"))

    assert (answer.status_code, answer.json()["code"]) == (409, "head_map.mismatch")
    assert made["model_digest"] in answer.json()["detail"]
    assert "not installed" in unknown.json()["detail"]


def test_an_import_takes_the_file_alone(api: Api, made: dict[str, Any]) -> None:
    files: dict[str, Any] = {
        "head_map": ("h.json", file_of(made)),
        "job": (None, json.dumps(HEADS), "application/json"),
    }

    assert api.http.post("/head-maps", files=files).json()["errors"][0]["pointer"] == "/job"
    assert (
        api.http.post("/head-maps", files={"validation_dataset": ("v", b"{}")}).json()["errors"][0]["pointer"] == "/job"
    )


def test_an_import_is_done_once_for_a_key(api: Api, made: dict[str, Any]) -> None:
    once, again = (bring(api, file_of(made), **{"Idempotency-Key": "import-1"}) for _ in range(2))

    assert once.json()["id"] == again.json()["id"]


def test_a_sweep_leaves_an_imported_file_until_it_is_deleted(api: Api, made: dict[str, Any]) -> None:
    imported = bring(api, file_of(made, seed=99)).json()["id"]
    sha256 = hashlib.sha256(api.http.get(f"/head-maps/{imported}.json").content).hexdigest()

    def sweep() -> bool:
        with api.engine.begin() as conn:
            conn.exec_driver_sql("update objects set used_at = now() - interval '2 days'")
        collect(api.engine, api.blobs, kept_h=24)
        return sha256 in api.stored()

    assert sweep()
    api.http.delete(f"/head-maps/{imported}")
    assert not sweep()


# --- looked at ---------------------------------------------------------------------------------------------------------


def test_the_list_is_paged_and_filtered(api: Api, made: dict[str, Any], dataset: str) -> None:
    imported = bring(api, file_of(made, scorer="shift")).json()["id"]

    def ids(**query: Any) -> list[str]:
        found: list[str] = []
        cursor = None
        while True:
            page = api.http.get("/head-maps", params=query | ({"cursor": cursor} if cursor else {})).json()
            found += [one["id"] for one in page["data"]]
            cursor = page["next_cursor"]
            if not page["has_more"]:
                return found

    everything = ids(limit=100)
    assert ids(limit=1) == everything == sorted(everything, reverse=True)
    assert {imported, made["id"]} <= set(everything)
    assert ids(scorer="shift") == [imported]
    assert made["id"] in ids(dataset=dataset)
    assert imported not in ids(dataset=dataset)
    assert ids(base_model="other") == []
    assert ids(base_model=MODEL) == everything


def test_the_array_has_the_numbers_of_the_file(api: Api, made: dict[str, Any]) -> None:
    halves = [[[1.5, 2.0, 3.0, 4.0]] * 2, [[0.1] * 4] * 2]
    both = bring(api, file_of(made, halves=halves)).json()["id"]

    arrays = np.load(io.BytesIO(api.http.get(f"/head-maps/{both}.npz").content), allow_pickle=False)
    alone = np.load(io.BytesIO(api.http.get(f"/head-maps/{made['id']}.npz").content), allow_pickle=False)

    assert arrays["scores"].tolist() == made["map"]["scores"]
    assert arrays["halves"].tolist() == halves
    assert alone.files == ["scores"]


def test_two_head_maps_are_compared_by_rank_and_against_chance(api: Api, made: dict[str, Any]) -> None:
    upside_down = [[-score for score in layer] for layer in made["map"]["scores"]]
    other = bring(api, file_of(made, scores=upside_down)).json()["id"]

    def diff(one: str, with_: str, **query: Any) -> dict[str, Any]:
        answer = api.http.get(f"/head-maps/{one}/diff", params={"with": with_, **query})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    same, reverse = diff(made["id"], made["id"], ratio=0.5), diff(made["id"], other, ratio=0.5)

    assert (same["rank_correlation"], same["overlap"], same["jaccard"], same["same_model"]) == (1.0, 4, 1.0, True)
    assert same["p_value"] == pytest.approx(1 / 70)  # one way of 8 over 4
    assert (same["only_one"], same["only_other"]) == ([], [])
    assert (reverse["rank_correlation"], reverse["overlap"], reverse["p_value"]) == (-1.0, 0, 1.0)
    assert reverse["chance"] == 4 * 4 / 8
    assert len(reverse["only_one"]) == len(reverse["only_other"]) == 4
    assert [layer["layer"] for layer in reverse["layers"]] == [0, 1]
    assert sum(layer["kept_one"] for layer in reverse["layers"]) == 4


def test_a_map_that_ranks_nothing_names_no_best_heads_and_is_compared_with_none(
    api: Api, made: dict[str, Any], dataset: str
) -> None:
    job = api.http.post("/head-maps", json={**HEADS, "dataset": dataset, "heads": {"scorer": "uniform"}}).json()["id"]
    api.finish(job)
    flat = api.http.get(f"/jobs/{job}").json()["head_map"]

    events = api.http.get(f"/jobs/{job}/events").json()["data"]
    (ranked,) = [event["data"] for event in events if event["type"] == "heads.ranked"]
    assert (ranked["head_map"], ranked["kept"], ranked["heads"]) == (flat, 8, 8)
    assert (ranked["best"], ranked["rank_correlation"]) == ([], None)
    for one, other in ((flat, made["id"]), (made["id"], flat), (flat, flat)):
        answer = api.http.get(f"/head-maps/{one}/diff", params={"with": other})
        assert (answer.status_code, answer.json()["code"]) == (409, "head_map.ranks_nothing")
        assert set(answer.json()["facts"]["ids"]) == {flat}


def test_maps_of_other_shapes_are_not_compared(api: Api, made: dict[str, Any]) -> None:
    directory = api.settings.models_dir / "wide"
    write_stub_model(directory, layers=3)
    digest = api.http.get("/models/wide").json()["digest"]
    wide = bring(api, file_of(made, model_digest=digest, scores=[[1.0, 2.0, 3.0, 4.0]] * 3)).json()

    answer = api.http.get(f"/head-maps/{made['id']}/diff", params={"with": wide["id"]})

    assert (answer.status_code, answer.json()["code"]) == (409, "head_map.mismatch")
    assert api.http.get(f"/head-maps/{made['id']}/diff").status_code == 422
    assert api.http.get(f"/head-maps/{made['id']}/diff", params={"with": "hm_x"}).json()["code"] == "head_map.not_found"


# --- deleted -----------------------------------------------------------------------------------------------------------


def test_a_deleted_head_map_is_gone_with_its_file_and_its_job_stays(api: Api, dataset: str) -> None:
    job_id = api.http.post("/head-maps", json={**HEADS, "dataset": dataset, "reuse": "never"}).json()["id"]
    api.finish(job_id)
    head_map = api.http.get(f"/jobs/{job_id}").json()["head_map"]
    content = api.http.get(f"/head-maps/{head_map}.json").content
    artifact = api.http.get(f"/head-maps/{head_map}").json()["artifact_id"]

    receipt = api.http.delete(f"/head-maps/{head_map}").json()

    assert (receipt["what"], receipt["id"]) == ("head_map", head_map)
    assert receipt["sha256"] == [hashlib.sha256(content).hexdigest()]
    assert api.http.get(f"/audit?object={head_map}").json()["data"][0]["action"] == "head_map.delete"
    assert api.http.get(f"/head-maps/{head_map}").status_code == 404
    assert api.http.delete(f"/head-maps/{head_map}").status_code == 404
    assert api.http.get(f"/artifacts/{artifact}").status_code == 404
    job = api.http.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["head_map"]) == ("succeeded", None)
    named = api.post(a_job(dataset=dataset, heads={"head_map": head_map}))
    assert named.json()["code"] == "head_map.not_found"


def test_a_later_equal_job_does_not_lean_on_a_deleted_file(api: Api) -> None:
    dataset = api.dataset(64, start=500)
    first = api.http.post("/head-maps", json={**HEADS, "dataset": dataset}).json()["id"]
    api.finish(first)
    api.http.delete(f"/head-maps/{api.http.get(f'/jobs/{first}').json()['head_map']}")

    second = api.http.post("/head-maps", json={**HEADS, "dataset": dataset}).json()["id"]
    api.finish(second)

    assert api.http.get(f"/jobs/{second}").json()["head_map"] is not None


def test_a_head_map_that_a_job_needs_is_not_deleted(api: Api, made: dict[str, Any], dataset: str) -> None:
    imported = bring(api, file_of(made)).json()["id"]
    reader = api.post(a_job(dataset=dataset, heads={"head_map": imported})).json()["id"]

    answer = api.http.delete(f"/head-maps/{imported}")

    assert (answer.status_code, answer.json()["code"]) == (409, "head_map.in_use")
    assert answer.json()["facts"]["by"] == [reader]
    api.http.post(f"/jobs/{reader}/cancel")
    assert api.http.delete(f"/head-maps/{imported}").status_code == 200
    retried = api.http.post(f"/jobs/{reader}/retry")
    assert (retried.status_code, retried.json()["code"]) == (404, "head_map.not_found")


def test_a_job_whose_files_were_deleted_is_not_retried_but_cloned(api: Api, dataset: str) -> None:
    job_id = api.post(a_job(dataset=dataset, reuse="never")).json()["id"]
    api.finish(job_id)
    with api.engine.begin() as conn:  # as if its last step had failed
        conn.exec_driver_sql("update jobs set status = 'failed' where id = %s", (job_id,))
        conn.exec_driver_sql("update steps set status = 'failed' where job_id = %s and step = 'package'", (job_id,))
    api.http.delete(f"/head-maps/{api.http.get(f'/jobs/{job_id}').json()['head_map']}")

    retried = api.http.post(f"/jobs/{job_id}/retry")

    assert (retried.status_code, retried.json()["code"]) == (409, "job.results_gone")
    assert retried.json()["facts"]["names"] == ["head_map.json"]
    assert api.http.post(f"/jobs/{job_id}/clone", json={}).status_code == 202
