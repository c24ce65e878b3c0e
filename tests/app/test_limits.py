"""Laws of rates and quotas: a project that has had enough is told so and when to come back; another does not notice."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from app.core.rates import Rates
from app.settings import Settings
from tests.app.conftest import Api, a_job, rows, serving
from tests.app.test_tenants import authorized, key
from tests.app.test_uploads import begin, complete, send
from tests.rig import wait_for
from tests.s3_server import free_ports

LIMITS = {"project_streams": 2, "rate_per_minute": 40, "quota_jobs": 2, "quota_bytes": 40_000, "quota_rows": 200}


@pytest.fixture(scope="module")
def limited(module_settings: Settings) -> Iterator[Api]:
    more = {**LIMITS, "webhook_hosts": ("hooks.example",)}
    with serving(Settings.model_validate({**module_settings.model_dump(), **more})) as api:
        yield api


@pytest.fixture
def lab(limited: Api, request: pytest.FixtureRequest) -> Iterator[Api]:
    """The service as a project of this test alone sees it."""
    with authorized(limited, key(limited.engine, limited.settings, request.node.name, "write")):
        yield limited


def left(answer: httpx.Response) -> int:
    match = re.fullmatch(r'"minute";r=(\d+);t=(\d+)', answer.headers["ratelimit"])
    assert match is not None
    return int(match[1])


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"], body["fault"], body["retryable"]) == (status, code, "capacity", True)
    return body


def test_many_jobs_posted_in_one_moment_are_no_more_than_the_quota(lab: Api) -> None:
    body = a_job(dataset=lab.dataset(20))
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: lab.http.post("/jobs", json=body), range(12)))

    made = [answer for answer in answers if answer.is_success]
    assert len(made) == 2
    for answer in answers:
        if answer not in made:
            refused(answer, 429, "limit.jobs")


def test_the_request_too_many_is_told_when_to_come_back_and_no_other_project_notices(limited: Api, lab: Api) -> None:
    first = lab.http.get("/jobs")
    assert first.headers["ratelimit-policy"] == '"minute";q=40;w=60'
    assert [left(lab.http.get("/jobs")) for _ in range(2)] == [left(first) - 1, left(first) - 2]

    answers = [lab.http.get("/jobs") for _ in range(60)]

    assert sum(answer.is_success for answer in answers) >= 37
    last = next(answer for answer in answers if not answer.is_success)
    refused(last, 429, "limit.requests")
    assert 1 <= int(last.headers["retry-after"]) <= 60
    assert left(last) == 0
    other = {"Authorization": f"Bearer {key(limited.engine, limited.settings, 'another', 'read')}"}
    assert lab.http.get("/jobs", headers=other).status_code == 200


def test_an_upload_that_comes_too_soon_gets_its_answer_and_no_reset(lab: Api) -> None:
    for _ in range(45):
        lab.http.get("/jobs")

    refused(lab.http.post("/datasets", files={"file": ("big.jsonl", b"x" * 2_900_000)}), 429, "limit.requests")


def test_api_processes_count_together_and_each_alone_while_the_broker_is_away(limited: Api) -> None:
    url = limited.settings.url("broker_url")
    one, two = (Rates(url, per_minute=5) for _ in range(2))
    assert [rates.take("p")[0] for rates in (one, two, one, two, one, two, one)] == [True] * 5 + [False] * 2

    away = Rates(f"redis://127.0.0.1:{free_ports(1)[0]}/0", per_minute=5)
    assert [away.take("p")[0] for _ in range(7)] == [True] * 5 + [False] * 2


def test_no_more_jobs_than_the_quota_wait_at_once(lab: Api) -> None:
    dataset = lab.dataset()
    first, second = (lab.post(a_job(dataset=dataset)).json()["id"] for _ in range(2))

    answer = lab.post(a_job(dataset=dataset))
    assert refused(answer, 429, "limit.jobs")["facts"]["limit"] == 2
    assert answer.headers["retry-after"] == "60"
    refused(lab.http.post(f"/jobs/{first}/clone"), 429, "limit.jobs")

    assert lab.http.post(f"/jobs/{first}/cancel").json()["status"] == "cancelled"
    assert lab.post(a_job(dataset=dataset)).status_code == 202
    refused(lab.http.post(f"/jobs/{first}/retry"), 429, "limit.jobs")
    assert second != first


def test_a_refused_job_leaves_no_dataset_behind(lab: Api) -> None:
    for start in (0, 1):
        assert lab.send(a_job(), rows(60, start=start)).status_code == 202
    before = lab.count("datasets")

    refused(lab.send(a_job(), rows(60, start=2)), 429, "limit.jobs")

    assert lab.count("datasets") == before


def test_rows_above_the_quota_are_refused_until_others_are_deleted(lab: Api) -> None:
    kept = lab.dataset(150)
    body = refused(lab.upload(rows(60, start=500)), 429, "limit.storage")
    assert body["facts"] == {"what": "rows", "used": 150, "more": 60, "limit": 200}
    assert lab.upload(rows(150)).json()["deduplicated"]  # what is there already is no more of it

    assert lab.http.delete(f"/datasets/{kept}").is_success

    assert lab.upload(rows(60, start=500)).status_code == 201


def test_datasets_of_one_moment_are_together_no_more_rows_than_the_quota(lab: Api) -> None:
    lab.dataset(140)
    files = [rows(25, start=1000 * number) for number in range(1, 13)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lab.upload, files))

    made = [answer for answer in answers if answer.is_success]
    assert len(made) == 2
    for answer in answers:
        if answer not in made:
            refused(answer, 429, "limit.storage")
    assert lab.http.get("/usage").json()["rows"] == 190


def test_uploads_begun_in_one_moment_are_together_no_more_bytes_than_the_quota(lab: Api) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: lab.http.post("/uploads", json={"size_bytes": 12_000}), range(12)))

    assert sum(answer.is_success for answer in answers) == 3
    assert lab.http.get("/usage").json()["stored_bytes"] == 36_000


def test_webhooks_made_in_one_moment_are_together_no_more_than_the_quota(lab: Api) -> None:
    admin = {"Authorization": f"Bearer {key(lab.engine, lab.settings, 'many webhooks', 'admin')}"}

    def make(number: int) -> httpx.Response:
        return lab.http.post("/webhooks", json={"url": f"https://hooks.example/{number}"}, headers=admin)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(make, range(30)))

    assert sum(answer.is_success for answer in answers) == lab.settings.quota_webhooks == 20
    for answer in answers:
        if not answer.is_success:
            refused(answer, 429, "limit.webhooks")


def test_bytes_above_the_quota_are_refused_before_they_are_sent(lab: Api) -> None:
    begun = lab.http.post("/uploads", json={"size_bytes": 39_000})
    assert begun.status_code == 201

    body = refused(lab.http.post("/uploads", json={"size_bytes": 2_000}), 429, "limit.storage")
    assert (body["facts"]["what"], body["facts"]["used"]) == ("bytes", 39_000)
    refused(lab.upload(rows(60)), 429, "limit.storage")

    assert lab.http.delete(f"/uploads/{begun.json()['id']}").is_success
    assert lab.upload(rows(60)).status_code == 201


def test_a_file_that_came_in_parts_takes_the_room_of_its_upload(lab: Api) -> None:
    content = rows(190, start=7000).replace(b"What", b"What" + b"!" * 90)
    assert len(content) > 0.55 * lab.settings.quota_bytes
    upload = begin(lab, content)
    send(lab, upload, content)

    answer = complete(lab, upload)

    assert answer.status_code == 201, answer.text
    refused(lab.http.post("/uploads", json={"size_bytes": 13_000}), 429, "limit.storage")


def test_usage_says_what_the_project_has_of_what_it_may(lab: Api) -> None:
    assert lab.post(a_job(dataset=lab.dataset(50))).status_code == 202
    assert lab.http.post("/uploads", json={"size_bytes": 1000}).status_code == 201

    usage = lab.http.get("/usage").json()

    stored = lab.http.get("/datasets").json()["data"][0]
    with lab.engine.connect() as conn:
        query = "select stored_bytes from datasets where id = %s"
        size = conn.exec_driver_sql(query, (stored["id"],)).scalar_one()
    assert usage == {
        "unfinished_jobs": 1,
        "unfinished_jobs_quota": 2,
        "stored_bytes": size + 1000,
        "stored_bytes_quota": 40_000,
        "rows": 50,
        "rows_quota": 200,
        "webhooks": 0,
        "estimate_errors": {},
        "webhooks_quota": 20,
        "requests_per_minute": 40,
    }


def test_a_project_that_holds_its_streams_open_gets_no_more_and_others_do(limited: Api, lab: Api) -> None:
    job_id, stream = lab.job(), {"Accept": "text/event-stream"}
    held: list[Iterator[str]] = []  # a stream whose reader is gone is closed
    with contextlib.ExitStack() as open_ones:
        for _ in range(2):
            opened = open_ones.enter_context(lab.http.stream("GET", f"/jobs/{job_id}/events", headers=stream))
            held.append(opened.iter_lines())
            next(held[-1])

        answer = lab.http.get(f"/jobs/{job_id}/events", headers=stream)

        assert refused(answer, 429, "limit.streams")["facts"]["limit"] == 2
        assert answer.headers["retry-after"] == "30"
        refused(lab.http.get(f"/jobs/{job_id}/events", params={"after": 1, "wait": 20}), 429, "limit.streams")
        assert lab.http.get(f"/jobs/{job_id}/events").is_success, "a page waits for nothing"
        with authorized(limited, key(limited.engine, limited.settings, "a third", "write")):
            other = limited.job()
            with limited.http.stream("GET", f"/jobs/{other}/events", headers=stream) as theirs:
                assert theirs.status_code == 200

    def again() -> bool:
        with lab.http.stream("GET", f"/jobs/{job_id}/events", headers=stream) as mine:
            return mine.status_code == 200

    wait_for(again, "the streams that were closed to be given back")
