"""What the caller's project has, and the most that it may have."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.context import Context
from app.db.estimates import absolute_errors
from app.db.usage import open_jobs, stored_bytes, stored_rows, webhooks_made
from app.key_schemas import EstimateErrorView, UsageView

router = APIRouter(tags=["service"])


@router.get("/usage")
def get_usage(services: Context) -> UsageView:
    """Unfinished jobs, stored bytes, dataset rows and webhooks of the project, each with its quota; its rate; how far
    estimates were off.
    """
    settings = services.settings
    with services.engine.connect() as conn:
        return UsageView(
            unfinished_jobs=open_jobs(conn),
            unfinished_jobs_quota=settings.quota_jobs,
            stored_bytes=stored_bytes(conn),
            stored_bytes_quota=settings.quota_bytes,
            rows=stored_rows(conn),
            rows_quota=settings.quota_rows,
            webhooks=webhooks_made(conn),
            webhooks_quota=settings.quota_webhooks,
            requests_per_minute=settings.rate_per_minute,
            estimate_errors={
                step: EstimateErrorView.model_validate(error) for step, error in absolute_errors(conn).items()
            },
        )
