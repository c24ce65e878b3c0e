"""A job as the API shows it: the job itself, the configuration it is frozen to, and every try at its steps."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from fastapi import APIRouter, Response

from app.api.context import Context, Cursor, JobId, Limit, Link, page_after, page_of
from app.api.documentation import errors
from app.api.etags import IfNoneMatch, send_view
from app.db.attempts import list_attempts
from app.db.engine import Connection, Json
from app.db.head_maps import head_map_of_job
from app.db.jobs import Job, ListedJob, find_job
from app.db.selections import selection_of_job
from app.errors import JobNotFound
from app.problems import problem_body
from app.views import AttemptView, JobConfigView, JobSummary, JobView, Page

router = APIRouter(tags=["jobs"])


@router.get("/jobs/{id}", response_model=JobView, responses=errors(JobNotFound))
def get_one_job(job_id: JobId, services: Context, if_none_match: IfNoneMatch = None) -> Response:
    """A job as it is now, with an ETag: cheap to poll with If-None-Match, safe to change with If-Match."""
    with services.engine.connect() as conn:
        view = view_of(conn, find_job(conn, job_id))
    return send_view(view, if_none_match)


@router.get("/jobs/{id}/config", response_model=JobConfigView, responses=errors(JobNotFound))
def get_job_config(job_id: JobId, services: Context, if_none_match: IfNoneMatch = None) -> Response:
    """What the job is computed from: as asked, as resolved and why, with seed, digest and versions."""
    with services.engine.connect() as conn:
        job = find_job(conn, job_id)
    resolved = job.resolved or {}
    view = JobConfigView(
        job_id=job.id,
        base_model=job.base_model,
        model_digest=job.model_digest,
        dataset_id=job.dataset_id,
        validation_dataset_id=job.validation_dataset_id,
        config=job.config,
        resolved=resolved.get("config"),
        reasons=resolved.get("reasons", {}),
        seed=job.config["training"]["seed"],
        versions=resolved.get("versions", {}),
        webhooks=job.webhooks,
    )
    return send_view(view, if_none_match)


@router.get("/jobs/{id}/attempts", responses=errors(JobNotFound))
def get_job_attempts(
    job_id: JobId, services: Context, link: Link, limit: Limit = 20, cursor: Cursor = None
) -> Page[AttemptView]:
    """Every try at every step of the job, oldest first: which worker, how it ended, and with what error."""
    after = page_after(cursor)
    with services.engine.connect() as conn:
        find_job(conn, job_id)
        found = list_attempts(conn, job_id, after=after, limit=limit + 1)
    views = [
        AttemptView.model_validate(asdict(one) | {"attempt": one.token, "error": _error(one.error, job_id)})
        for one in found
    ]
    return link(Page[AttemptView].model_validate(page_of(views, [one.id for one in found], limit)))


def summary_of(job: ListedJob) -> JobSummary:
    """A job in a list."""
    return JobSummary.model_validate(_fields(job))


def view_of(conn: Connection, job: Job) -> JobView:
    """A job in full."""
    head_map, selection = head_map_of_job(conn, job.id), selection_of_job(conn, job.id)
    return _view(job, head_map.id if head_map else None, selection.id if selection else None)


def new_view(job: Job) -> JobView:
    """A job that was just made: nothing can have come of it yet."""
    return _view(job, None, None)


def _view(job: Job, head_map: str | None, selection: str | None) -> JobView:
    resolved = job.resolved or {}
    return JobView.model_validate(
        _fields(job)
        | {
            "resolved": resolved.get("config"),
            "reasons": resolved.get("reasons", {}),
            "warnings": resolved.get("warnings", []),
            "head_map": head_map,
            "selection": selection,
        }
    )


def _error(error: Json | None, job_id: str) -> Json | None:
    return problem_body(error, instance=f"/jobs/{job_id}") if error else None


def _fields(job: ListedJob) -> dict[str, Any]:
    values = {one.name: getattr(job, one.name) for one in fields(job)}  # `asdict` would copy all JSON, value by value
    return values | {"error": _error(job.error, job.id)}
