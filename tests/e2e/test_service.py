"""One job of every kind, through HTTP, on the service as `p2d up` runs it; then what happens when parts of it die."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.service import Service
from p2d.client import Client, Job, ServiceProblem
from tests.e2e.conftest import MODEL

SMALL: dict[str, Any] = {
    "base_model": MODEL,
    "heads": {"ratio": 0.2, "proxy_rows": 8},
    "data": {"ratio": 0.2},
    "training": {"epochs": 1, "learning_rate": 0.002},
    "reuse": "never",
}


def finish(client: Client, job: Job) -> Job:
    job = client.wait(job.id)
    assert job.status == "succeeded", job.error
    return job


def files_of(client: Client, job: Job, out: Path) -> dict[str, Path]:
    return {path.name: path for path in client.download(job.id, out)}


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_an_adapt_job_gives_an_adapter_and_says_what_it_is_worth(
    client: Client, examples: Path, tmp_path: Path, recipe: str
) -> None:
    body = SMALL | {"kind": "adapt", "recipe": recipe}

    job = client.submit(body, dataset=examples / "train.jsonl", validation_dataset=examples / "test.jsonl")
    events = list(client.events(job.id))
    job = client.job(job.id)

    assert job.status == "succeeded", job.error
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert [event.data["stage"] for event in events if event.type == "job.stage"] == [
        "validating",
        "identifying_heads",
        "selecting_data",
        "training",
        "evaluating",
        "packaging",
    ]
    assert sum(event.type == "estimate" for event in events) == 1
    files = files_of(client, job, tmp_path)
    assert {"heads.safetensors", "manifest.json", "head_map.json", "selection.jsonl", "report.json"} <= set(files)
    report = json.loads(files["report.json"].read_text())
    assert report == client.report(job.id)
    assert report["heads"]["kept"] == 4  # a fifth of 18, rounded up
    assert report["selection"]["kept"] == 8  # a fifth of 40
    assert report["evaluation"]["full_fine_tuning"]["projected"] is True
    cost = report["cost"]
    assert cost["counted_s"] == pytest.approx(sum(line["seconds"] for line in cost["lines"] if line["counted"]))
    assert cost["aer"] == pytest.approx(cost["counted_s"] / cost["full_s"])
    assert cost["aer_lora"] == pytest.approx(cost["counted_s"] / cost["lora_s"])
    expected = {
        "default": ("attribution", "alignment_likelihood", ["v", "o"]),
        "paper": ("pad", "icl", ["q", "k", "v"]),
    }[recipe]
    config = report["config"]
    assert (config["heads"]["scorer"], config["data"]["scorer"], config["training"]["slices"]) == expected


def test_later_jobs_start_from_an_earlier_head_map_and_selection(client: Client, examples: Path) -> None:
    dataset = client.upload(examples / "train.jsonl")
    held_out = client.upload(examples / "test.jsonl")

    found = finish(
        client, client.submit(SMALL | {"kind": "identify_heads"}, dataset=dataset, validation_dataset=held_out)
    )
    head_map = found.raw["head_map"]
    with_map = SMALL | {"kind": "select_data", "heads": {"ratio": 0.2, "head_map": head_map}}
    chosen = finish(client, client.submit(with_map, dataset=dataset, validation_dataset=held_out))
    selection = chosen.raw["selection"]
    with_both = with_map | {"kind": "adapt", "data": {"selection": selection}}
    adapted = finish(client, client.submit(with_both, dataset=dataset, validation_dataset=held_out))

    assert [stage(event.data) for event in client.events(adapted.id) if event.type == "job.stage"] == [
        "validating",
        "training",
        "evaluating",
        "packaging",
    ]
    report = client.report(adapted.id)
    assert report["heads"]["earlier_head_map"] == head_map


def stage(data: Any) -> str:
    return str(data["stage"])


def test_the_same_file_twice_is_one_dataset_and_the_same_job_twice_is_the_same_result(
    client: Client, examples: Path
) -> None:
    body = SMALL | {"kind": "identify_heads"}
    maps = []
    for _ in range(2):
        job = client.submit(body, dataset=examples / "train.jsonl", validation_dataset=examples / "test.jsonl")
        finish(client, job)
        maps.append({artifact.name: artifact.sha256 for artifact in client.artifacts(job.id)}["head_map.json"])

    assert maps[0] == maps[1]


def test_another_ratio_of_heads_is_selected_without_a_pass_over_the_model(client: Client, examples: Path) -> None:
    dataset, held_out = client.upload(examples / "train.jsonl"), client.upload(examples / "test.jsonl")

    def run(body: dict[str, Any]) -> Job:
        return finish(client, client.submit(body, dataset=dataset, validation_dataset=held_out))

    body = SMALL | {"kind": "select_data", "reuse": "auto", "training": {"seed": 7}}
    body |= {"data": {"ratio": 0.2, "scorer": "alignment"}}  # a score of the heads alone: ranks may stay as they are
    first = run(body)

    other = body | {"heads": SMALL["heads"] | {"ratio": 0.5}}
    again = run(other)
    fresh = run(other | {"reuse": "never"})

    hits = {event.data["step"]: event.data for event in client.events(again.id) if event.type == "cache.hit"}
    assert {hit["job_id"] for hit in hits.values()} == {first.id}
    assert set(hits) == {"heads", "respond"}
    assert not any(event.type == "cache.hit" for event in client.events(fresh.id))
    made = [{file.name: file.sha256 for file in client.artifacts(job.id)} for job in (again, fresh, first)]
    for name in ("selection.jsonl", "head_map.json", "responses-00000.safetensors"):
        assert made[0][name] == made[1][name], name
    assert made[0]["selection.jsonl"] != made[2]["selection.jsonl"]
    reports = [client.report(job.id) for job in (again, fresh)]
    cost = reports[0]["cost"]
    assert reports[0]["heads"]["reproducibility"] == reports[1]["heads"]["reproducibility"]
    assert reports[0]["selection"] == reports[1]["selection"]
    assert {step["step"] for step in cost["steps"] if step["reused_from"] == first.id} == {"heads", "respond"}
    reused_s = sum(line["seconds"] for line in cost["lines"] if line["reused"])
    assert reused_s == pytest.approx(sum(hit["seconds_saved"] for hit in hits.values()), abs=0.01)
    assert cost["counted_s"] == pytest.approx(cost["spent_s"] + reused_s, abs=0.01)


def test_bad_lines_are_refused_with_all_of_them_before_any_job_exists(
    client: Client, examples: Path, tmp_path: Path
) -> None:
    lines = (examples / "train.jsonl").read_text("utf-8").splitlines()
    lines[6] = '{"question": "cut'
    lines[20] = json.dumps({"question": "q", "answer": ""})
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join(lines) + "\n", "utf-8")
    before = [job.id for job in client.jobs()]

    with pytest.raises(ServiceProblem) as refused:
        client.submit(SMALL | {"kind": "adapt"}, dataset=bad)

    assert refused.value.fault == "user"
    assert [error.line for error in refused.value.errors] == [7, 21]
    assert [job.id for job in client.jobs()] == before


def test_a_cancelled_job_stops_and_leaves_the_worker_free(client: Client, examples: Path) -> None:
    body = SMALL | {"kind": "adapt", "training": {"epochs": 500, "learning_rate": 0.002}}
    job = client.submit(body, dataset=examples / "train.jsonl", validation_dataset=examples / "test.jsonl")
    for event in client.events(job.id):
        if event.type == "job.stage" and event.data["stage"] == "training":
            client.cancel(job.id)

    assert client.job(job.id).status == "cancelled"
    finish(client, client.submit(SMALL | {"kind": "identify_heads"}, dataset=examples / "train.jsonl"))


def test_each_process_of_the_api_tells_what_all_have_counted(service: Service) -> None:
    for _ in range(8):
        httpx.get(f"{service.url}/version").raise_for_status()  # each on a connection, so from a process, of its own

    told = {_line(httpx.get(f"{service.url}/metrics").text, 'route="/version"') for _ in range(8)}

    assert len(told) == 1
    assert float(told.pop().split()[-1]) >= 8


def _line(text: str, holding: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("p2d_http_requests_total") and holding in line)


def test_a_worker_and_an_api_that_are_killed_are_started_again_and_the_job_ends_once(
    service: Service, examples: Path
) -> None:
    # Patient: on a machine that runs two files of tests, an API takes longer to start than a client waits by itself.
    with Client(service.url, retries=30) as client:
        job = client.submit(SMALL | {"kind": "adapt"}, dataset=examples / "train.jsonl")
        killed = False
        seen = []
        for event in client.events(job.id):
            seen.append(event.seq)
            if not killed and event.type == "job.stage" and event.data["stage"] == "identifying_heads":
                killed = True
                for name in ("worker", "api"):
                    os.kill(service.pid(name), signal.SIGKILL)

        assert killed
        assert seen == list(range(1, len(seen) + 1))
        assert client.job(job.id).status == "succeeded"
        artifacts = client.artifacts(job.id)
        assert len({artifact.name for artifact in artifacts}) == len(artifacts)


def test_a_broker_that_is_killed_is_started_again_and_no_job_notices(
    client: Client, service: Service, examples: Path
) -> None:
    job = client.submit(SMALL | {"kind": "identify_heads"}, dataset=examples / "train.jsonl")
    dead = service.pid("valkey")
    os.kill(dead, signal.SIGKILL)

    finish(client, job)

    deadline = time.monotonic() + 60
    while httpx.get(f"{service.url}/readyz").json()["status"] != "ok":
        assert time.monotonic() < deadline
    assert service.pid("valkey") != dead


def test_an_artifact_comes_in_ranges_with_its_hash(client: Client, service: Service, examples: Path) -> None:
    job = finish(client, client.submit(SMALL | {"kind": "identify_heads"}, dataset=examples / "train.jsonl"))
    artifact = next(artifact for artifact in client.artifacts(job.id) if artifact.name == "head_map.json")
    address = f"{service.url}/artifacts/{artifact.id}/content"

    whole = httpx.get(address)
    rest = httpx.get(address, headers={"Range": "bytes=10-"})
    again = httpx.get(address, headers={"If-None-Match": whole.headers["ETag"]})

    assert hashlib.sha256(whole.content).hexdigest() == artifact.sha256
    assert (rest.status_code, rest.content) == (206, whole.content[10:])
    assert again.status_code == 304


def test_the_service_serves_while_a_job_runs(client: Client, service: Service, examples: Path) -> None:
    job = client.submit(SMALL | {"kind": "identify_heads"}, dataset=examples / "train.jsonl")
    deadline = time.monotonic() + 120
    while not client.job(job.id).is_final:
        assert httpx.get(f"{service.url}/healthz").is_success
        assert time.monotonic() < deadline
        time.sleep(0.1)  # not hope: the deadline above decides

    assert client.job(job.id).status == "succeeded"
