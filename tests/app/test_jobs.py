"""Laws of POST /jobs and of reading jobs: accepted whole, or refused with every fault and nothing left behind."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from p2d.arch import ARCHS
from tests.app.conftest import Api, a_job, rows


def codes(answer: httpx.Response) -> dict[str, str]:
    """Pointer -> code of all faults."""
    return {fault.get("pointer", ""): fault["code"] for fault in answer.json()["errors"]}


def test_a_job_is_accepted_with_its_place_and_with_every_auto_explained(api: Api) -> None:
    answer = api.post(a_job(dataset=api.dataset(), name="sums", metadata={"team": "blue"}))

    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["Location"] == f"/jobs/{job['id']}"
    assert answer.headers["Retry-After"] == "2"
    assert (job["status"], job["name"], job["metadata"]) == ("queued", "sums", {"team": "blue"})
    assert job["config"]["heads"]["scorer"] == "auto"
    assert job["resolved"]["heads"]["scorer"] == "uniform"
    autos = [(group, name) for group in ("heads", "data", "training") for name in job["config"][group]]
    autos = [(group, name) for group, name in autos if job["config"][group][name] == "auto"]
    assert {name for _, name in autos} >= {"scorer", "ratio", "mode", "slices", "rank", "epochs"}
    inside = {"learning_rate", "precision"}  # the run decides
    assert set(job["reasons"]) == {f"/{group}/{name}" for group, name in autos if name not in inside}
    left = {(group, name) for group, name in autos if name not in inside and job["resolved"][group][name] == "auto"}
    assert left == {("data", "ratio")}  # words decide it, inside the run
    assert api.http.get(f"/jobs/{job['id']}").json() == job


def test_an_auto_may_be_written_out_and_null_is_no_rank(api: Api) -> None:
    dataset = api.dataset()
    plain = api.post(a_job(dataset=dataset, heads={})).json()
    autos = {"heads": {"ratio": "auto"}, "data": {"mode": "auto"}, "training": {"rank": "auto", "epochs": "auto"}}
    spelt = api.post(a_job(dataset=dataset, **autos)).json()
    whole = api.post(a_job(dataset=dataset, training={"rank": None, "epochs": 2}, heads={"ratio": 1})).json()

    assert spelt["resolved"] == plain["resolved"]
    # The width of the stub's heads.
    assert (plain["resolved"]["training"]["rank"], plain["resolved"]["training"]["epochs"]) == (4, 3)
    assert (whole["resolved"]["training"]["rank"], whole["resolved"]["training"]["epochs"]) == (None, 2)
    assert whole["resolved"]["heads"]["scorer"] == "uniform"


def test_a_job_with_its_files_stores_both_datasets(api: Api) -> None:
    answer = api.send(a_job(), rows(40, start=1000), validation_dataset=rows(10, start=2000))

    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert api.http.get(f"/datasets/{job['dataset_id']}").json()["rows"] == 40
    assert api.http.get(f"/datasets/{job['validation_dataset_id']}").json()["rows"] == 10
    assert api.uploading() == []


REFUSED: dict[str, tuple[dict[str, Any], int, dict[str, str]]] = {
    "a ratio of 0": ({"heads": {"ratio": 0, "proxy_rows": 8}}, 422, {"/heads/ratio": "config.ratio"}),
    "a ratio of 2": ({"data": {"ratio": 2.0}}, 422, {"/data/ratio": "config.ratio"}),
    "an unknown field": ({"heads": {"proxy_rows": 8, "rato": 1}}, 422, {"/heads/rato": "field.extra_forbidden"}),
    "a number as text": ({"training": {"epochs": "3"}}, 422, {"/training/epochs": "field.int_type"}),
    "an unknown scorer": ({"data": {"scorer": "alignmend"}}, 422, {"/data/scorer": "config.unknown_name"}),
    "an unknown recipe": ({"recipe": "papper"}, 422, {"/recipe": "config.unknown_name"}),
    "a model that is not there": ({"base_model": "stubb"}, 404, {"/base_model": "model.not_found"}),
    "a path as model": ({"base_model": "../models/stub"}, 404, {"/base_model": "model.not_found"}),
    "another revision": ({"revision": "0" * 64}, 404, {"/revision": "model.not_found"}),
    "too few rows for any proxy": (
        {"heads": {"scorer": "attribution"}},
        422,
        {"/heads/proxy_rows": "dataset.too_small"},
    ),
    "too few rows for the proxy": (
        {"heads": {"scorer": "attribution", "proxy_rows": 100}}, 422, {"/heads/proxy_rows": "dataset.too_small"},
    ),
    "a head map that is not there": ({"heads": {"head_map": "hm_x"}}, 404, {"/heads/head_map": "head_map.not_found"}),
    "a selection that is not there": ({"data": {"selection": "s"}}, 404, {"/data/selection": "selection.not_found"}),
    "no such dataset": ({"dataset": "ds_x"}, 404, {"/dataset": "dataset.not_found"}),
    "a NUL in the name": ({"name": "a\x00b"}, 422, {"/name": "field.value_error"}),
    "infinite learning rate": ({"training": {"learning_rate": -1.0}}, 422, {"/training/learning_rate": "config.learning_rate"}),
    "a rate above 1": ({"training": {"learning_rate": 1e30}}, 422, {"/training/learning_rate": "field.less_than_equal"}),
    "a rank above the head width": ({"training": {"rank": 9}}, 422, {"/training/rank": "config.rank"}),
    "epochs without end": ({"training": {"epochs": 10**30}}, 422, {"/training/epochs": "field.less_than_equal"}),
    "a seed beyond the database": ({"training": {"seed": 2**70}}, 422, {"/training/seed": "field.less_than_equal"}),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_job_is_refused_for(api: Api, what: str) -> None:
    fields, status, faults = REFUSED[what]
    before = api.count("jobs")

    few = what == "too few rows for any proxy"
    answer = api.post(a_job(**{"dataset": api.dataset(18) if few else api.dataset(), **fields}))

    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert codes(answer) == faults
    assert api.count("jobs") == before


def test_a_field_that_may_be_auto_has_one_fault_at_its_own_place(api: Api) -> None:
    body = a_job(dataset=api.dataset(), heads={"proxy_rows": "many"}, training={"slices": ["v", "x"], "epochs": 1.5})

    answer = api.post(body)

    assert codes(answer) == {
        "/heads/proxy_rows": "field.int_type",
        "/training/slices/1": "field.literal_error",
        "/training/epochs": "field.int_type",
    }
    assert answer.json()["detail"] == "3 fields of the request are wrong."
    assert answer.json()["errors"][0]["message"] == "Input should be a valid integer, or 'auto'."


def test_a_fault_of_the_rank_names_everything_that_it_may_be(api: Api) -> None:
    dataset = api.dataset()
    told = {}
    for rank in ("high", 1.5, 0, 9):  # neither is a whole number; below every rank; above the head width
        (fault,) = api.post(a_job(dataset=dataset, training={"rank": rank})).json()["errors"]
        assert fault["pointer"] == "/training/rank"
        told[rank] = fault["expected"]

    assert told == {
        "high": "a whole number, 'auto' or null",
        1.5: "a whole number, 'auto' or null",
        0: "at least 1, 'auto' or null",
        9: "at most 4 (the width of a head of the base model), 'auto' or null",
    }


def test_wrong_types_and_wrong_values_are_told_together(api: Api) -> None:
    wrong = a_job(
        dataset=api.dataset(),
        kind="adopt",
        heads={"ratio": 2.0, "scorer": "nobody's"},
        data={"mode": "quick", "ratio": -1.0},
        training={"epochs": 1.5, "rank": 0, "learning_rate": -1.0},
        colour="red",
    )

    answer = api.post(wrong)

    assert codes(answer) == {
        "/kind": "field.literal_error",
        "/data/mode": "field.literal_error",
        "/training/epochs": "field.int_type",
        "/colour": "field.extra_forbidden",
        "/heads/ratio": "config.ratio",
        "/heads/scorer": "config.unknown_name",
        "/data/ratio": "config.ratio",
        "/training/rank": "config.too_small",
        "/training/learning_rate": "config.learning_rate",
    }


def test_a_model_of_another_family_is_refused_by_name(api: Api) -> None:
    directory = api.settings.models_dir / "mamba"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "mamba"}))

    answer = api.post(a_job(dataset=api.dataset(), base_model="mamba"))

    assert (answer.status_code, answer.json()["code"]) == (422, "model.unsupported")
    assert all(family in answer.json()["detail"] for family in ARCHS)


def test_every_fault_of_a_request_is_listed_at_once(api: Api) -> None:
    body = a_job(base_model="nobody", heads={"ratio": 2.0, "proxy_rows": 0}, recipe="best")
    lines = rows(10).splitlines(keepends=True)
    lines[3] = b'{"question": "q", "answer": ""}\n'

    answer = api.send(body, b"".join(lines))

    assert answer.status_code == 422
    assert codes(answer) == {
        "/recipe": "config.unknown_name",
        "/heads/ratio": "config.ratio",
        "/heads/proxy_rows": "config.too_small",
        "/base_model": "model.not_found",
        "/dataset/answer": "row.empty",
    }
    assert answer.json()["errors_total"] == 5
    assert answer.json()["detail"].startswith("The job has 5 faults.")


@pytest.mark.parametrize(
    ("path", "body", "wrong"),
    [
        ("/jobs", {"heads": {"ratio": 5}}, "/heads/ratio"),
        ("/estimates", {"heads": {"ratio": 5}}, "/heads/ratio"),
        ("/head-maps", {"heads": {"proxy_rows": 0}}, "/heads/proxy_rows"),
        ("/selections", {"data": {"ratio": 5}}, "/data/ratio"),
    ],
)
def test_a_dataset_that_is_missing_is_told_with_all_other_faults(
    api: Api, path: str, body: dict[str, Any], wrong: str
) -> None:
    typeless = codes(api.http.post(path, json=body))
    typed = api.http.post(path, json={**body, "base_model": "nobody"})

    assert typeless.keys() == {"/base_model", "/dataset", wrong}
    assert typeless["/base_model"] == typeless["/dataset"] == "field.missing"
    assert codes(typed).keys() == typeless.keys()
    assert typed.json()["detail"].startswith("The job has 3 faults. There is no model")


BAD_FILES: dict[str, tuple[bytes, int, str]] = {
    "an empty file": (b"", 422, "dataset.empty"),
    "only blank lines": (b"\n\n\n", 422, "dataset.empty"),
    "a wrong field": (b'{"question": "q", "solution": "a"}\n', 422, "dataset.invalid"),
    "too large a file": (b"x" * 3_000_001, 413, "dataset.too_large"),
    "not a dataset at all": (bytes(range(256)) * 10, 422, "dataset.invalid"),
    "Parquet that is none": (b"PAR1" + b"\0" * 100, 422, "dataset.invalid"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_job_leaves_nothing_behind_when_its_file_is(api: Api, what: str) -> None:
    content, status, code = BAD_FILES[what]
    before = (api.count("jobs"), api.count("datasets"), api.kept())

    answer = api.send(a_job(), content)

    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert (api.count("jobs"), api.count("datasets"), api.kept()) == before
    assert api.uploading() == []


def test_broken_line_317_and_all_other_bad_lines_are_named(api: Api) -> None:
    lines = rows(400).splitlines(keepends=True)
    lines[316] = b'{"question": "q", "answer": "a"\n'
    lines[340] = b'{"question": 5, "answer": "a"}\n'

    answer = api.send(a_job(), b"".join(lines))

    assert answer.status_code == 422
    assert [(fault["line"], fault["code"]) for fault in answer.json()["errors"]] == [
        (317, "row.not_json"),
        (341, "row.wrong_type"),
    ]


def test_a_deadline_is_a_time_to_come(api: Api) -> None:
    dataset = api.dataset()

    def post(deadline: object) -> httpx.Response:
        return api.post(a_job(dataset=dataset, limits={"deadline": deadline}))

    for wrong in ("2999-01-01", "2999-01-01T00:00:00", "9999-12-31T23:59:59-14:00", 32_472_144_000, "soon"):
        assert (post(wrong).status_code, post(wrong).json()["errors"][0]["pointer"]) == (422, "/limits/deadline"), wrong
    for past in ("2020-01-01T00:00:00Z", "0002-01-01T00:00:00+14:00"):
        assert (post(past).json()["code"], post(past).json()["errors"][0]["expected"]) == (
            "config.invalid",
            "a time to come",
        )

    job_id = post("2999-01-01T02:00:00+02:00").json()["id"]
    kept = api.http.get(f"/jobs/{job_id}/config").json()["config"]["limits"]
    assert kept == {"max_seconds": None, "max_gpu_seconds": None, "deadline": "2999-01-01T02:00:00+02:00"}
    assert api.http.post(f"/jobs/{job_id}/clone", json={"limits": {"deadline": None}}).status_code == 202


def test_too_few_rows_in_a_sent_file_leave_nothing_behind(api: Api) -> None:
    before = (api.count("datasets"), api.kept())

    answer = api.send(a_job(), rows(9, start=5000))

    assert (answer.status_code, answer.json()["code"]) == (422, "dataset.too_small")
    assert (api.count("datasets"), api.kept()) == before


def test_files_of_a_job_may_name_their_columns_otherwise(api: Api) -> None:
    german = rows(60, start=8000).replace(b'"question"', b'"Frage"').replace(b'"answer"', b'"Antwort"')
    mapping = {"question": "Frage", "answer": "Antwort"}

    job = api.send(a_job(mapping=mapping), german)

    assert job.status_code == 202, job.text
    assert api.http.get(f"/datasets/{job.json()['dataset_id']}/report").json()["mapping"] == mapping
    assert codes(api.send(a_job(mapping={"question": "Q"}), german)) == {"/dataset": "mapping.no_such_column"}
    assert codes(api.send(a_job(mapping={"Q": "question"}), german)) == {"/mapping/Q": "mapping.invalid"}
    assert codes(api.post(a_job(dataset=api.dataset(), mapping=mapping))) == {"/mapping": "field.without_file"}


def test_a_dataset_given_twice_or_not_at_all_is_refused(api: Api) -> None:
    assert codes(api.post(a_job())) == {"/dataset": "field.missing"}
    assert codes(api.send(a_job(dataset=api.dataset()), rows(20))) == {"/dataset": "field.given_twice"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"\xff"', b"[" * 40_000, b'{"kind": NaN}'])
def test_a_body_that_is_no_job_is_refused(api: Api, body: bytes) -> None:
    answer = api.http.post("/jobs", content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code in (400, 422), answer.text
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_body_too_large_or_of_another_type_is_refused(api: Api) -> None:
    json_type = {"Content-Type": "application/json"}
    assert api.http.post("/jobs", content=b" " * 60_000, headers=json_type).status_code == 413
    assert api.http.post("/jobs", content=b"a=1", headers={"Content-Type": "text/plain"}).status_code == 415
    assert api.http.post("/jobs").status_code == 415


def test_jobs_are_paged_newest_first_without_drift(api: Api) -> None:
    made = [api.job(name=f"page {number}", kind="select_data") for number in range(5)]

    seen: list[str] = []
    cursor: str | None = None
    while True:
        params: dict[str, str] = {"limit": "2", "kind": "select_data"} | ({"cursor": cursor} if cursor else {})
        page = api.http.get("/jobs", params=params).json()
        seen += [job["id"] for job in page["data"]]
        cursor = page["next_cursor"]
        assert page["has_more"] == (cursor is not None)
        if cursor is None:
            break
        api.job(kind="identify_heads")  # what comes in between shifts nothing

    assert seen[:5] == made[::-1]
    assert len(seen) == len(set(seen))


def test_cancelling_again_is_harmless_and_a_queued_job_ends_at_once(api: Api) -> None:
    job_id = api.job()

    first, second = api.http.post(f"/jobs/{job_id}/cancel"), api.http.post(f"/jobs/{job_id}/cancel")

    assert (first.status_code, first.json()["status"]) == (202, "cancelled")
    assert second.json() == first.json()


@pytest.mark.parametrize(
    "id", ["0", "job_", "ds_01jd8m4q6t0000000000000000", "job_01jd8m4q6t0000000000000000", "a%00b", "%ff"]
)
def test_an_id_that_names_no_job_is_404(api: Api, id: str) -> None:
    for method, path in [
        ("GET", ""),
        ("POST", "/cancel"),
        ("POST", "/pause"),
        ("POST", "/resume"),
        ("POST", "/retry"),
        ("POST", "/clone"),
        ("DELETE", ""),
        ("GET", "/config"),
        ("GET", "/attempts"),
        ("GET", "/logs"),
        ("GET", "/checkpoints"),
        ("GET", "/metrics"),
        ("GET", "/metrics.csv"),
        ("GET", "/head-map"),
        ("GET", "/selection"),
        ("GET", "/events"),
        ("GET", "/artifacts"),
        ("GET", "/report"),
    ]:
        answer = api.http.request(method, f"/jobs/{id}{path}")
        assert (answer.status_code, answer.json()["code"]) == (404, "job.not_found")


# --- Idempotency-Key -------------------------------------------------------------------------------------------------


def test_fifty_equal_posts_with_one_key_make_one_job(api: Api) -> None:
    body, before = a_job(dataset=api.dataset()), api.count("jobs")

    with ThreadPoolExecutor(25) as pool:
        answers = list(pool.map(lambda _: api.post(body, **{"Idempotency-Key": "fifty"}), range(50)))

    assert {answer.status_code for answer in answers} == {202}
    assert all(answer.json() == answers[0].json() for answer in answers)
    assert [answer.headers.get("Idempotency-Replayed") for answer in answers].count(None) == 1
    assert api.count("jobs") == before + 1


def test_a_key_with_another_request_is_refused(api: Api) -> None:
    body = a_job(dataset=api.dataset())
    api.post(body, **{"Idempotency-Key": "once"})

    answer = api.post({**body, "name": "other"}, **{"Idempotency-Key": "once"})

    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency.mismatch")


def test_a_refused_request_does_not_use_up_its_key(api: Api) -> None:
    body = a_job(dataset=api.dataset())
    assert api.post({**body, "recipe": "none"}, **{"Idempotency-Key": "mend"}).status_code == 422

    assert api.post(body, **{"Idempotency-Key": "mend"}).status_code == 202


def test_a_key_must_be_printable(api: Api) -> None:
    assert api.post(a_job(), **{"Idempotency-Key": "x" * 256}).status_code == 422


def test_the_first_answer_is_replayed_even_when_the_model_is_gone(api: Api, tmp_path: Path) -> None:
    from benchmarks.service import write_stub_model

    write_stub_model(api.settings.models_dir / "passing")
    body = a_job(dataset=api.dataset(), base_model="passing")
    first = api.post(body, **{"Idempotency-Key": "gone"})
    (api.settings.models_dir / "passing").rename(tmp_path / "away")

    again = api.post(body, **{"Idempotency-Key": "gone"})

    assert (again.status_code, again.json()) == (202, first.json())
