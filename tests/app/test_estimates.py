"""Laws of estimates: the same body as a job, nothing made, and every number says where it comes from."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.core.forecast import WIDE
from app.db.estimates import MeasuredSpeed
from app.settings import Settings
from p2d.client import Client
from p2d.memory import PROCESS_BYTES
from tests.app.conftest import Api, a_job, rows, serving
from tests.app.test_cli import p2d
from tests.stub_engine import HOST_BYTES


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
    assert found["rows"] == {"train": 48, "guide": 4, "evaluation": 8, "proxy": 0, "kept": 48}
    assert found["config"]["heads"]["scorer"] == "uniform"
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
        job = b'{"base_model": "stub", "heads": {"scorer": "attribution"}}'
        files: Any = {"dataset": ("data.jsonl", content), "job": (None, job, "application/json")}
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
    assert any("as clean as it is" in warning for warning in found["warnings"])
    apart = estimate(api, data={"ratio": 0.1}, validation_dataset=api.dataset(20, start=900))
    assert not any("as clean as it is" in warning for warning in apart["warnings"])
    assert not found["fits"]
    assert "limits.max_seconds is 1" in found["misfits"][0]
    change = found["changes"][0]
    assert change["pointer"] == "/limits/max_seconds"
    assert estimate(api, data={"ratio": 0.1}, limits={"max_seconds": change["value"]})["fits"]
    tight = estimate(api, data={"ratio": 0.1}, limits={"max_gpu_seconds": 1})
    assert ("limits.max_gpu_seconds is 1" in tight["misfits"][0], tight["changes"][0]) == (
        True,
        change | {"pointer": "/limits/max_gpu_seconds"},
    )
    soon = datetime.now(UTC) + timedelta(seconds=found["seconds"]["p50"] / 2)
    late = estimate(api, data={"ratio": 0.1}, limits={"deadline": soon.isoformat()})
    assert "limits.deadline is in" in late["misfits"][0]


def test_a_job_that_is_dearer_than_its_alternatives_is_told_so_once_and_what_to_leave_out(api: Api) -> None:
    found = estimate(api)
    (warning,) = found["warnings"]

    assert found["aer"] > 1  # a tiny model: starting takes longer than anything
    counted = sum(step["seconds"]["p50"] for step in found["steps"] if step["step"] != "evaluate")
    assert f"to take {counted:.0f} s, full fine-tuning on all rows {found['full_s']:.2g} s" in warning
    assert f"LoRA on all rows {found['lora_s']:.2g} s" in warning
    assert "a training.learning_rate needs no search" in warning
    assert not {"heads.ratio", "data.ratio"} & set(warning.split())  # no head is looked for, and no row
    assert "heads.ratio 1" in estimate(api, heads={"scorer": "attribution"})["warnings"][0]
    assert "data.ratio 1" in estimate(api, data={"scorer": "alignment"})["warnings"][0]

    bare = estimate(api, training={"learning_rate": 0.001})["warnings"]
    assert bare[0].endswith("nothing more can be left out of the job.")
    assert estimate(api, kind="select_data")["warnings"] == []


def test_a_job_that_is_cheaper_than_its_alternatives_is_not_warned_of(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = MeasuredSpeed(flop_per_s=1e5, runs=1, same_model=True)  # so that starting counts for nothing
    monkeypatch.setattr("app.core.forecast.measured_speed", lambda *_, **__: slow)

    found = estimate(api, data={"ratio": 0.5, "scorer": "random"}, training={"learning_rate": 0.001})

    assert max(found["aer"], found["aer_lora"]) < 1
    assert not any("projected to take" in warning for warning in found["warnings"])


def test_memory_is_judged_once_a_step_has_told_of_its_machine(api: Api) -> None:
    dataset = api.dataset(75, start=500)
    assert estimate(api, dataset=dataset)["memory"]["available"] is None
    api.finish(api.post(a_job(dataset=dataset)).json()["id"])

    found = estimate(api, dataset=dataset)
    assert found["memory"]["available"] == {"host": round(0.9 * HOST_BYTES), "device": 0}
    assert found["fits"]
    assert set(found["memory"]["steps"]) == {"heads", "respond", "train", "evaluate"}
    assert found["memory"]["peak"]["host"] == max(peak["host"] for peak in found["memory"]["steps"].values())

    with api.engine.begin() as conn:  # a machine that holds no process at all
        small = "update steps set facts = replace(facts::text, %s, '1000000')::jsonb"
        conn.exec_driver_sql(small, (str(HOST_BYTES),))
    found = estimate(api, dataset=dataset)
    assert not found["fits"]
    assert not found["full"]["fits"]
    assert "of the host's memory" in found["misfits"][0]
    assert found["changes"] == []


def test_full_fine_tuning_and_lora_are_foreseen_on_the_same_machine(api: Api) -> None:
    found = estimate(api)

    full, lora = found["full"], found["lora"]
    assert (full["seconds"], lora["seconds"]) == (found["full_s"], found["lora_s"])
    for other in (full, lora):
        assert other["seconds"] > 0
        assert other["artifact_bytes"] > 0
        assert other["peak"]["host"] > PROCESS_BYTES[False]
    assert estimate(api, kind="select_data")["full"] is None


def test_files_lie_between_what_they_are_at_the_least_and_at_the_most(api: Api) -> None:
    found = estimate(api)

    assert set(found["artifacts"]) == {"rows", "responses", "adapter", "total"}
    assert {name: size["most"] for name, size in found["artifacts"].items()} == found["size_bytes"]
    assert all(0 <= size["least"] <= size["most"] for size in found["artifacts"].values())


def test_money_is_spoken_of_where_an_hour_has_a_price(api: Api, module_settings: Settings) -> None:
    body = a_job(dataset=api.dataset())
    with serving(module_settings.model_copy(update={"cost_per_hour": 2.5})) as priced:
        found = priced.http.post("/estimates", json=body).json()

    assert api.http.post("/estimates", json=body).json()["cost"] is None
    assert found["cost"]["per_hour"] == 2.5
    assert found["cost"]["job"]["p50"] == pytest.approx(2.5 * found["seconds"]["p50"] / 3600, abs=1e-3)
    assert found["full"]["cost"] == pytest.approx(2.5 * found["full_s"] / 3600, abs=1e-3)


def test_how_far_estimates_were_off_is_published(api: Api) -> None:
    api.finish(api.post(a_job(dataset=api.dataset(75, start=4000))).json()["id"])
    with api.engine.begin() as conn:  # as if steps had taken half as long again as was said
        conn.exec_driver_sql("update steps set seconds = 1.5 * weight where status = 'done' and weight > 0.5")

    said = api.http.get("/usage").json()["estimate_errors"]
    metrics = api.http.get("/metrics").text

    assert said["train"]["median"] == pytest.approx(0.5)
    assert said["job"]["median"] == pytest.approx(0.5)
    assert said["job"]["runs"] >= 1
    assert 'p2d_estimate_absolute_error{step="train"} 0.5' in metrics


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
    assert "Would fit: /limits/max_seconds = " in said
    assert "s in the queue" in said
    assert "peak memory" in said
    assert "full fine-tuning instead: " in said
    for pointer in found["reasons"]:
        assert f" {pointer[1:].replace('/', '.')} = " in said
    assert "training.slices = v, o: recipe 'default': best of our own measurements training.rank = " in said
    assert "Decided in the run: training.learning_rate, training.precision" in said


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
