"""The steps that the service records for a job are those that the engine runs without it."""

from __future__ import annotations

import pytest

from app.core.plan import plan_job
from app.settings import Settings
from p2d.config import JobConfig
from p2d.pipeline import SHARD_ROWS, plan_steps


@pytest.mark.parametrize("rows", [100, 2001, 4097, 50_000])
def test_the_service_cuts_a_job_into_the_shards_of_p2d_run(rows: int) -> None:
    recorded = plan_job(JobConfig(), rows=rows, shard_rows=Settings().shard_rows, queue="q", model_digest="d")

    run = plan_steps(JobConfig(), rows, SHARD_ROWS)
    assert [(step.step, step.shard, step.shards) for step in recorded] == [(s.step, s.shard, s.shards) for s in run]
