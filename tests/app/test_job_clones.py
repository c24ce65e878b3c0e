"""Laws of POST /jobs/{id}/clone: the same request again, changed by a merge patch, checked like any other."""

from __future__ import annotations

import httpx
import pytest

from app.api.patches import merge_patch
from p2d.client import Client
from tests.app.conftest import Api, a_job, rows

ASKED = {
    "kind": "select_data",
    "name": "first",
    "metadata": {"team": "blue", "run": "1"},
    "heads": {"ratio": 0.2, "proxy_rows": 8},
    "data": {"ratio": 0.5, "scorer": "icl"},
    "training": {"seed": 3, "slices": ["v"], "learning_rate": 0.01},
    "limits": {"max_seconds": 900},
}


def clone(api: Api, job_id: str, patch: object = None, **headers: str) -> httpx.Response:
    """POST /jobs/{id}/clone."""
    return api.http.post(f"/jobs/{job_id}/clone", json=patch, headers=headers)


def test_a_clone_asks_for_the_same(api: Api) -> None:
    job = api.send(a_job(**ASKED), rows(60), validation_dataset=rows(10, start=900)).json()

    answer = api.http.post(f"/jobs/{job['id']}/clone")

    assert answer.status_code == 202, answer.text
    copy = answer.json()
    assert copy["id"] != job["id"]
    assert answer.headers["Location"] == f"/jobs/{copy['id']}"
    same = ("kind", "name", "metadata", "config", "resolved", "dataset_id", "validation_dataset_id", "base_model")
    assert {name: copy[name] for name in same} == {name: job[name] for name in same}
    assert copy["status"] == "queued"


def test_a_clone_differs_where_the_patch_says_so(api: Api) -> None:
    job_id = api.job(**ASKED)

    copy = clone(api, job_id, {
        "kind": "adapt",
        "name": "second",
        "metadata": {"run": None, "note": "x"},
        "data": {"ratio": 0.25, "scorer": None},
        "training": {"slices": ["v", "o"]},
        "limits": None,
    }).json()  # fmt: skip

    assert (copy["kind"], copy["name"], copy["metadata"]) == ("adapt", "second", {"team": "blue", "note": "x"})
    assert copy["config"]["data"]["ratio"] == 0.25
    assert copy["config"]["data"]["scorer"] == "auto"
    assert copy["config"]["training"]["slices"] == ["v", "o"]
    assert copy["config"]["training"]["seed"] == 3
    assert copy["config"]["limits"]["max_seconds"] is None


def test_a_clone_of_a_failed_or_ended_job_runs(api: Api) -> None:
    job_id = api.job()
    api.http.post(f"/jobs/{job_id}/cancel")

    copy = clone(api, job_id, {"kind": "identify_heads"}).json()["id"]

    api.finish(copy)
    assert api.http.get(f"/jobs/{copy}").json()["status"] == "succeeded"
    assert api.http.get(f"/jobs/{job_id}").json()["status"] == "cancelled"


@pytest.mark.parametrize(
    ("patch", "status", "pointer"),
    [
        ({"heads": {"ratio": 2.0}}, 422, "/heads/ratio"),
        ({"heads": {"rato": 0.2}}, 422, "/heads/rato"),
        ({"heads": 5}, 422, "/heads"),
        ({"base_model": None}, 422, "/base_model"),
        ({"dataset": None}, 422, "/dataset"),
        ({"dataset": "ds_x"}, 404, "/dataset"),
        ({"base_model": "nobody"}, 404, "/base_model"),
        ([], 422, ""),
    ],
)
def test_a_clone_is_checked_like_any_job(api: Api, patch: object, status: int, pointer: str) -> None:
    job_id, before = api.job(), api.count("jobs") + 1

    answer = clone(api, job_id, patch)

    assert answer.status_code == status, answer.text
    assert [fault.get("pointer", "") for fault in answer.json()["errors"]] == [pointer]
    assert api.count("jobs") == before - 1


def test_a_body_that_is_no_patch_is_refused(api: Api) -> None:
    url = f"/jobs/{api.job()}/clone"

    for type, body, status in [
        ("application/json", b"{", 400),
        ("application/merge-patch+json", b"[" * 40_000, 400),
        ("text/plain", b"a=1", 415),
        ("application/json", b" " * 60_000, 413),
    ]:
        answer = api.http.post(url, content=body, headers={"Content-Type": type})
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
    accepted = api.http.post(url, content=b'{"name": "x"}', headers={"Content-Type": "application/merge-patch+json"})
    assert accepted.json()["name"] == "x"


def test_the_client_clones_too(api: Api) -> None:
    job_id = api.job(name="first")

    with Client(api.url) as client:
        assert client.clone(job_id).raw["name"] == "first"
        assert client.clone(job_id, {"name": "second"}).raw["name"] == "second"


def test_one_key_makes_one_clone(api: Api) -> None:
    job_id, key = api.job(), {"Idempotency-Key": "clone-once"}

    first, again = (clone(api, job_id, {"name": "twin"}, **key) for _ in range(2))

    assert (again.json(), again.headers["Idempotency-Replayed"]) == (first.json(), "true")
    assert clone(api, job_id, {"name": "other"}, **key).json()["code"] == "idempotency.mismatch"


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [  # the table in the appendix of RFC 7396, in full where it is about objects
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_a_merge_patch_does_what_rfc_7396_says(target: object, patch: object, result: object) -> None:
    assert merge_patch(target, patch) == result
