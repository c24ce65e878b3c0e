"""What comes of a real job, over HTTP: figures that add up to the engine's own scores, and exports that are the engine's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from app.service import Service
from p2d.adapters import merge
from p2d.client import Client
from p2d.model_info import read_model_info
from p2d.peft_export import export_peft
from p2d.selection_reasons import FORMULAS
from tests.e2e.conftest import MODEL
from tests.e2e.test_service import SMALL, finish


def added_up(reason: dict[str, Any]) -> float:
    response = sum(head["response"] for head in reason["heads"]) + reason["stand_ins"] * reason["stand_in"]
    assert response == reason["response"]
    if reason["formula"] == "score = response":
        return float(response)
    assert reason["formula"] == FORMULAS["guide"]
    guide, quality = reason["guide"], reason["quality"]
    by_response = (response - guide["response_median"]) / guide["response_spread"]
    own = float(min(by_response, (quality - guide["quality_median"]) / guide["quality_spread"]))
    if own < guide["bar"]:
        return own
    assert guide["bar"] <= reason["score"] < guide["bar"] + 1
    return float(reason["score"])


@pytest.mark.parametrize("scorer", ["alignment", "alignment_likelihood"])
def test_every_row_of_a_real_selection_is_explained(
    service: Service, client: Client, examples: Path, tmp_path: Path, scorer: str
) -> None:
    body = SMALL | {"kind": "select_data", "data": {"ratio": 0.2, "scorer": scorer}}
    held_out = tmp_path / "held_out.jsonl"  # 24 rows, of which 9 guide: enough to set a bar
    lines = [(examples / name).read_text("utf-8").splitlines()[-12:] for name in ("train.jsonl", "test.jsonl")]
    held_out.write_text("\n".join(lines[0] + lines[1]), "utf-8")
    job = finish(client, client.submit(body, dataset=examples / "train.jsonl", validation_dataset=held_out))
    path = f"/selections/{job.raw['selection']}"

    with httpx.Client(base_url=service.url, timeout=60) as http:
        rows = http.get(f"{path}/rows", params={"limit": 100, "order": "score"}).json()["data"]
        for row in rows:
            reason = http.get(f"{path}/rows/{row['row']}").json()
            assert added_up(reason) == row["score"] == reason["score"]
            assert reason["not_known"] == []
            assert reason["prompt"]
            if row["kept"]:
                assert (reason["prompt"], reason["answer"]) == (row["prompt"], row["answer"])

    assert [row["rank"] for row in rows] == list(range(len(rows)))


def test_an_export_is_what_the_commands_write(service: Service, client: Client, examples: Path, tmp_path: Path) -> None:
    trained = finish(client, client.submit(SMALL | {"kind": "adapt"}, dataset=examples / "train.jsonl"))
    client.download(trained.id, tmp_path / "adapter", names=["heads.safetensors", "manifest.json"])
    adapter = next(one.id for one in client.artifacts(trained.id) if one.name == "heads.safetensors")

    answer = httpx.post(f"{service.url}/artifacts/{adapter}/merge", json={"formats": ["merged", "peft"]}, timeout=60)
    export = finish(client, client.job(answer.json()["id"]))

    made = {path.name: path.read_bytes() for path in client.download(export.id, tmp_path / "export")}
    base = service.settings.models_dir / MODEL
    for folder in (
        merge(base, tmp_path / "adapter", tmp_path / "m"),
        export_peft(base, tmp_path / "adapter", tmp_path / "p"),
    ):
        for path in folder.iterdir():
            assert made[path.name] == path.read_bytes(), path.name


def test_a_job_goes_on_from_the_model_that_an_earlier_one_has_become(
    service: Service, client: Client, examples: Path, tmp_path: Path
) -> None:
    first = finish(client, client.submit(SMALL | {"kind": "adapt"}, dataset=examples / "train.jsonl"))
    adapter = next(one.id for one in client.artifacts(first.id) if one.name == "heads.safetensors")
    answer = httpx.post(f"{service.url}/artifacts/{adapter}/merge", timeout=60)
    export = finish(client, client.job(answer.json()["id"]))
    base = next(one.id for one in client.artifacts(export.id) if one.name == "model.safetensors")

    second = finish(
        client, client.submit(SMALL | {"kind": "adapt", "base_model": base}, dataset=examples / "train.jsonl")
    )

    client.download(first.id, tmp_path / "adapter", names=["heads.safetensors", "manifest.json"])
    whole = merge(service.settings.models_dir / MODEL, tmp_path / "adapter", tmp_path / "m")
    assert second.raw["model_digest"] == read_model_info(whole).digest
    assert client.report(second.id)["evaluation"]["loss_before"] == pytest.approx(
        client.report(first.id)["evaluation"]["loss_after"], rel=1e-4
    )
