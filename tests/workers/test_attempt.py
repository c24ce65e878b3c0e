"""A step in a worker: from claim to published files, and each way it can end."""

from __future__ import annotations

from tests.rig import Rig


def test_a_job_runs_from_its_dataset_to_its_report(rig: Rig) -> None:
    job_id = rig.submit()

    with rig.in_process():
        job = rig.ended(job_id)

    assert job.status == "succeeded", job.error
    rig.check(job_id)
