"""An export is a step like any other: killed, paused or tried twice, it ends with the same files, once."""

from __future__ import annotations

import os
import signal

from app.core.exports import ExportRequest, submit_export
from app.db.engine import for_project
from app.db.projects import DEFAULT_PROJECT
from tests.rig import Rig

STEPS = ("merge", "export_peft")


def exported(rig: Rig, trained: str) -> str:
    """A queued export of the job's adapter in both formats."""
    adapter = rig.artifacts(trained)["heads.safetensors"].id
    with for_project(rig.db, DEFAULT_PROJECT).begin() as conn:
        request = ExportRequest(formats=("merged", "peft"))
        return submit_export(conn, adapter, request, queue=rig.settings.worker_queue).id


def test_kill_9_in_each_format_costs_one_attempt_each_and_changes_no_file(rig: Rig) -> None:
    trained = rig.submit()
    with rig.in_process():
        assert rig.ended(trained).status == "succeeded"
        reference = exported(rig, trained)
        assert rig.ended(reference).status == "succeeded"
    for step in STEPS:
        rig.steer("hold", step)
    job_id = exported(rig, trained)

    with rig.in_process():
        for step in STEPS:
            os.kill(rig.reached(step), signal.SIGKILL)
            rig.let_go(step)
        assert rig.ended(job_id).status == "succeeded"

    lost = [attempt.step for attempt in rig.attempts(job_id) if attempt.outcome == "lost"]
    assert lost == list(STEPS)
    rig.check(job_id, like=reference)


def test_an_export_is_paused_and_goes_on(rig: Rig) -> None:
    trained = rig.submit()
    with rig.in_process():
        assert rig.ended(trained).status == "succeeded"
    rig.steer("hold", "export_peft")
    job_id = exported(rig, trained)

    with rig.in_process():
        rig.reached("export_peft")
        rig.pause(job_id)
        rig.paused(job_id)
        rig.let_go("export_peft")
        rig.resume(job_id)
        assert rig.ended(job_id).status == "succeeded"

    rig.check(job_id)
    assert "released" in [attempt.outcome for attempt in rig.attempts(job_id)]
