"""Laws of conditional requests on single things: who has one is not sent it again, who has not seen it changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from app.core.keys import make_key
from app.db.ids import new_id
from app.db.projects import DEFAULT_PROJECT
from app.settings import Settings
from tests.app.conftest import MODEL, Api, described, serving

WRONG = '"0123456789abcdef0123456789abcdef"'
CHANGED = {"artifacts": {"artifact_ttl": 3600}, "webhooks": {"description": "moved"}}
"""What a PATCH changes."""


@pytest.fixture(scope="module")
def api(module_settings: Settings) -> Iterator[Api]:
    """A service that may name receivers, asked with an admin's key: it has keys then."""
    with serving(module_settings.model_copy(update={"webhook_hosts": ("hooks.example",)})) as api:
        with api.engine.begin() as conn:
            _, text = make_key(conn, api.settings, project_id=DEFAULT_PROJECT, scope="admin")
        api.http.headers["Authorization"] = f"Bearer {text}"
        yield api


@pytest.fixture(scope="module")
def make(api: Api) -> Callable[[str], str]:
    """Makes a thing of a kind that nothing holds, and gives its path."""
    used: set[str] = set()

    def of_a_job(room: str) -> str:
        job_id = api.job(reuse="never")
        api.finish(job_id)
        job, files = api.http.get(f"/jobs/{job_id}").json(), api.http.get(f"/jobs/{job_id}/artifacts").json()["data"]
        report = next(file["id"] for file in files if file["name"] == "report.json")
        return str({"head-maps": job["head_map"], "selections": job["selection"], "artifacts": report}[room])

    def a_key() -> str:
        return str(api.http.post("/keys", json={"scope": "read"}).json()["id"])

    def a_webhook() -> str:
        return str(api.http.post("/webhooks", json={"url": "https://hooks.example/p2d"}).json()["id"])

    def a_comparison() -> str:
        jobs = [api.job(reuse="never") for _ in range(2)]
        return str(api.http.post("/comparisons", json={"job_ids": jobs}).json()["id"])

    def make(room: str) -> str:
        makers: dict[str, Callable[[], str]] = {
            "datasets": lambda: api.dataset(start=1000 * (1 + len(used))),
            "keys": a_key,
            "uploads": lambda: api.http.post("/uploads", json={"size_bytes": 9}).json()["id"],
            "comparisons": a_comparison,
            "reports": lambda: api.upload(b"{").json()["report"].rpartition("/")[2],
            "webhooks": a_webhook,
        }
        thing = makers[room]() if room in makers else of_a_job(room)
        used.add(thing)
        return f"/{room}/{thing}"

    return make


ROOMS = ("datasets", "head-maps", "selections", "artifacts", "webhooks", "keys", "uploads", "comparisons", "reports")


@pytest.mark.parametrize("room", ROOMS)
def test_a_thing_is_read_changed_and_deleted_as_it_was_seen_and_not_otherwise(
    api: Api, make: Callable[[str], str], room: str
) -> None:
    path = make(room)
    seen = api.http.get(path)

    def status(method: str, **headers: str) -> int:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return api.http.request(method, path, headers=named).status_code

    again = api.http.get(path, headers={"If-None-Match": seen.headers["ETag"]})
    assert (again.status_code, again.content, again.headers["ETag"]) == (304, b"", seen.headers["ETag"])
    assert status("GET", If_None_Match=f"{WRONG}, W/{seen.headers['ETag']}") == 304
    assert status("GET", If_None_Match=WRONG) == 200
    refused = api.http.delete(path, headers={"If-Match": WRONG})
    assert (refused.status_code, refused.json()["code"]) == (412, "request.precondition_failed")
    assert refused.json()["facts"]["etag"] == seen.headers["ETag"]
    assert status("DELETE", If_Match=f"W/{seen.headers['ETag']}") == 412  # a weak tag is no proof
    assert api.http.get(path).json() == seen.json()
    etag = changed_tag(api, path, CHANGED[room], seen.headers["ETag"]) if room in CHANGED else seen.headers["ETag"]
    assert status("DELETE", If_Match=f"{WRONG}, {etag}") in (200, 204)


def changed_tag(api: Api, path: str, change: Any, etag: str) -> str:
    """PATCH under conditions; the ETag afterwards."""
    assert api.http.patch(path, json=change, headers={"If-Match": WRONG}).status_code == 412
    changed = api.http.patch(path, json=change, headers={"If-Match": etag})
    assert changed.status_code == 200, changed.text
    assert changed.headers["ETag"] != etag
    assert changed.headers["ETag"] == api.http.get(path).headers["ETag"]
    assert api.http.patch(path, json=change, headers={"If-Match": etag}).status_code == 412
    return str(changed.headers["ETag"])


@pytest.mark.parametrize("room", ROOMS)
def test_what_is_not_there_matches_nothing(api: Api, room: str) -> None:
    prefix = {
        "datasets": "ds",
        "head-maps": "hm",
        "selections": "sel",
        "artifacts": "art",
        "webhooks": "wh",
        "keys": "key",
    }
    prefix |= {"uploads": "upl", "comparisons": "cmp", "reports": "rep"}
    path = f"/{room}/{new_id(prefix[room])}"

    assert api.http.get(path, headers={"If-None-Match": "*"}).status_code == 404
    assert api.http.delete(path, headers={"If-Match": "*"}).status_code == 404


def test_a_selection_at_another_ratio_has_another_etag(api: Api, make: Callable[[str], str]) -> None:
    path = make("selections")
    whole = api.http.get(path).headers["ETag"]

    # By `uniform`, which has no views of a part.
    assert api.http.get(path, params={"ratio": 1}, headers={"If-None-Match": whole}).status_code == 200


def test_a_model_that_is_still_installed_is_not_sent_again(api: Api) -> None:
    seen = api.http.get(f"/models/{MODEL}")

    assert api.http.get(f"/models/{MODEL}", headers={"If-None-Match": seen.headers["ETag"]}).status_code == 304
    assert api.http.get(f"/models/{MODEL}", headers={"If-None-Match": WRONG}).json() == seen.json()


def test_what_can_be_read_on_condition_is_changed_and_deleted_on_condition() -> None:
    conditional = {form.pattern for form, operations in described() if takes(operations.get("get"), "if-none-match")}
    assert len(conditional) >= 2 + len(ROOMS)
    for form, operations in described():
        for method in {"patch", "delete"} & operations.keys() if form.pattern in conditional else ():
            assert takes(operations[method], "if-match"), f"{method} {form.pattern}"
            assert "412" in operations[method]["responses"], f"{method} {form.pattern}"


def takes(operation: Any, header: str) -> bool:
    return operation is not None and any(one["name"] == header for one in operation.get("parameters", ()))
