"""The law of a wrong request for a job: one answer names all that is wrong with it, whatever else is, and nothing that is right."""

from __future__ import annotations

from typing import Any

import pytest

from tests.app.conftest import Api, a_job, rows
from tests.app.test_jobs import codes

UNREAD: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "an unknown field": ({"foo": 1}, {"/foo": "field.extra_forbidden"}),
    "an unknown field of a group": ({"heads": {"rato": 1}}, {"/heads/rato": "field.extra_forbidden"}),
    "a number out of bounds": ({"priority": 99}, {"/priority": "field.less_than_equal"}),
    "a text for a number": ({"training": {"seed": "x"}}, {"/training/seed": "field.int_type"}),
    "no text": ({"metadata": {"a": 5}}, {"/metadata/a": "field.string_type"}),
    "no group": ({"limits": 5}, {"/limits": "field.model_type"}),
}


@pytest.mark.parametrize("path", ["/jobs", "/jobs?dry_run=true", "/estimates", "/head-maps", "/selections"])
@pytest.mark.parametrize("what", UNREAD)
def test_a_field_that_cannot_be_read_hides_no_name_that_is_unknown(api: Api, what: str, path: str) -> None:
    wrong, faults = UNREAD[what]
    names = {"base_model": "nobody", "dataset": "ds_x", "validation_dataset": "ds_y", "webhooks": ["wh_x"]}

    answer = api.http.post(path, json={**names, **wrong})

    assert answer.status_code == 422
    assert codes(answer) == {
        **faults,
        "/base_model": "model.not_found",
        "/dataset": "dataset.not_found",
        "/validation_dataset": "dataset.not_found",
        "/webhooks/0": "webhook.not_found",
    }
    assert answer.json()["errors_total"] == 5


@pytest.mark.parametrize("path", ["/jobs", "/jobs?dry_run=true", "/estimates"])
@pytest.mark.parametrize("unknown", [{"base_model": "nobody"}, {"dataset": "ds_x"}, {"kind": "x"}, {"base_model": 5}])
def test_no_name_that_is_unknown_hides_another(api: Api, path: str, unknown: dict[str, Any]) -> None:
    names = {"heads": {"head_map": "hm_x"}, "data": {"selection": "sel_x"}}

    answer = api.http.post(path, json=a_job(**{"dataset": api.dataset(), **names, **unknown}))

    assert answer.status_code == 422
    told = codes(answer)
    assert told.keys() == {"/heads/head_map", "/data/selection", f"/{next(iter(unknown))}"}
    assert (told["/heads/head_map"], told["/data/selection"]) == ("head_map.not_found", "selection.not_found")


def test_a_field_that_cannot_be_read_hides_no_bad_row_of_a_file_and_its_report(api: Api) -> None:
    lines = rows(10).splitlines(keepends=True)
    lines[3] = b'{"question": "q", "answer": ""}\n'
    before = (api.count("jobs"), api.count("datasets"), api.kept())

    answer = api.send(a_job(foo=1, heads={"ratio": 2.0}), b"".join(lines))

    assert codes(answer) == {
        "/foo": "field.extra_forbidden",
        "/heads/ratio": "config.ratio",
        "/dataset/answer": "row.empty",
    }
    assert api.http.get(answer.json()["report"]).json()["errors_by_code"] == {"row.empty": 1}
    assert (api.count("jobs"), api.count("datasets"), api.kept()) == before


def test_a_good_file_beside_a_field_that_cannot_be_read_is_not_stored(api: Api) -> None:
    before = (api.count("jobs"), api.count("datasets"), api.stored())

    answer = api.send(a_job(foo=1), rows(30, start=7_000))

    assert codes(answer) == {"/foo": "field.extra_forbidden"}
    assert (api.count("jobs"), api.count("datasets"), api.stored()) == before


def test_nothing_is_said_against_what_depends_on_a_field_that_cannot_be_read(api: Api) -> None:
    content = b"".join(b'{"Frage": "What is %d + 1?", "Antwort": "%d"}\n' % (i, i + 1) for i in range(20))

    mapping = api.send(a_job(mapping={"prompt": "Frage", "completion": 5}), content)
    held_out = api.post(a_job(dataset=api.dataset(4), validation_dataset=5))
    both = api.send(a_job(dataset=5), rows(20))

    assert codes(mapping) == {"/mapping/completion": "field.string_type"}
    assert codes(held_out) == {"/validation_dataset": "field.dataset_type"}
    assert {fault["code"] for fault in both.json()["errors"]} == {"field.dataset_type", "field.given_twice"}


def test_a_job_with_a_fault_is_never_answered_as_the_one_without_it(api: Api) -> None:
    body, headers = a_job(dataset=api.dataset()), {"Idempotency-Key": "no-fault"}
    assert api.post(body, **headers).status_code == 202

    answer = api.post({**body, "foo": 1}, **headers)

    assert (answer.status_code, codes(answer)) == (422, {"/foo": "field.extra_forbidden"})
