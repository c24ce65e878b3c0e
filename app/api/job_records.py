"""What is on record of a job's work: its workers' notes, its checkpoints, and the metrics that its steps told."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from app.api.content import STORED
from app.api.context import Context, Cursor, JobId, Limit, Link, Services, page_after, page_of
from app.api.cursors import read_cursor, write_cursor
from app.api.documentation import errors
from app.api.etags import IfNoneMatch
from app.api.head_maps import get_one_head_map
from app.api.selections import get_one_selection
from app.db.artifacts import list_artifacts
from app.db.attempts import AttemptLog, list_logs
from app.db.engine import Connection
from app.db.events import MetricEvent, list_metrics
from app.db.head_maps import head_map_of_job
from app.db.ids import ID_PATTERN
from app.db.jobs import find_job
from app.db.selections import selection_of_job
from app.db.steps import Step, list_steps
from app.errors import CursorInvalid, HeadMapNotFound, JobNotFound, SelectionNotFound
from app.result_schemas import HeadMapView, SelectionView
from app.views import CheckpointView, JobMetricsView, LogLineView, MetricSeriesView, Page

router = APIRouter(tags=["jobs"])

LOGS_AT_ONCE = 20
"""Logs of attempts read at a time: a job may have hundreds of attempts, and a page ends within a few."""

Points = Annotated[
    int,
    Query(ge=2, le=5000, description="About how many points of a step (shard) at most; evenly left out above that."),
]

_CSV: dict[int | str, dict[str, Any]] = {200: {"description": "A table.", "content": {"text/csv": {}}}}


@router.get("/jobs/{id}/logs", responses=errors(JobNotFound))
def get_job_logs(
    job_id: JobId, services: Context, link: Link, limit: Limit = 20, cursor: Cursor = None
) -> Page[LogLineView]:
    """What workers noted of the job's attempts, attempt by attempt, oldest first; of each the newest 200 lines."""
    since, skipped = _log_place(cursor)
    with services.engine.connect() as conn:
        find_job(conn, job_id)
        lines: list[LogLineView] = []
        places: list[list[Any]] = []
        for log in _logs(conn, job_id, since):
            # A log that grows drops lines at its beginning: places count from the first line that there ever was.
            for number, line in enumerate(log.lines, start=log.dropped):
                if (log.id, number) < (since or "", skipped):
                    continue
                lines.append(_line(log, line))
                places.append([log.id, number])
                if len(lines) > limit:
                    return link(Page(data=lines[:limit], has_more=True, next_cursor=write_cursor(places[limit])))
    return Page(data=lines, has_more=False)


@router.get("/jobs/{id}/checkpoints", responses=errors(JobNotFound))
def get_job_checkpoints(
    job_id: JobId, services: Context, link: Link, limit: Limit = 20, cursor: Cursor = None
) -> Page[CheckpointView]:
    """What the job would go on from: the outputs of every step that is done, and the state of a training that is not."""
    after = page_after(cursor)
    with services.engine.connect() as conn:
        find_job(conn, job_id)
        kept = [step for step in list_steps(conn, job_id) if step.status == "done" or step.checkpoint is not None]
        kept = [step for step in kept if after is None or step.id > after][: limit + 1]
        files = _files(conn, job_id)
    views = [_checkpoint(step, files.get(step.id, [])) for step in kept]
    return link(Page[CheckpointView].model_validate(page_of(views, [step.id for step in kept], limit)))


@router.get("/jobs/{id}/metrics", responses=errors(JobNotFound))
def get_job_metrics(job_id: JobId, services: Context, points: Points = 500) -> JobMetricsView:
    """Every metric that the job's steps told, as series; `training.json` has each optimizer step of a finished job."""
    events, thinned = _metrics(services, job_id, points)
    series: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for event, name, value in _values(events):
        point = {"seq": event.seq, "at": event.at, "value": value}
        point |= {key: event.data[key] for key in ("attempt", "done", "total")}
        series.setdefault((event.data["step"], event.data["shard"], name), []).append(point)
    return JobMetricsView(
        job_id=job_id,
        thinned=thinned,
        series=[
            MetricSeriesView.model_validate({"step": step, "shard": shard, "name": name, "points": found})
            for (step, shard, name), found in series.items()
        ],
    )


@router.get("/jobs/{id}/metrics.csv", response_class=Response, responses={**_CSV, **errors(JobNotFound)})
def get_job_metrics_csv(job_id: JobId, services: Context, points: Points = 5000) -> Response:
    """The same as a table, a line for each value."""
    events, _ = _metrics(services, job_id, points)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["seq", "at", "step", "shard", "attempt", "done", "total", "name", "value"])
    for event, name, value in _values(events):
        where = [event.data[key] for key in ("step", "shard", "attempt", "done", "total")]
        table.writerow([event.seq, event.at.isoformat(), *where, name, value])
    return Response(text.getvalue(), media_type="text/csv")


@router.get("/jobs/{id}/head-map", response_model=HeadMapView, responses=errors(JobNotFound, HeadMapNotFound, *STORED))
def get_job_head_map(job_id: JobId, services: Context, if_none_match: IfNoneMatch = None) -> Response:
    """The head map that the job made; 404 before it has one, and where it took an earlier one."""
    with services.engine.connect() as conn:
        find_job(conn, job_id)
        found = head_map_of_job(conn, job_id)
    if found is None:
        raise HeadMapNotFound(id=f"{job_id}/head-map")
    return get_one_head_map(found.id, services, if_none_match)


@router.get("/jobs/{id}/selection", response_model=SelectionView, responses=errors(JobNotFound, SelectionNotFound))
def get_job_selection(job_id: JobId, services: Context, if_none_match: IfNoneMatch = None) -> Response:
    """The selection that the job made; 404 before it has one, and where it took an earlier one."""
    with services.engine.connect() as conn:
        find_job(conn, job_id)
        found = selection_of_job(conn, job_id)
    if found is None:
        raise SelectionNotFound(id=f"{job_id}/selection")
    return get_one_selection(found.id, services, if_none_match=if_none_match)


def _logs(conn: Connection, job_id: str, since: str | None) -> Iterator[AttemptLog]:
    while found := list_logs(conn, job_id, since=since, limit=LOGS_AT_ONCE + 1):
        yield from found[:LOGS_AT_ONCE]
        if len(found) <= LOGS_AT_ONCE:
            return
        since = found[-1].id


def _line(log: AttemptLog, line: dict[str, Any]) -> LogLineView:
    where = {"attempt_id": log.id, "step": log.step, "shard": log.shard, "attempt": log.token}
    return LogLineView.model_validate({**where, **line})


def _log_place(cursor: str | None) -> tuple[str | None, int]:
    """The attempt and the number of the line that a page begins with."""
    if cursor is None:
        return None, 0
    value = read_cursor(cursor)
    if not (isinstance(value, list) and len(value) == 2 and type(value[1]) is int and isinstance(value[0], str)):
        raise CursorInvalid()
    if not re.fullmatch(ID_PATTERN, value[0]):
        raise CursorInvalid()
    return value[0], value[1]


def _files(conn: Connection, job_id: str) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for artifact in list_artifacts(conn, job_id):
        file = {"name": artifact.name, "sha256": artifact.sha256, "artifact_id": artifact.id}
        found.setdefault(artifact.step_id, []).append(file)
    return found


def _checkpoint(step: Step, files: list[dict[str, Any]]) -> CheckpointView:
    where = {"step": step.step, "shard": step.shard}
    if step.status == "done":
        done = {"kind": "outputs", "name": step.step, "attempt": step.token, "stored_at": step.finished_at}
        return CheckpointView.model_validate({**where, **done, "files": files})
    kept = step.checkpoint or {}
    return CheckpointView.model_validate(
        {
            **where,
            "kind": "training",
            "name": kept.get("name", ""),
            "attempt": kept.get("attempt", step.token),
            "stored_at": kept.get("stored_at"),
            "files": [{"name": n, "sha256": s, "artifact_id": None} for n, s in kept.get("files", {}).items()],
        }
    )


def _metrics(services: Services, job_id: str, points: int) -> tuple[list[MetricEvent], bool]:
    with services.engine.connect() as conn:
        find_job(conn, job_id)
        return list_metrics(conn, job_id, points=points)


def _values(events: list[MetricEvent]) -> Iterator[tuple[MetricEvent, str, float]]:
    for event in events:
        for name, value in event.data["values"].items():
            yield event, name, value
