"""The wire of who may and who did: API keys, quotas, audit log, receipts. Shapes and types only, as app.schemas."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from app.schemas import Body, Text
from app.views import View

Scope = Literal["read", "write", "admin"]

Deleted = Literal["job", "dataset", "report", "upload", "head_map", "selection", "artifact"]
"""What a receipt can be about."""

MAX_DAYS = 3650
"""Longest life of a key that expires."""


class KeyBody(Body):
    """What `POST /keys` takes."""

    scope: Scope = Field(description="`write` includes `read`, and `admin` both.")
    name: Annotated[Text, Field(max_length=200)] = Field(default="", description="A name of your own.")
    expires_days: Annotated[float, Field(gt=0, le=MAX_DAYS)] | None = Field(
        default=None, description="Days until it opens nothing any more; absent = until it is revoked."
    )


class KeyView(View):
    """An API key, without what would open anything."""

    id: str
    project: str = Field(description="Name of the project whose data it opens.")
    name: str
    scope: Scope
    state: Literal["active", "expired", "revoked"]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    used_at: datetime | None = Field(description="When it was last used, to the minute.")


class NewKeyView(KeyView):
    """A key that was just made."""

    key: str | None = Field(
        description="Shown here, and never again: null in the answer to a request that came before, with its Idempotency-Key."
    )


class AuditView(View):
    """One deed."""

    id: str
    actor: str = Field(description="Id of the key; `loopback` without keys; `command line` for `p2d keys`; `service`.")
    action: str = Field(description="`job.create`, `dataset.delete`, `artifact.download` ...; actions may grow.")
    object_id: str = Field(description="Id of the thing, which may be gone.")
    request_id: str | None = Field(description="As in the answer's X-Request-Id.")
    facts: dict[str, JsonValue]
    created_at: datetime


class DerivedJobView(View):
    """A job that has read a dataset, and its files."""

    job_id: str
    artifact_ids: list[str]
    size_bytes: int
    audit_id: str | None = Field(
        default=None, description="The entry of the audit log about its deletion, if it was deleted."
    )


class DerivedView(View):
    """What jobs have made of a dataset's rows: chosen rows with their text, scores, adapters."""

    deleted: bool = Field(description="Whether it was deleted too; else it stays until its jobs are deleted.")
    jobs: int
    artifacts: int
    size_bytes: int
    listed: list[DerivedJobView] = Field(description="The jobs, oldest first: the first 1,000.")


class ReceiptView(View):
    """That a thing was deleted. Its rows are gone; its bytes leave the store within the hours of P2D_UNREFERENCED_KEPT_H, unless
    something else has the same."""

    id: str
    what: Deleted
    deleted_at: datetime
    sha256: list[str] = Field(description="Of every stored file that it had.")
    audit_id: str = Field(description="The entry of the audit log that says so.")
    derived: DerivedView | None = Field(default=None, description="Of a dataset: what jobs have made of it.")


class EstimateErrorView(View):
    """How far estimates of seconds were off, whichever way."""

    median: float = Field(
        description="Of |actual / estimated - 1|: at 0.25 half of them were off by more than a quarter."
    )
    runs: int = Field(description="Finished steps, or jobs, behind it: the newest.")


class UsageView(View):
    """What a project has, and the most that it may have."""

    unfinished_jobs: int
    unfinished_jobs_quota: int
    stored_bytes: int = Field(
        description="Of datasets, open uploads, jobs' files and reports; equal ones count each time."
    )
    stored_bytes_quota: int
    rows: int = Field(description="Of all datasets.")
    rows_quota: int
    webhooks: int
    webhooks_quota: int
    requests_per_minute: int = Field(description="The most that are answered, once the service has keys.")
    estimate_errors: dict[str, EstimateErrorView] = Field(
        description="By step, and of whole jobs (`job`); absent where nothing has finished yet."
    )
