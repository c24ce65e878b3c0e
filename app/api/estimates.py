"""Estimates: what a job would take, for the same body as a job. Makes and stores nothing; a file is checked and let go."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse

from app.api.bodies import Received, receive, work_folder
from app.api.context import Context, Services
from app.api.documentation import JOB_BODY, errors
from app.api.job_requests import FILES, REFUSALS, check_job, parse_job
from app.core.forecast import forecast
from app.estimate_schemas import EstimateView
from p2d.config import config_json

router = APIRouter(tags=["jobs"])


@router.post("/estimates", response_model=EstimateView, responses=errors(*REFUSALS), openapi_extra=JOB_BODY)
async def estimate_job(request: Request, services: Context) -> Response:
    """What a job would take: seconds by step as intervals, bytes, the projected AER, what every `auto` means, and what does
    not fit. The body is that of POST /jobs, and so is what is refused.
    """
    async with receive(request, services.settings, files=FILES, json_part="job", json=True) as received:
        return await run_in_threadpool(answer_estimate, services, received)


def answer_estimate(services: Services, received: Received) -> Response:
    """The answer to a request for a job that is not to be made."""
    body = parse_job(received)
    with work_folder(services.settings) as folder:
        checked = check_job(services, body, received, folder)
        with services.engine.connect() as conn:
            found = forecast(
                conn,
                body.config(),
                checked.model,
                checked.dataset,
                checked.validation,
                shard_rows=services.settings.shard_rows,
            )
    view = EstimateView.model_validate(
        {
            **asdict(found),
            "config": config_json(found.resolution.config),
            "reasons": found.resolution.reasons,
            "warnings": found.resolution.warnings,
            "fits": not found.misfits,
        }
    )
    return JSONResponse(view.model_dump(mode="json"))
