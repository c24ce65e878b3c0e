"""Laws of estimates: the same body as a job, nothing made, and every number says where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from app.core.forecast import WIDE
from p2d.client import Client
from tests.app.conftest import Api, a_job, rows
from tests.app.test_cli import p2d


def estimate(api: Api, **fields: Any) -> dict[str, Any]:
    """POST /estimates over a stored dataset of 60 rows, or another."""
    answer = api.http.post("/estimates", json=a_job(**{"dataset": api.dataset(), **fields}))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def state(api: Api) -> tuple[int, int, int, set[str]]:
    """Everything that a request could leave behind."""
    return api.count("jobs"), api.count("datasets"), api.count("events"), api.stored()


def test_an_estimate_tells_what_would_be_done_and_makes_nothing(api: Api) -> None:
    dataset = api.dataset()
    before = state(api)

    found = estimate(api, dataset=dataset)

    assert state(api) == before
    assert [step["step"] for step in found["steps"]] == [
        "validate", "heads", "respond", "select", "train", "evaluate", "package",
    ]  # fmt: skip
    for step in (found, *found["steps"]):
        assert 0 <= step["seconds"]["p10"] <= step["seconds"]["p50"] <= step["seconds"]["p90"]
    assert found["seconds"]["p10"] < found["seconds"]["p50"] < found["seconds"]["p90"]
    for quantile in ("p10", "p50", "p90"):
        parts = sum(step["seconds"][quantile] for step in found["steps"])
        assert found["seconds"][quantile] == pytest.approx(parts)
    assert found["rows"] == {"train": 48, "guide": 4, "evaluation": 8, "proxy": 8, "kept": 48}
    assert found["config"]["heads"]["scorer"] == "attribution"
    assert "/data/ratio" in found["reasons"]
    assert found["fits"]
    assert found["basis"]["interval"] == "a guess"


def test_the_projected_aer_is_the_counted_seconds_over_full_fine_tuning(api: Api) -> None:
    found = estimate(api)

    counted = sum(step["seconds"]["p50"] for step in found["steps"] if step["step"] != "evaluate")
    assert found["aer"] == pytest.approx(counted / found["full_s"])
    assert found["aer_lora"] == pytest.approx(counted / found["lora_s"])


def test_a_dry_run_of_a_job_is_its_estimate(api: Api) -> None:
    body = a_job(dataset=api.dataset())
    before = state(api)

    answer = api.http.post("/jobs", params={"dry_run": "true"}, json=body)

    assert answer.status_code == 200
    assert answer.json() == api.http.post("/estimates", json=body).json()
    assert state(api) == before
    assert api.http.post("/jobs", params={"dry_run": "false"}, json=body).status_code == 202


def test_a_file_that_is_sent_along_is_checked_and_let_go(api: Api) -> None:
    before = state(api)

    def send(content: bytes) -> httpx.Response:
        files: Any = {"dataset": ("data.jsonl", content), "job": (None, b'{"base_model": "stub"}', "application/json")}
        return api.http.post("/estimates", files=files)

    good, bad = send(rows(70, start=900)), send(b'{"question": 1}\n')

    assert good.status_code == 200, good.text
    assert good.json()["rows"]["proxy"] == 56  # all that are left for training
    assert (bad.status_code, bad.json()["errors"][0]["line"]) == (422, 1)
    assert state(api) == before
    assert api.uploading() == []


def test_what_a_job_is_refused_for_an_estimate_is_refused_for(api: Api) -> None:
    for path in ("/estimates", "/jobs?dry_run=true", "/jobs"):
        answer = api.http.post(path, json=a_job(heads={"ratio": 2.0}, base_model="nobody", dataset=api.dataset(18)))
        assert answer.status_code == 422
        assert {fault["pointer"] for fault in answer.json()["errors"]} >= {"/heads/ratio", "/base_model"}


def test_warnings_and_limits_are_told_before_anything_runs(api: Api) -> None:
    found = estimate(api, data={"ratio": 0.1}, limits={"max_seconds": 1})

    assert found["rows"]["kept"] == 5
    assert any("keeps 5 of 48 rows" in warning for warning in found["warnings"])
    assert not found["fits"]
    assert "limits.max_seconds is 1" in found["misfits"][0]


def test_only_the_steps_of_the_kind_are_foreseen(api: Api) -> None:
    found = estimate(api, kind="identify_heads")

    assert [step["step"] for step in found["steps"]] == ["validate", "heads", "package"]
    assert (found["aer"], found["full_s"]) == (None, None)
    assert set(found["size_bytes"]) == {"rows", "total"}


def test_the_client_and_the_command_line_ask_for_the_same(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(rows(60))
    before = state(api)

    with Client(api.url) as client:
        found = client.estimate({"kind": "adapt"}, base_model="stub", dataset=data)
    status, said = p2d(
        capsys, monkeypatch, "submit", "--data", data, "--base-model", "stub", "--dry-run", "--url", api.url,
        "--set", "limits.max_seconds=1",
    )  # fmt: skip

    assert state(api) == before
    assert status == 0
    assert f"projected AER {found['aer']:.2f}" in said
    assert "Does not fit: limits.max_seconds is 1" in said


def test_an_estimate_learns_from_the_jobs_before_it(api: Api) -> None:
    dataset = api.dataset(80, start=7000)
    guessed = estimate(api, dataset=dataset)
    assert guessed["basis"]["tokens"].startswith("guessed")
    assert guessed["seconds"]["p90"] == pytest.approx(WIDE.p90 * guessed["seconds"]["p50"], rel=0.01)
    api.finish(
        *(
            api.http.post("/jobs", json=a_job(dataset=dataset, kind="identify_heads", reuse="never")).json()["id"]
            for _ in range(5)
        )
    )

    found = estimate(api, dataset=dataset)

    assert found["basis"]["tokens"].startswith("counted")
    assert found["tokens"]["train"] == 10 * found["rows"]["train"]  # the stub counts ten of each row
    assert "finished steps of stub" in found["basis"]["speed"]
    assert found["basis"]["interval"].startswith("errors of ")
    again = estimate(api, dataset=dataset, training={"max_length": 8})
    assert not again["fits"]
    assert "the longest row has 10 tokens" in again["misfits"][0]
