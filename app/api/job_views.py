"""A job as the API shows it: one view for every route that answers with a job."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from app.db.engine import Connection
from app.db.head_maps import head_map_of_job
from app.db.jobs import Job
from app.db.selections import selection_of_job
from app.problems import problem_body
from app.schemas import JobSummary, JobView


def summary_of(job: Job) -> JobSummary:
    """A job in a list."""
    return JobSummary.model_validate(_fields(job))


def view_of(conn: Connection, job: Job) -> JobView:
    """A job in full."""
    head_map, selection, resolved = head_map_of_job(conn, job.id), selection_of_job(conn, job.id), job.resolved or {}
    return JobView.model_validate(
        _fields(job)
        | {
            "resolved": resolved.get("config"),
            "reasons": resolved.get("reasons", {}),
            "warnings": resolved.get("warnings", []),
            "head_map": head_map.id if head_map else None,
            "selection": selection.id if selection else None,
        }
    )


def _fields(job: Job) -> dict[str, Any]:
    return asdict(job) | {"error": problem_body(job.error) if job.error else None}
