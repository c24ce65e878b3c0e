"""A worker that lost its lease changes nothing any more, however late it wakes up; the database may drop everybody."""

from __future__ import annotations

import os
import signal
import threading

from sqlalchemy import text

from tests.faults.test_crashes import undisturbed
from tests.rig import Rig, wait_for


def test_a_worker_that_slept_past_its_lease_publishes_nothing(rig: Rig) -> None:
    reference = undisturbed(rig)
    rig.steer("hold", "train")
    job_id = rig.submit()
    sleeper = rig.worker()
    first = rig.reached("train")
    os.kill(sleeper.pid, signal.SIGSTOP)
    (rig.stub / "reached-train").unlink()

    with rig.in_process():
        assert rig.reached("train") != first
        rig.let_go("train")  # both children end the step now; only one parent may say so
        assert rig.ended(job_id).status == "succeeded"
    before = rig.artifacts(job_id)
    os.kill(sleeper.pid, signal.SIGCONT)

    # The sleeper is awake and itself again: it does the next job.
    rig.waker.wake(rig.settings.worker_queue)
    later = rig.submit(kind="identify_heads")
    assert rig.ended(later).status == "succeeded"
    assert rig.artifacts(job_id) == before
    assert [a.outcome for a in rig.attempts(job_id) if a.step == "train"] == ["lost", "done"]
    rig.check(job_id, like=reference)
    rig.check(later)


def test_a_database_that_drops_all_connections_again_and_again_loses_nothing(rig: Rig) -> None:
    reference = undisturbed(rig)
    job_id = rig.submit()
    over = threading.Event()

    def drop() -> None:
        others = (
            "select pg_terminate_backend(pid) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
        gap_s = 0.15
        while not over.wait(gap_s):
            gap_s *= 1.1  # a busy machine takes longer to come back than others: in the end it gets through
            with rig.db.execution_options(isolation_level="AUTOCOMMIT").connect() as conn:
                conn.execute(text(others))

    dropper = threading.Thread(target=drop)
    with rig.in_process(2):
        dropper.start()
        try:
            wait_for(lambda: len(rig.runs()) >= 14, "some steps under fire")
        finally:
            over.set()
            dropper.join()
        assert rig.ended(job_id).status == "succeeded"

    rig.check(job_id, like=reference)
