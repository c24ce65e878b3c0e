"""Laws of errors: one shape, one catalogue, one status for each code, and nothing secret in any of them."""

from __future__ import annotations

import json
import re

import httpx
import pytest

from app.problems import STATUS, catalogue, problem_body
from p2d.errors import ErrorDetail, P2DError
from tests.app.conftest import Api


def subclasses(cls: type[P2DError]) -> list[type[P2DError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in subclasses(child))]


def of_the_product(cls: type[P2DError]) -> bool:
    return cls.__module__.split(".")[0] in {"p2d", "app", "workers"}


def test_every_error_has_a_status_and_every_status_an_error() -> None:
    codes = {cls.code for cls in subclasses(P2DError) if of_the_product(cls)}

    assert codes == set(STATUS)
    assert set(catalogue()) >= codes


def test_every_error_says_what_it_is_and_what_to_do_next() -> None:
    for cls in filter(of_the_product, subclasses(P2DError)):
        assert cls.__doc__, cls
        assert cls.__doc__.splitlines()[0].endswith("."), cls
        assert len(cls.hint) > 10, cls
        assert re.fullmatch(r"[a-z_]+\.[a-z_]+", cls.code), cls
        status = STATUS[cls.code]
        if status < 500 and cls.code != "idempotency.in_flight" and not cls.code.startswith("limit."):
            assert cls.fault in {"user", "service"}, cls


def test_a_problem_is_rfc_9457_and_leaves_out_what_is_not_known() -> None:
    error = P2DError("Text.", errors=[ErrorDetail(code="x.y", message="m", line=3)], count=2)

    assert problem_body(error.to_json(), instance="/jobs/job_1", request_id="r") == {
        "type": "/errors/internal.error",
        "title": "A mistake of our own; also the base of all errors that a user may see",
        "status": 500,
        "detail": "Text.",
        "instance": "/jobs/job_1",
        "code": "internal.error",
        "fault": "service",
        "retryable": True,
        "hint": "Report this with the request id.",
        "errors": [{"code": "x.y", "message": "m", "line": 3}],
        "errors_total": 1,
        "facts": {"count": 2},
        "request_id": "r",
    }


def is_problem(answer: httpx.Response) -> bool:
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert {
        "type",
        "title",
        "status",
        "detail",
        "instance",
        "code",
        "fault",
        "retryable",
        "hint",
        "errors",
        "request_id",
    } <= set(body)
    assert body["status"] == answer.status_code == STATUS[body["code"]]
    assert body["request_id"] == answer.headers["x-request-id"]
    return True


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/jobs/", 404),
        ("GET", "/%00", 404),
        ("GET", "/%ff/%2e%2e/x", 404),
        ("DELETE", "/jobs", 405),
        ("PATCH", "/healthz", 405),
        ("GET", "/jobs?limit=0", 422),
        ("GET", "/jobs?limit=x&status=done", 422),
        ("GET", "/jobs?cursor=%00", 422),
        ("GET", "/head-maps?base_model=%00", 422),
        ("GET", "/selections?dataset=a%00&scorer=%00", 422),
        ("GET", "/head-maps/hm_01jd8m4q6t0000000000000000/diff?with=%00", 422),
        ("GET", "/audit?object=%00", 422),
        ("GET", "/models/..%2f..", 404),
        ("GET", "/models/%00", 404),
        ("POST", "/jobs", 415),
    ],
)
def test_whatever_goes_wrong_is_a_problem(api: Api, method: str, path: str, status: int) -> None:
    answer = api.http.request(method, path)

    assert answer.status_code == status
    assert is_problem(answer)


def test_a_wrong_method_is_told_the_right_ones(api: Api) -> None:
    assert api.http.delete("/jobs").headers["allow"] == "GET, POST"
    assert api.http.post("/healthz").headers["allow"] == "GET"


def test_a_request_keeps_the_name_that_its_caller_gave(api: Api) -> None:
    named = api.http.get("/nowhere", headers={"X-Request-Id": "mine-1"})
    unnamed = api.http.get("/nowhere", headers={"X-Request-Id": "a b\\c"})

    assert named.json()["request_id"] == named.headers["x-request-id"] == "mine-1"
    assert unnamed.json()["request_id"].startswith("req_")


def test_an_error_of_our_own_is_a_problem_without_its_insides(api: Api) -> None:
    with api.engine.begin() as conn:
        conn.exec_driver_sql("revoke select on jobs from p2d_api")
    try:
        answer = api.http.get("/jobs")
    finally:
        with api.engine.begin() as conn:
            conn.exec_driver_sql("grant select on jobs to p2d_api")

    assert is_problem(answer)
    assert (answer.status_code, answer.json()["code"]) == (500, "internal.error")
    assert answer.headers["connection"] == "close"  # uvicorn cuts it: nothing more is to be sent on it
    assert not re.search(r"permission|table|Traceback|psycopg", answer.text)


def test_all_problems_of_a_query_are_listed_without_what_was_sent(api: Api) -> None:
    answer = api.http.get("/jobs", params={"limit": "secret", "status": "sensitive"})

    assert {fault["pointer"] for fault in answer.json()["errors"]} == {"/query/limit", "/query/status"}
    assert "secret" not in json.dumps(answer.json())
    assert "sensitive" not in json.dumps(answer.json())


def test_a_query_parameter_that_a_path_does_not_have_is_refused_with_the_one_that_was_meant(api: Api) -> None:
    answer = api.http.get("/jobs", params={"statsu": "failed", "limit": "0", "metadata[team]": "a", "x y": "1"})

    faults = {fault["pointer"]: fault["message"] for fault in answer.json()["errors"]}
    assert (answer.status_code, answer.json()["code"]) == (422, "request.invalid")
    assert faults.keys() == {"/query/statsu", "/query/limit", "/query"}  # a name that is no name is not said again
    assert faults["/query/statsu"].endswith("did you mean 'status'?")

    for path in (
        "/jobs/job_0/events?afer=1",
        "/datasets?metadata[team]=a",
        "/healthz?verbose",
        "/models?=",
        "/metrics?a=b",
    ):
        assert api.http.get(path).json()["code"] == "request.invalid", path
    assert api.http.post("/datasets?dry_run=true", files={"file": ("a.jsonl", b"{}" * 1_000_000)}).status_code == 422
    assert api.http.get("/jobs", params={"metadata[team]": "a", "status": "failed"}).status_code == 200


def test_a_query_parameter_that_is_sent_twice_is_refused(api: Api) -> None:
    answer = api.http.get("/jobs?status=failed&limit=0&status=queued&q=a&q=a")

    faults = {fault["pointer"]: fault["code"] for fault in answer.json()["errors"]}
    assert answer.status_code == 422
    assert faults.keys() == {"/query/limit", "/query/q", "/query/status"}
    assert faults["/query/q"] == faults["/query/status"] == "field.given_twice"
    assert api.http.get("/jobs?metadata[team]=a&metadata[site]=a").status_code == 200


def test_the_type_of_a_problem_leads_to_a_page_about_it(api: Api) -> None:
    problem = api.http.get("/jobs/job_none").json()
    assert (problem["type"], problem["instance"]) == ("/errors/job.not_found", "/jobs/job_none")

    told = api.http.get(problem["type"]).json()
    assert {name: told[name] for name in ("code", "status", "fault", "retryable", "hint")} == {
        name: problem[name] for name in ("code", "status", "fault", "retryable", "hint")
    }
    page = api.http.get(problem["type"], headers={"Accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html")
    assert told["meaning"] in page.text

    assert all(api.http.get(f"/errors/{code}").status_code == 200 for code in list(STATUS)[::10])
    assert api.http.get("/errors/no.such").json()["code"] == "resource.not_found"


def test_a_fault_says_where_it_is_what_was_expected_and_what_came(api: Api) -> None:
    broken = api.http.post(
        "/jobs", content=b'{"kind": "adapt",\n "name": }', headers={"Content-Type": "application/json"}
    )
    assert broken.status_code == 400
    assert [(fault["line"], fault["column"]) for fault in broken.json()["errors"]] == [(2, 10)]

    wrong = {
        "kind": "adpat",
        "base_model": 5,
        "dataset": "ds_1",
        "name": "secret" * 40,
        "priority": 99,
        "controls": ["x"],
    }
    faults = {fault["pointer"]: fault for fault in api.post(wrong).json()["errors"]}
    told = {pointer: (fault.get("expected"), fault.get("got")) for pointer, fault in faults.items()}
    assert told["/kind"][1] == "'adpat'"  # nearly one of the words
    assert told["/name"] == ("at most 200 characters", "text of length 240")
    assert told["/base_model"] == ("text", "a number")
    assert told["/priority"] == ("at most 10", "99")
    assert told["/controls/0"][1] == "text"
    assert (
        api.post({"kind": "adapt", "base_model": "stub", "dataset": "ds_1", "heads": {"ratio": 2}}).json()["errors"][0][
            "got"
        ]
        == "2.0"
    )

    rows = b'{"question": "secret", "answer": 5}\n[1]\n{"question": "a" "b"}\n'
    told_rows = [
        (fault["line"], fault.get("column"), fault.get("expected"), fault.get("got"))
        for fault in api.upload(rows).json()["errors"]
    ]
    assert told_rows == [
        (1, None, "text", "a number"),
        (2, None, "an object", "a list"),
        (3, 18, None, None),
    ]
