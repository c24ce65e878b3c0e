"""GET /jobs: every filter, both orders and the link to the next page."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.app.conftest import Api, a_job


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
