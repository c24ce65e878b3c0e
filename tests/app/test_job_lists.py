"""GET /jobs: every filter, both orders, the link to the next page, and how long it takes among ten thousand jobs."""

from __future__ import annotations

import re
import statistics
import time
from typing import Any

import pytest

from tests.app.conftest import Api, a_job

MANY = 10_000
P95_S = 0.05


def ids(api: Api, **params: Any) -> list[str]:
    """The ids that a list gives, all pages of two."""
    found: list[str] = []
    url = "/jobs"
    query: dict[str, Any] | None = {"limit": 2, **params}
    while True:
        answer = api.http.get(url, params=query)
        assert answer.status_code == 200, answer.text
        found += [job["id"] for job in answer.json()["data"]]
        link = answer.headers.get("Link")
        assert (link is not None) == answer.json()["has_more"]
        if link is None:
            return found
        match = re.fullmatch(r'<(/jobs\?[^>]+)>; rel="next"', link)
        assert match is not None, link
        url, query = match.group(1), None


@pytest.fixture(scope="module")
def made(api: Api) -> dict[str, str]:
    """Four jobs that differ in everything that can be asked for."""
    first, other = api.dataset(), api.dataset(70, start=900)
    maps = str(api.post(a_job(dataset=other, kind="identify_heads")).json()["id"])
    api.finish(maps)  # before there are others that its worker would take too
    head_map = api.http.get(f"/jobs/{maps}").json()["head_map"]
    found = {
        "blue": api.post(a_job(dataset=first, name="Blue whale", metadata={"team": "blue", "run": "1"})),
        "red": api.post(a_job(dataset=first, name="red fox", metadata={"team": "red", "a.b": "x y"})),
        "other": api.post(a_job(dataset=other, kind="select_data", metadata={"team": "blue"})),
        "reader": api.post(a_job(dataset=other, heads={"head_map": head_map})),
    }
    made = {name: str(answer.json()["id"]) for name, answer in found.items()}
    return made | {"maps": maps, "head_map": head_map, "first": first}


def test_each_filter_lets_through_what_it_says(api: Api, made: dict[str, str]) -> None:
    blue, red, maps, other, reader = (made[name] for name in ("blue", "red", "maps", "other", "reader"))

    assert ids(api, dataset=made["first"]) == [red, blue]
    assert ids(api, head_map=made["head_map"]) == [reader, maps]
    assert ids(api, **{"metadata[team]": "blue"}) == [other, blue]
    assert ids(api, **{"metadata[team]": "blue", "metadata[run]": "1"}) == [blue]
    assert ids(api, **{"metadata[a.b]": "x y"}) == [red]
    assert ids(api, q="WHALE") == [blue]
    assert ids(api, q=red[-10:]) == [red]
    assert ids(api, q="100%") == []
    assert ids(api, stage="packaging") == [maps]
    assert ids(api, status="queued", kind="select_data") == [other]
    assert set(ids(api, base_model="stub")) >= {blue, red, maps, other}
    assert ids(api, base_model="nobody") == []


def test_the_oldest_come_first_where_that_is_asked(api: Api, made: dict[str, str]) -> None:
    newest = ids(api)

    assert ids(api, order="asc") == newest[::-1]
    assert ids(api, order="desc") == newest
    assert len(newest) >= 5


def test_a_range_of_time_has_its_beginning_and_not_its_end(api: Api, made: dict[str, str]) -> None:
    at = {name: api.http.get(f"/jobs/{made[name]}").json()["created_at"] for name in ("blue", "other")}

    found = ids(api, created_after=at["blue"], created_before=at["other"])

    assert found == [made["red"], made["blue"]]


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ("status=lost", "/query/status"),
        ("order=upwards", "/query/order"),
        ("created_after=1700000000", "/query/created_after"),
        ("created_after=2026-01-01T00:00:00", "/query/created_after"),
        ("metadata=blue", "/query/metadata"),
        ("metadata[team][x]=blue", "/query/metadata"),
        ("metadata[team]=a&metadata[team]=b", "/query/metadata"),
        ("metadata[team]=%00", "/query/metadata"),
        ("q=a%00", "/query/q"),
    ],
)
def test_a_filter_that_says_nothing_is_refused(api: Api, query: str, pointer: str) -> None:
    answer = api.http.get(f"/jobs?{query}")

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == pointer


def test_among_ten_thousand_jobs_a_page_takes_fifty_milliseconds_at_most(api: Api, made: dict[str, str]) -> None:
    copied = (
        "insert into jobs (id, project_id, kind, name, status, config, resolved, dataset_id, base_model, model_digest, "
        "metadata, created_at) select 'job_' || lpad(n::text, 26, '0'), j.project_id, j.kind, 'copy ' || n, 'succeeded', "
        "j.config, j.config, j.dataset_id, j.base_model, j.model_digest, "
        "jsonb_build_object('run', n::text), now() - interval '1 day' from jobs j, generate_series(1, %s) n where j.id = %s"
    )
    with api.engine.begin() as conn:
        conn.exec_driver_sql(copied, (MANY, made["blue"]))
    try:
        with api.engine.connect() as conn:
            conn.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("analyze jobs")
        asked: list[dict[str, Any]] = [
            {},
            {"limit": 100},
            {"status": "failed"},
            {"stage": "training"},
            {"kind": "identify_heads", "order": "asc"},
            {"base_model": "nobody"},
            {"dataset": "ds_none"},
            {"head_map": made["head_map"]},
            {"metadata[run]": "5000"},
            {"metadata[run]": "none"},
            {"q": "copy 7777"},
            {"q": "nothing like it"},
            {"created_before": "2020-01-01T00:00:00Z"},
        ]
        for params in asked:
            seconds = sorted(took(api, params) for _ in range(20))
            p95 = statistics.quantiles(seconds, n=20)[-1]
            print(f"{params}: median {statistics.median(seconds) * 1000:.1f} ms, p95 {p95 * 1000:.1f} ms")
            # The fastest of twenty, and twice as long where every job is looked at: a busy machine is late with some of
            # them, a missing index with all.
            assert seconds[0] <= P95_S * (1 if params.keys() <= {"limit", "status", "dataset"} else 2), params
    finally:
        with api.engine.begin() as conn:
            conn.exec_driver_sql("delete from jobs where id like 'job_0000000%%'")


def took(api: Api, params: dict[str, Any]) -> float:
    started = time.perf_counter()
    assert api.http.get("/jobs", params=params).status_code == 200
    return time.perf_counter() - started
