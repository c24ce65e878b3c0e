"""A step in a worker: its files, its child, and the jobs that build on earlier ones."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from app.db.head_maps import head_map_of_job
from app.db.selections import selection_of_job
from app.settings import Settings
from tests.rig import Rig, make_rig, wait_for
from tests.s3_server import KEYS


def test_a_job_runs_from_its_dataset_to_its_report(rig: Rig) -> None:
    job_id = rig.submit()

    with rig.in_process():
        job = rig.ended(job_id)

    assert job.status == "succeeded", job.error
    assert job.resolved is not None
    assert job.resolved["config"]["heads"]["scorer"] == "uniform"
    assert job.estimate is not None
    rig.check(job_id)


def test_a_job_runs_on_an_s3_store(
    settings: Settings, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    rig = make_rig(settings.model_copy(update={"store_url": SecretStr(s3_url)}), tmp_path)
    monkeypatch.setenv("STUB_DIR", str(rig.stub))
    try:
        job_id = rig.submit()
        with rig.in_process():
            job = rig.ended(job_id)

        assert job.status == "succeeded", job.error
        rig.check(job_id)
    finally:
        rig.stop()


def test_the_report_gets_every_attempt_failed_ones_included(rig: Rig, tmp_path: Path) -> None:
    rig.steer("crash", "heads", "1")
    job_id = rig.submit(kind="identify_heads")

    with rig.in_process():
        assert rig.ended(job_id).status == "succeeded"

    rig.store.fetch(rig.artifacts(job_id)["report.json"].sha256, tmp_path / "report.json")
    tried = json.loads((tmp_path / "report.json").read_bytes())["attempts"]
    assert [(t["step"], t["attempt"], t["status"]) for t in tried] == [
        ("validate", 1, "done"),
        ("heads", 1, "lost"),
        ("heads", 2, "done"),
    ]


def test_a_later_job_takes_an_earlier_head_map_and_selection(rig: Rig) -> None:
    first = rig.submit()
    with rig.in_process():
        assert rig.ended(first).status == "succeeded"
        with rig.db.begin() as conn:
            head_map, selection = head_map_of_job(conn, first), selection_of_job(conn, first)
        assert head_map is not None
        assert selection is not None
        assert (selection.rows, selection.kept) == (48, 4)

        second = rig.submit(head_map=head_map.id, selection=selection.id)
        assert rig.ended(second).status == "succeeded"

    assert [step.step for step in rig.steps(second)] == ["validate", "train", "evaluate", "package"]
    assert rig.artifacts(second)["heads.safetensors"].sha256 == rig.artifacts(first)["heads.safetensors"].sha256
    rig.check(second)


def test_one_child_serves_all_steps_and_knows_no_credential(rig: Rig) -> None:
    rig.steer("hold", "package")
    job_id = rig.submit()
    rig.worker()  # its environment holds the database's, the broker's and the store's URL

    child = psutil.Process(rig.reached("package"))

    env = child.environ()
    secrets = [rig.settings.url(name) for name in ("database_url", "broker_url", "store_url")]
    assert not [name for name, value in env.items() if value in secrets]
    assert len({run.split()[2] for run in rig.runs()}) == 1
    rig.let_go("package")
    assert rig.ended(job_id).status == "succeeded"


def test_a_model_that_changed_since_the_job_was_made_is_refused(rig: Rig) -> None:
    job_id = rig.submit(kind="identify_heads")
    config = rig.settings.models_dir / "stub" / "config.json"
    config.write_text(config.read_text().replace("128", "256"))

    with rig.in_process():
        job = rig.ended(job_id)

    assert job.error is not None
    assert job.error["code"] == "model.invalid"
    rig.check(job_id)


def test_nothing_is_left_on_disk_after_a_job(rig: Rig) -> None:
    job_id = rig.submit()

    with rig.in_process():
        assert rig.ended(job_id).status == "succeeded"
        folders = rig.settings.work_dir / "steps"
        wait_for(lambda: not [p for p in folders.glob("*/*") if p.is_dir()], "the last attempt's folder to go")

    assert not list(folders.iterdir())


def test_a_cancel_between_two_steps_keeps_the_child_warm(rig: Rig) -> None:
    rig.steer("hold", "heads")
    job_id = rig.submit()
    with rig.in_process() as (worker,):
        child = rig.reached("heads")
        rig.let_go("heads")
        rig.cancel(job_id)
        assert rig.ended(job_id).status == "cancelled"

        later = rig.submit(kind="identify_heads")
        worker.wake()
        assert rig.ended(later).status == "succeeded"

    assert {int(run.split()[2]) for run in rig.runs()} == {child}
    rig.check(job_id)
    rig.check(later)
