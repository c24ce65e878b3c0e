"""Laws of datasets in a request's JSON, by source or in rows: ordinary datasets, or every fault at once and nothing stored."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import httpx
import pytest

from tests.app.conftest import Api, a_job, rows
from tests.tls_server import World


def given_rows(count: int, *, start: int = 0) -> dict[str, Any]:
    return {"rows": [json.loads(line) for line in rows(count, start=start).splitlines()]}


def source(path: str) -> dict[str, Any]:
    return {"source": {"type": "https", "url": f"https://data.example{path}"}}


def codes(answer: httpx.Response) -> dict[str, str]:
    return {fault.get("pointer", ""): fault["code"] for fault in answer.json()["errors"]}


def test_a_job_takes_rows_and_a_source_which_become_ordinary_datasets(fetching: Api, world: World) -> None:
    world.serve("/held-out.jsonl", rows(12, start=100))

    answer = fetching.post(a_job(dataset=given_rows(40), validation_dataset=source("/held-out.jsonl")))

    assert answer.status_code == 202, answer.text
    job = answer.json()
    dataset = fetching.http.get(f"/datasets/{job['dataset_id']}").json()
    report = fetching.http.get(f"/datasets/{job['validation_dataset_id']}/report").json()
    assert (dataset["name"], dataset["rows"]) == ("rows", 40)
    assert (report["rows"], report["source"]["url"]) == (12, "https://data.example/held-out.jsonl")
    again = fetching.upload(rows(40)).json()
    assert again == {**dataset, "deduplicated": True, "received_sha256": hashlib.sha256(rows(40)).hexdigest()}
    assert fetching.uploading() == []


def test_every_fault_of_both_datasets_and_of_the_job_is_named_at_once(fetching: Api, world: World) -> None:
    world.serve("/bad.jsonl", rows(3) + b'{"question": "q"}\n')
    data = given_rows(30)
    data["rows"][12]["answer"] = ""
    data["rows"][20] = 5
    before = (fetching.count("jobs"), fetching.count("datasets"), fetching.kept())

    answer = fetching.post(a_job(dataset=data, validation_dataset=source("/bad.jsonl"), recipe="best"))

    assert answer.status_code == 422
    assert codes(answer) == {
        "/recipe": "config.unknown_name",
        "/dataset/rows/12/answer": "row.empty",
        "/dataset/rows/20": "row.not_object",
        "/validation_dataset/answer": "row.missing_field",
    }
    assert [fault.get("line") for fault in answer.json()["errors"]] == [None, None, None, 4]
    assert (fetching.count("jobs"), fetching.count("datasets"), fetching.kept()) == before
    assert fetching.uploading() == []


@pytest.mark.parametrize("path", ["/jobs", "/estimates", "/jobs?dry_run=true"])
def test_a_source_that_cannot_be_had_is_named_at_its_place(fetching: Api, path: str) -> None:
    refused = {"source": {"type": "https", "url": "https://elsewhere.org/x"}}
    wrong = {"source": {"type": "hf", "repo": "one", "path": "x.jsonl", "revision": "0" * 40}}

    answer = fetching.http.post(path, json=a_job(dataset=refused, validation_dataset=wrong))

    assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid")
    assert codes(answer) == {"/dataset/source": "source.refused", "/validation_dataset/source": "source.invalid"}


def test_a_host_that_fails_is_no_fault_of_a_job_without_others(fetching: Api) -> None:
    alone = fetching.post(a_job(dataset=source("/none"), validation_dataset=source("/neither")))
    among = fetching.post(a_job(dataset=source("/none"), recipe="best"))

    assert (alone.status_code, alone.json()["code"], alone.json()["retryable"]) == (502, "source.failed", True)
    assert set(codes(alone)) == {"/dataset/source", "/validation_dataset/source"}
    assert (among.status_code, among.json()["code"]) == (422, "request.invalid")
    assert codes(among) == {"/recipe": "config.unknown_name", "/dataset/source": "source.failed"}


WRONG: dict[str, tuple[Any, dict[str, str]]] = {
    "a number": (5, {"/dataset": "field.dataset_type"}),
    "an object with neither": ({}, {"/dataset/source": "field.missing"}),
    "an object with both": (
        {**given_rows(30), **source("/x")},
        {"/dataset/source": "field.extra_forbidden"},
    ),
    "a source without its URL": ({"source": {"type": "https"}}, {"/dataset/source/url": "field.missing"}),
    "a source of no type": ({"source": {"type": "ftp"}}, {"/dataset/source": "field.union_tag_invalid"}),
    "rows that are no list": ({"rows": "x"}, {"/dataset/rows": "field.list_type"}),
    "no rows": ({"rows": []}, {"/dataset/rows": "dataset.empty"}),
    "a column that is not there": (
        {**given_rows(30), "mapping": {"question": "Q"}},
        {"/dataset/rows": "mapping.no_such_column"},
    ),
    "a mapping of nothing": ({**given_rows(30), "mapping": {"Q": "question"}}, {"/dataset/mapping/Q": "mapping.invalid"}),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_dataset_of_a_job_is_refused_for(api: Api, what: str) -> None:
    dataset, faults = WRONG[what]

    answer = api.post(a_job(dataset=dataset))

    assert (answer.status_code, codes(answer)) == (422, faults), answer.text


def test_a_mapping_holds_for_rows_the_jobs_own_or_their_own(api: Api) -> None:
    german = [{"Frage": f"{i}?", "Antwort": str(i)} for i in range(30)]
    french = [{"Q": f"{i}?", "R": str(i)} for i in range(50, 60)]

    answer = api.post(
        a_job(
            dataset={"rows": german},
            validation_dataset={"rows": french, "mapping": {"prompt": "Q", "answer": "R"}},
            mapping={"prompt": "Frage", "answer": "Antwort"},
        )
    )

    assert answer.status_code == 202, answer.text


def test_a_dry_run_over_rows_stores_nothing(api: Api) -> None:
    before = (api.count("datasets"), api.kept())

    answer = api.http.post("/jobs?dry_run=true", json=a_job(dataset=given_rows(40, start=300)))

    assert answer.status_code == 200, answer.text
    assert answer.json()["rows"]["train"] > 0
    assert (api.count("datasets"), api.kept(), api.uploading()) == (*before, [])


def test_rows_can_be_posted_as_a_dataset_and_be_refused_as_one(api: Api) -> None:
    made = api.http.post("/datasets", json=given_rows(5, start=400))
    bad = api.http.post("/datasets", json={"rows": [{"question": "q", "answer": "a"}, {"question": "q"}]})

    assert (made.status_code, made.json()["rows"]) == (201, 5)
    assert api.upload(rows(5, start=400)).json()["id"] == made.json()["id"]
    assert codes(bad) == {"/rows/1/answer": "row.missing_field"}


def test_more_rows_than_a_json_body_may_have_are_refused_before_they_are_read(api: Api) -> None:
    answer = api.post(a_job(dataset=given_rows(2000)))

    assert (answer.status_code, answer.json()["code"]) == (413, "request.too_large")


def test_a_clone_may_be_of_other_rows(api: Api) -> None:
    job = api.job()

    answer = api.http.post(f"/jobs/{job}/clone", json={"dataset": given_rows(40, start=500)})

    assert answer.status_code == 202, answer.text
    assert answer.json()["dataset_id"] != api.http.get(f"/jobs/{job}").json()["dataset_id"]


def test_a_job_that_comes_again_fetches_nothing_again(fetching: Api, world: World) -> None:
    world.serve("/once-for-a-job.jsonl", rows(40, start=600))
    body = a_job(dataset=source("/once-for-a-job.jsonl"))
    first = fetching.post(body, **{"Idempotency-Key": "a-job-by-source"})
    asked = len(world.asked)

    again = fetching.post(body, **{"Idempotency-Key": "a-job-by-source"})

    assert (again.json(), len(world.asked)) == (first.json(), asked)
