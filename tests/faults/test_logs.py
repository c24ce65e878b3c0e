"""What is on record of attempts that did not go well: the reason, and nothing of a row."""

from __future__ import annotations

import json
import os
import signal

from app.db.attempts import AttemptLog, list_logs
from tests.rig import Rig, wait_for


def logs(rig: Rig, job_id: str) -> list[AttemptLog]:
    with rig.db.begin() as conn:
        return list_logs(conn, job_id, since=None, limit=100)


def events(rig: Rig, job_id: str, step: str) -> list[str]:
    return [line["event"] for log in logs(rig, job_id) if log.step == step for line in log.lines]


def test_a_child_that_dies_is_named_in_the_log_of_its_attempt(rig: Rig) -> None:
    rig.steer("crash", "heads", "1")
    job_id = rig.submit(kind="identify_heads")

    with rig.in_process():
        rig.ended(job_id)

    first, second = (log for log in logs(rig, job_id) if log.step == "heads")
    died = next(line for line in first.lines if line["event"] == "process.died")
    assert (died["level"], died["facts"]["returncode"]) == ("error", -signal.SIGKILL)
    assert second.lines[-1]["facts"]["outcome"] == "done"


def test_an_error_stands_in_the_log_by_its_code_and_never_by_its_text(rig: Rig) -> None:
    rig.steer("fail", "heads", "quotes a row")
    job_id = rig.submit(kind="identify_heads")

    with rig.in_process():
        assert rig.ended(job_id).status == "failed"

    failed = next(line for log in logs(rig, job_id) for line in log.lines if line["event"] == "step.failed")
    assert failed["facts"] == {"code": "engine.failed"}
    assert "secret row" not in json.dumps([log.lines for log in logs(rig, job_id)])


def test_an_attempt_whose_worker_dies_has_at_least_its_beginning(rig: Rig) -> None:
    rig.steer("hold", "heads")
    job_id = rig.submit(kind="identify_heads")
    worker = rig.worker()
    rig.reached("heads")

    os.kill(worker.pid, signal.SIGKILL)
    wait_for(lambda: worker.poll() is not None, "the end of the worker")

    assert events(rig, job_id, "heads")[0] == "attempt.began"


def test_a_pause_is_noted_with_its_reason_and_leaves_a_checkpoint(rig: Rig) -> None:
    rig.steer("hold", "train", "2")
    job_id = rig.submit()
    with rig.in_process():
        rig.reached("train")
        rig.pause(job_id)
        rig.paused(job_id)
        rig.let_go("train")

    stops = next(
        line
        for log in logs(rig, job_id)
        if log.step == "train"
        for line in log.lines
        if line["event"] == "attempt.stops"
    )
    assert stops["facts"] == {"why": "pause"}
    step = next(step for step in rig.steps(job_id) if step.step == "train")
    assert step.checkpoint is not None
    assert step.checkpoint["name"] == "latest"
    assert step.checkpoint["stored_at"]
