"""What /metrics says: the ledger as it is, from every process alike, and counters that never fall."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Receive, Scope, Send

from app.api.metrics import Requests
from app.core.keys import make_key
from app.db.projects import open_project
from app.settings import Settings
from tests.app.conftest import Api, serving

HTTP = "p2d_http_"


def scrape(api: Api) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, sorted labels) -> value of every sample."""
    answer = api.http.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = list(text_string_to_metric_families(answer.text))
    assert all(family.documentation for family in families)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(api: Api, name: str, **labels: str) -> float | None:
    """One sample."""
    return scrape(api).get((name, tuple(sorted(labels.items()))))


@pytest.fixture(scope="module")
def second(module_settings: Settings) -> Iterator[Api]:
    """Another API process on the same servers."""
    with serving(module_settings) as api:
        yield api


def test_a_waiting_job_is_seen_with_its_age_and_a_finished_one_with_its_seconds(api: Api) -> None:
    queue = api.settings.worker_queue
    before = scrape(api)
    job_id = api.job()
    assert value(api, "p2d_jobs", status="queued") == 1
    assert value(api, "p2d_steps_ready", queue=queue) == 1
    assert 0 <= (value(api, "p2d_steps_ready_oldest_seconds", queue=queue) or 0) < 60

    api.finish(job_id)

    after = scrape(api)
    assert after["p2d_jobs", (("status", "succeeded"),)] == before.get(("p2d_jobs", (("status", "succeeded"),)), 0) + 1
    assert after["p2d_steps_ready", (("queue", queue),)] == 0  # and not without a value
    assert after["p2d_steps_ready_oldest_seconds", (("queue", queue),)] == 0
    assert after["p2d_steps_running", ()] == 0
    assert after["p2d_attempts_total", (("code", ""), ("outcome", "done"), ("step", "train"))] == 1
    assert after["p2d_step_seconds_count", (("step", "train"),)] == 1
    assert after["p2d_step_seconds_bucket", (("le", "+Inf"), ("step", "train"))] == 1
    assert 0 < after["p2d_step_seconds_sum", (("step", "train"),)] < 60
    assert after["p2d_estimate_ratio_count", (("step", "train"),)] == 1
    assert after["p2d_uploaded_bytes_total", ()] > 0
    assert after["p2d_store_objects", ()] >= len({one["sha256"] for one in artifacts_of(api, job_id)})
    assert after["p2d_store_bytes", ()] > 0


def artifacts_of(api: Api, job_id: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = api.http.get(f"/jobs/{job_id}/artifacts").json()["data"]
    return found


def test_every_process_says_the_same_of_the_ledger(api: Api, second: Api) -> None:
    api.finish(api.job())

    def ledger(of: Api) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        return {key: number for key, number in scrape(of).items() if not key[0].startswith(HTTP)}

    assert ledger(api) == ledger(second)


def test_counters_do_not_fall_when_a_job_is_deleted(api: Api) -> None:
    job_ids = [api.job() for _ in range(2)]
    api.finish(*job_ids)
    before = scrape(api)
    for job_id in job_ids:
        assert api.http.delete(f"/jobs/{job_id}").is_success

    after = scrape(api)

    kinds = ("_total", "_bucket", "_count", "_sum")
    counters = {key: number for key, number in before.items() if key[0].endswith(kinds) and not key[0].startswith(HTTP)}
    assert len(counters) > 50
    assert {key: after.get(key) for key in counters} == pytest.approx(counters)


def test_requests_are_counted_by_the_template_of_their_route(api: Api) -> None:
    job_id = api.job()
    count = {"route": "/jobs/{id}", "method": "GET", "status": "2xx"}
    before = value(api, "p2d_http_requests_total", **count) or 0

    for _ in range(3):
        api.http.get(f"/jobs/{job_id}")
    api.http.get("/jobs/nobody")
    for number in range(3):
        api.http.get(f"/made/up/{number}")

    after = scrape(api)
    assert value(api, "p2d_http_requests_total", **count) == before + 3
    assert value(api, "p2d_http_requests_total", **{**count, "status": "4xx"}) >= 1  # type: ignore[operator]
    assert value(api, "p2d_http_requests_total", route="none", method="GET", status="4xx") == 3
    assert not any("made" in str(key) or job_id in str(key) for key in after)
    assert after["p2d_http_request_seconds_count", (("method", "GET"), ("route", "/jobs/{id}"))] >= before + 4


def test_a_request_that_breaks_inside_is_counted_as_5xx() -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError

    registry = CollectorRegistry()
    counting = Requests(broken, registry)

    with pytest.raises(ValueError):  # noqa: PT011 - it is passed on as it came
        asyncio.run(counting({"type": "http", "method": "BREW"}, None, None))  # type: ignore[arg-type]

    labels = {"route": "none", "method": "other", "status": "5xx"}
    assert registry.get_sample_value("p2d_http_requests_total", labels) == 1


def test_who_administers_another_project_does_not_see_the_sum_of_all(second: Api) -> None:
    with second.engine.begin() as conn:
        keys = {
            name: make_key(conn, second.settings, project_id=open_project(conn, name), scope="admin")[1]
            for name in ("default", "another")
        }

    answers = {
        name: second.http.get("/metrics", headers={"Authorization": f"Bearer {key}"}) for name, key in keys.items()
    }

    assert {name: answer.status_code for name, answer in answers.items()} == {"default": 200, "another": 403}
    assert "p2d_jobs" in answers["default"].text
    assert answers["another"].json()["code"] == "auth.not_allowed"
