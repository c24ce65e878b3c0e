"""Laws of what may be asked of a job over HTTP, by the client and on the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from app.cli import cli
from p2d.client import Client, ServiceProblem
from tests.app.conftest import Api, a_job


def test_a_job_is_paused_and_goes_on_to_its_end(api: Api) -> None:
    job_id = api.job()

    paused = api.http.post(f"/jobs/{job_id}/pause")
    again = api.http.post(f"/jobs/{job_id}/pause")

    assert (paused.status_code, paused.json()["status"]) == (202, "paused")
    assert (again.status_code, again.json()) == (200, paused.json())
    assert paused.json()["pause_requested_at"] is not None
    resumed = api.http.post(f"/jobs/{job_id}/resume")
    assert (resumed.status_code, resumed.json()["status"]) == (202, "queued")
    assert resumed.json()["pause_requested_at"] is None
    assert api.http.post(f"/jobs/{job_id}/resume").json() == resumed.json()
    api.finish(job_id)
    assert api.http.get(f"/jobs/{job_id}").json()["status"] == "succeeded"


def test_paused_jobs_can_be_listed(api: Api) -> None:
    job_id = api.job()
    api.http.post(f"/jobs/{job_id}/pause")

    page = api.http.get("/jobs", params={"status": "paused"}).json()

    assert job_id in {job["id"] for job in page["data"]}
    assert {job["status"] for job in page["data"]} == {"paused"}


@pytest.mark.parametrize(("move", "code"), [("pause", "job.move_not_allowed"), ("resume", "job.move_not_allowed")])
def test_a_move_that_is_not_allowed_is_409_and_says_what_is(api: Api, move: str, code: str) -> None:
    job_id = api.job()
    api.http.post(f"/jobs/{job_id}/cancel")

    answer = api.http.post(f"/jobs/{job_id}/{move}")

    assert (answer.status_code, answer.json()["code"]) == (409, code)
    facts = answer.json()["facts"]
    assert (facts["status"], facts["move"]) == ("cancelled", move)
    assert move not in facts["allowed"]


def test_a_move_is_made_once_for_a_key(api: Api) -> None:
    job_id = api.job()
    key = {"Idempotency-Key": "pause-once"}
    first = api.http.post(f"/jobs/{job_id}/pause", headers=key)
    api.http.post(f"/jobs/{job_id}/resume")

    again = api.http.post(f"/jobs/{job_id}/pause", headers=key)

    assert (again.json(), again.headers["Idempotency-Replayed"]) == (first.json(), "true")
    assert api.http.get(f"/jobs/{job_id}").json()["status"] == "queued"


def test_a_job_that_was_cancelled_is_retried_once_for_a_key(api: Api) -> None:
    job_id, key = api.job(), {"Idempotency-Key": "retry-once"}
    api.http.post(f"/jobs/{job_id}/cancel")

    first, again = (api.http.post(f"/jobs/{job_id}/retry", headers=key) for _ in range(2))

    assert (first.status_code, first.json()["status"], first.json()["retries"]) == (202, "queued", 1)
    assert (again.json(), again.headers["Idempotency-Replayed"]) == (first.json(), "true")
    refused = api.http.post(f"/jobs/{job_id}/retry")
    assert (refused.status_code, refused.json()["facts"]["allowed"]) == (409, ["pause", "cancel"])


def test_a_job_whose_dataset_was_deleted_is_not_retried(api: Api) -> None:
    answer = api.post(a_job(dataset=api.dataset(50, start=7000)))
    job_id, dataset_id = answer.json()["id"], answer.json()["dataset_id"]
    api.http.post(f"/jobs/{job_id}/cancel")
    assert api.http.delete(f"/datasets/{dataset_id}").status_code == 200

    refused = api.http.post(f"/jobs/{job_id}/retry")

    assert (refused.status_code, refused.json()["code"]) == (404, "dataset.not_found")
    assert refused.json()["errors"][0]["pointer"] == "/dataset"


def test_the_client_and_the_command_line_make_the_same_moves(api: Api) -> None:
    job_id, runner = api.job(), CliRunner()
    with Client(api.url) as client:
        assert client.pause(job_id).status == "paused"
        assert client.resume(job_id).status == "queued"
        for command, status in [
            ("pause", "paused"),
            ("resume", "queued"),
            ("cancel", "cancelled"),
            ("retry", "queued"),
        ]:
            done = runner.invoke(cli, [command, job_id, "--url", api.url])
            assert (done.exit_code, done.output.strip()) == (0, f"{job_id} {status}")
        assert client.cancel(job_id).status == "cancelled"
        assert client.retry(job_id).raw["retries"] == 2
        with pytest.raises(ServiceProblem) as refused:
            client.retry(job_id)
    assert refused.value.code == "job.move_not_allowed"
