"""Laws of webhooks that a job names: they are told of it, those for named jobs of no other, and nobody is told twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.settings import Settings
from p2d.client import Client
from tests.app.conftest import Api, a_job, serving

NOWHERE = "wh_00000000000000000000000000"


@pytest.fixture(scope="module")
def api(module_settings: Settings) -> Iterator[Api]:
    """A service with webhooks whose receivers nobody asks: no worker sends while these tests run."""
    with serving(
        module_settings.model_copy(update={"webhook_hosts": ("hooks.example",), "quota_webhooks": 100})
    ) as api:
        yield api


def hook(api: Api, **fields: Any) -> str:
    """The id of a webhook that is told when a job is queued."""
    body = {"url": "https://hooks.example/p2d", "events": ["job.queued"], **fields}
    answer = api.http.post("/webhooks", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def told(api: Api, webhook_id: str) -> list[str]:
    """The jobs of which it is told, one for each message."""
    page = api.http.get(f"/webhooks/{webhook_id}/deliveries", params={"limit": 100}).json()
    return [one["job_id"] for one in reversed(page["data"])]


def test_a_webhook_for_named_jobs_is_told_of_those_that_name_it_alone(api: Api) -> None:
    mine, other, everybody = hook(api, jobs="named"), hook(api, jobs="named"), hook(api)

    unnamed = api.job()
    named = api.job(webhooks=[mine])

    assert told(api, mine) == [named]
    assert told(api, other) == []
    assert told(api, everybody) == [unnamed, named]


def test_whoever_is_named_twice_or_is_told_of_all_jobs_is_told_once(api: Api) -> None:
    mine, everybody = hook(api, jobs="named"), hook(api)

    job_id = api.job(webhooks=[mine, everybody, mine])

    assert told(api, mine) == [job_id]
    assert told(api, everybody) == [job_id]


def test_only_the_events_that_it_takes_are_told_and_a_retry_is_told_too(api: Api) -> None:
    ends = hook(api, jobs="named", events=["job.cancelled"])
    job_id = api.job(webhooks=[ends])
    assert told(api, ends) == []

    for move in ("cancel", "retry", "cancel"):
        assert api.http.post(f"/jobs/{job_id}/{move}").status_code == 202

    assert told(api, ends) == [job_id, job_id]


def test_a_job_shows_which_it_names_and_a_clone_names_the_same(api: Api) -> None:
    mine, later = hook(api, jobs="named"), hook(api, jobs="named")
    job_id = api.job(webhooks=[mine])

    copy = api.http.post(f"/jobs/{job_id}/clone").json()
    changed = api.http.post(f"/jobs/{job_id}/clone", json={"webhooks": [later]}).json()
    without = api.http.post(f"/jobs/{job_id}/clone", json={"webhooks": None}).json()

    assert api.http.get(f"/jobs/{job_id}").json()["webhooks"] == [mine]
    assert api.http.get(f"/jobs/{job_id}/config").json()["webhooks"] == [mine]
    assert [one["webhooks"] for one in (copy, changed, without)] == [[mine], [later], []]
    assert told(api, mine) == [job_id, copy["id"]]
    assert told(api, later) == [changed["id"]]


@pytest.mark.parametrize("path", ["/jobs", "/estimates", "/head-maps", "/selections"])
def test_a_webhook_that_is_not_there_is_refused_at_its_place(api: Api, path: str) -> None:
    body = a_job(dataset=api.dataset(), webhooks=[hook(api), NOWHERE])
    body = body if path in ("/jobs", "/estimates") else {name: body[name] for name in body if name != "kind"}
    before = api.count("jobs"), api.count("webhook_deliveries")

    answer = api.http.post(path, json=body)

    assert (answer.status_code, answer.json()["code"]) == (404, "webhook.not_found")
    assert [fault["pointer"] for fault in answer.json()["errors"]] == ["/webhooks/1"]
    assert (api.count("jobs"), api.count("webhook_deliveries")) == before


def test_every_wrong_webhook_is_told_with_all_else_that_is_wrong(api: Api) -> None:
    answer = api.post(a_job(dataset="ds_nowhere", webhooks=[NOWHERE, "no id at all"]))

    assert answer.status_code == 422
    assert {fault["pointer"] for fault in answer.json()["errors"]} == {"/dataset", "/webhooks/0", "/webhooks/1"}
    assert api.post(a_job(dataset=api.dataset(), webhooks=[NOWHERE] * 17)).status_code == 422
    assert api.post(a_job(dataset=api.dataset(), webhooks="all")).status_code == 422


def test_a_webhook_that_was_deleted_since_is_told_nothing_and_holds_nobody_up(api: Api) -> None:
    gone, mine = hook(api, jobs="named"), hook(api, jobs="named", events=["job.cancelled"])
    job_id = api.job(webhooks=[gone, mine])
    assert api.http.delete(f"/webhooks/{gone}").status_code == 204

    assert api.http.post(f"/jobs/{job_id}/cancel").status_code == 202

    assert told(api, mine) == [job_id]
    assert api.http.post(f"/jobs/{job_id}/clone").json()["errors"][0]["pointer"] == "/webhooks/0"
    assert api.http.post(f"/jobs/{job_id}/clone", json={"webhooks": [mine]}).status_code == 202


def test_of_which_jobs_a_webhook_is_told_can_be_changed(api: Api) -> None:
    mine = hook(api)
    assert api.http.get(f"/webhooks/{mine}").json()["jobs"] == "all"

    changed = api.http.patch(f"/webhooks/{mine}", json={"jobs": "named"}).json()
    api.job()

    assert changed["jobs"] == "named"
    assert told(api, mine) == []
    assert api.http.patch(f"/webhooks/{mine}", json={"description": "x"}).json()["jobs"] == "named"
    for wrong in ("some", None, 1):
        assert api.http.patch(f"/webhooks/{mine}", json={"jobs": wrong}).status_code == 422


def test_an_export_may_name_webhooks_too(api: Api) -> None:
    mine = hook(api, jobs="named")
    job_id = api.job()
    api.finish(job_id)
    files = api.http.get(f"/jobs/{job_id}/artifacts").json()["data"]
    adapter = next(file["id"] for file in files if file["name"] == "heads.safetensors")

    refused = api.http.post(f"/artifacts/{adapter}/merge", json={"webhooks": [NOWHERE]})
    export = api.http.post(f"/artifacts/{adapter}/merge", json={"webhooks": [mine]})

    assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (404, "/webhooks/0")
    assert export.json()["webhooks"] == [mine]
    assert told(api, mine) == [export.json()["id"]]


def test_the_command_line_and_the_client_make_one_for_named_jobs(api: Api) -> None:
    made = CliRunner().invoke(cli, ["webhooks", "create", "https://hooks.example/cli", "--named", "--url", api.url])
    with Client(api.url) as client:
        newest = next(iter(client.webhooks()))
        other = client.create_webhook("https://hooks.example/p2d", jobs="named")
    shown = CliRunner().invoke(cli, ["webhooks", "list", "--url", api.url]).stdout
    dataset, one = api.dataset(), f'webhooks=["{other["id"]}"]'
    asked = ["submit", "--base-model", "stub", "--data", dataset, "--set", one, "--set", "heads.proxy_rows=8"]
    sent = CliRunner().invoke(cli, [*asked, "--url", api.url])

    assert (made.exit_code, newest["url"], newest["jobs"]) == (0, "https://hooks.example/cli", "named")
    assert next(line for line in shown.splitlines() if newest["id"] in line).count("named") == 1
    assert sent.exit_code == 0, sent.output
    assert api.http.get(f"/jobs/{sent.stdout.split()[-1]}").json()["webhooks"] == [other["id"]]
