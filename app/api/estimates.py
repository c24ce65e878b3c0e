"""Estimates: what a job would take, for the same body as a job. Makes and stores nothing; a file is checked and let go."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from app.api.bodies import Received, receive
from app.api.context import Context, IdempotencyKey, Services
from app.api.documentation import JOB_BODY, errors
from app.api.job_requests import FILES, REFUSALS, inspect_job, parse_job
from app.core.forecast import Known, forecast
from app.estimate_schemas import EstimateView
from p2d.config import config_json

router = APIRouter(tags=["jobs"])


@router.post("/estimates", response_model=EstimateView, responses=errors(*REFUSALS), openapi_extra=JOB_BODY)
async def estimate_job(request: Request, services: Context, key: IdempotencyKey) -> Response:
    """What a job would take: seconds by step and the wait before them as intervals, memory, bytes, cost, the projected AER,
    what every `auto` means, what does not fit and what would. The body is that of POST /jobs, and so is what is refused.

    It makes nothing, so an Idempotency-Key is taken and not needed.
    """
    async with receive(request, services.settings, files=FILES, json_part="job", json=True) as received:
        return await run_in_threadpool(answer_estimate, services, received)


def answer_estimate(services: Services, received: Received) -> Response:
    """The answer to a request for a job that is not to be made."""
    asked = parse_job(received)
    assert services.caller is not None, "nobody has come in"
    settings = services.settings
    known = Known(
        outlook=services.lookout.outlook(
            project_id=services.caller.project_id, queue=settings.worker_queue, priority=asked.body.priority
        ),
        shard_rows=settings.shard_rows,
        device=settings.device,
        cost_per_hour=settings.cost_per_hour,
    )
    with ExitStack() as stack:
        inspected = inspect_job(services, asked, received, stack, refused=[])  # nothing is stored, no report either
        with services.engine.connect() as conn:
            checked = inspected.check(conn)
            given, map_scorer = (checked.dataset, checked.validation), checked.earlier.map_scorer
            found = forecast(conn, asked.body.config(), checked.model, *given, known, map_scorer=map_scorer)
    view = EstimateView.model_validate(
        {
            **asdict(found),
            "config": config_json(found.resolution.config),
            "reasons": found.resolution.reasons,
            "fits": not found.misfits,
        }
    )
    return JSONResponse(view.model_dump(mode="json"))
