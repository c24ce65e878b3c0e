"""The commands that ask a service what it has on record: they print what its answers say, and their effect is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import cli
from tests.app.conftest import Api, a_job


@pytest.fixture(autouse=True)
def _here(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2D_URL", api.url)
    monkeypatch.setattr("p2d.client.FOLLOW_S", 0.01)


@pytest.fixture(scope="module")
def jobs(api: Api) -> list[str]:
    """Two that have ended and differ in one setting."""
    dataset = api.dataset()
    asked = [a_job(dataset=dataset, name=f"job {n}", heads={"ratio": n / 8, "proxy_rows": 8}) for n in (1, 4)]
    made = [str(api.post(body).json()["id"]) for body in asked]
    api.finish(*made)
    return made


def p2d(*arguments: str) -> str:
    """What a command printed."""
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_logs_are_printed_line_by_line_and_followed_to_the_jobs_end(api: Api, jobs: list[str]) -> None:
    waits = str(api.post(a_job(dataset=api.dataset())).json()["id"])
    api.http.post(f"/jobs/{waits}/cancel")
    said = p2d("logs", jobs[0]).splitlines()
    answer = api.http.get(f"/jobs/{jobs[0]}/logs", params={"limit": 100}).json()["data"]

    assert len(said) == len(answer) > 20
    assert "validate.0 #1 attempt.began worker=" in said[0]
    assert p2d("logs", jobs[0], "--follow").splitlines() == said
    assert p2d("logs", waits, "-f") == ""


def test_jobs_are_listed_newest_first_by_status_and_up_to_a_limit(api: Api, jobs: list[str]) -> None:
    lines = p2d("jobs").splitlines()
    places = [next(at for at, line in enumerate(lines) if one in line) for one in jobs]

    assert places[0] > places[1]
    assert all(word in lines[places[1]] for word in ("job 4", "adapt", "succeeded", "100%"))
    assert jobs[1] in p2d("jobs", "--status", "succeeded", "--limit", "1")
    assert jobs[0] not in p2d("jobs", "--limit", "1")
    assert jobs[1] not in p2d("jobs", "--status", "failed")


def test_a_job_is_shown_with_its_files_and_as_json(api: Api, jobs: list[str]) -> None:
    said = p2d("show", jobs[0])
    files = api.http.get(f"/jobs/{jobs[0]}/artifacts").json()["data"]

    assert said.startswith(f"{jobs[0]} adapt job 1\nsucceeded, 100%\n")
    assert files
    for file in files:
        assert any(line.split() == [file["name"], f"{file['size_bytes']:,}"] for line in said.splitlines()), file
    raw = api.http.get(f"/jobs/{jobs[0]}").json()
    assert f"learning rate {raw['resolved']['training']['learning_rate']}" in said
    assert json.loads(p2d("show", jobs[0], "--json")) == api.http.get(f"/jobs/{jobs[0]}").json()


def test_a_job_that_failed_is_shown_with_what_went_wrong_and_what_to_do(api: Api) -> None:
    job_id = api.failed_job()
    error = api.http.get(f"/jobs/{job_id}").json()["error"]

    said = p2d("show", job_id)

    assert "failed, " in said
    assert f"{error['code']}: {error['detail']}\n{error['hint']}\n" in said


def test_jobs_are_compared_in_a_table_and_on_a_page(api: Api, jobs: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"

    said = p2d("compare", *jobs, "--name", "few & many", "--html", str(page))

    assert "1  job 1" in said
    assert "/heads/ratio" in said
    assert "heads 1 and 4, 1 of them shared" in said
    assert "2 is better" in said
    assert "few &amp; many" in page.read_text("utf-8")
    kept = next(line for line in said.splitlines() if "Kept as" in line).split()[-1].rstrip(".")
    assert api.http.get(f"/comparisons/{kept}").json()["job_ids"] == jobs


def test_usage_and_audit_say_what_is_there_and_who_did_it(api: Api, jobs: list[str]) -> None:
    has = api.http.get("/usage").json()

    assert f"{has['stored_bytes']:,}" in p2d("usage")
    (line,) = [line for line in p2d("audit", "--object", jobs[0]).splitlines() if jobs[0] in line]
    assert "job.create" in line
    assert p2d("audit", "--limit", "2").count("loopback") == 2


def test_a_webhook_is_made_tried_looked_at_and_deleted(api: Api) -> None:
    secret = p2d("webhooks", "create", "https://hooks.example/p2d", "--event", "job.failed", "--description", "mine")
    (webhook,) = api.http.get("/webhooks").json()["data"]
    assert secret.startswith("whsec_")
    assert webhook["events"] == ["job.failed"]
    assert "mine" in p2d("webhooks", "list")

    delivery = p2d("webhooks", "test", webhook["id"]).split()[0]
    assert f"{delivery} is on its way" in p2d("webhooks", "redeliver", webhook["id"], delivery)
    assert "webhook.test" in p2d("webhooks", "deliveries", webhook["id"])
    assert delivery not in p2d("webhooks", "deliveries", webhook["id"], "--status", "delivered")

    p2d("webhooks", "delete", webhook["id"])
    assert api.http.get("/webhooks").json()["data"] == []
