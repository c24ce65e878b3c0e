"""A job's steps as the ledger records them: what the engine planned, with queue, model and weight. Runs nothing."""

from __future__ import annotations

from app.db.steps import NewStep
from p2d.config import JobConfig
from p2d.pipeline import STEPS, plan_steps

GUESSED_S = {
    "validate": 5.0,
    "heads": 60.0,
    "respond": 60.0,
    "select": 2.0,
    "train": 90.0,
    "evaluate": 60.0,
    "package": 1.0,
}
"""Seconds per step (all shards together) until the job's own plan says better. A guess; only its proportions matter."""


def plan_job(config: JobConfig, *, rows: int, shard_rows: int, queue: str, model_digest: str) -> list[NewStep]:
    """The steps of a job over `rows` rows, in an order that respects what each waits for."""
    return [
        NewStep(
            step=planned.step,
            shard=planned.shard,
            shards=planned.shards,
            after=planned.after,
            queue=queue,
            model_digest=model_digest if STEPS[planned.step].needs_model else None,
            weight=GUESSED_S.get(planned.step, 10.0) / planned.shards,
        )
        for planned in plan_steps(config, rows, shard_rows)
    ]
