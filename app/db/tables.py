"""Every table of the ledger, as SQLAlchemy Core metadata. The migrations build the same; a test compares the two.

PostgreSQL holds rows, hashes and small JSON, never dataset text: bytes live in the store, named by sha256.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

DEFAULT_PROJECT = "prj_00000000000000000000000000"
"""The project of a service without keys."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _now() -> Column[object]:
    return Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now())


def _time(name: str) -> Column[object]:
    return Column(name, DateTime(timezone=True))


SPOKEN_FOR = func.coalesce(func.nullif(func.current_setting("p2d.project", True), ""), DEFAULT_PROJECT)
"""The project that the transaction speaks for (`app.db.engine.for_project`)."""


def _project(**options: Any) -> Column[str]:
    # PostgreSQL fills it in.
    return Column("project_id", Text, ForeignKey("projects.id"), nullable=False, server_default=SPOKEN_FOR, **options)


projects = Table(
    "projects",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    _now(),
    _time("served_at"),  # when a step of it was claimed last: whose turn it is
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("project_id", Text, ForeignKey("projects.id"), nullable=False, index=True),
    Column("scope", Text, nullable=False),
    Column("name", Text, nullable=False, server_default=""),
    Column("secret_hmac", Text, nullable=False),  # the secret itself is nowhere
    _now(),
    _time("expires_at"),
    _time("revoked_at"),
    _time("used_at"),  # to the minute
)

audit = Table(
    "audit",
    metadata,
    Column("id", Text, primary_key=True),
    _project(),
    Column("actor", Text, nullable=False),  # id of a key, or who needs none
    Column("action", Text, nullable=False),
    Column("object_id", Text, nullable=False, index=True),  # which may be gone
    Column("request_id", Text),
    Column("facts", JSONB, nullable=False),
    _now(),
    Index(None, "project_id", "id"),
)

datasets = Table(
    "datasets",
    metadata,
    Column("id", Text, primary_key=True),
    _project(),
    Column("name", Text, nullable=False, server_default=""),
    Column("format", Text, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),  # of the file as uploaded
    Column("raw_sha256", Text),  # of the same; null where there was no file
    Column("content_hash", Text, nullable=False),  # of prompts and answers alone, whatever the format
    Column("sha256", Text, nullable=False),  # the normalised rows in the store
    Column("stored_bytes", BigInteger, nullable=False),
    Column("report", JSONB, nullable=False),
    _now(),
    _time("deleted_at"),
    Index(None, "sha256"),
    Index(None, "project_id", "id"),
)

reports = Table(
    "reports",
    metadata,
    Column("id", Text, primary_key=True),
    _project(),
    Column("name", Text, nullable=False, server_default=""),
    Column("code", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("report", JSONB, nullable=False),  # counts; as that of a dataset
    Column("sha256", Text, nullable=False),  # the faults in the store
    Column("stored_bytes", BigInteger, nullable=False),
    _now(),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Index(None, "project_id", "id"),
    Index(None, "sha256"),
    Index(None, "expires_at"),
)

objects = Table(
    "objects",
    metadata,
    Column("sha256", Text, primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    Column("generation", Integer, nullable=False, server_default=text("0")),  # one more each time it is to be removed
    Column("used_at", DateTime(timezone=True), nullable=False, server_default=func.now()),  # last put or registered
    _time("stored_at"),  # null: announced, or to be removed; its bytes may be in the store or not
    _time("collected_at"),  # when it was removed; null again once it is announced anew
)
Index("ix_objects_used_at", objects.c.used_at, postgresql_where=objects.c.collected_at.is_(None))

uploads = Table(
    "uploads",
    metadata,
    Column("id", Text, primary_key=True),
    _project(),
    Column("name", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", Text),  # of the whole file, where its sender said it
    Column("part_bytes", BigInteger, nullable=False),
    Column("dataset_id", Text, ForeignKey("datasets.id")),  # what it became
    _now(),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    _time("deleted_at"),
    _time("emptied_at"),  # when its parts were removed from the store
    Index(None, "expires_at"),
    Index(None, "project_id", "id"),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("upload_id", Text, ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("sha256", Text, primary_key=True),
    _time("stored_at"),  # null: announced; its bytes may be in the store or not
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Text, primary_key=True),
    _project(),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False, server_default=""),
    Column("status", Text, nullable=False, server_default="queued"),
    Column("stage", Text),
    Column("config", JSONB, nullable=False),  # as asked
    Column(
        "resolved", JSONB
    ),  # without "auto" as far as it is decided, with reasons; set when the validate step is done
    Column("dataset_id", Text, ForeignKey("datasets.id"), nullable=False),
    Column("validation_dataset_id", Text, ForeignKey("datasets.id")),
    Column("base_model", Text, nullable=False),
    Column("model_digest", Text, nullable=False),
    Column("queue", Text, nullable=False, server_default="default"),
    Column("priority", Integer, nullable=False, server_default=text("0")),
    Column("progress", Double, nullable=False, server_default=text("0")),
    Column("estimate", JSONB),  # seconds per step, from the plan
    _time("progress_at"),  # of the newest `job.progress` event
    _time("eta_at"),
    _time("eta_p10_at"),
    _time("eta_p90_at"),
    Column("max_seconds", Integer),
    Column("max_gpu_seconds", Integer),
    _time("deadline_at"),
    # What an export is of. No rule against a circle of references: artifacts are deleted with their jobs, or not at all.
    Column("adapter_id", Text, ForeignKey("artifacts.id", ondelete="SET NULL", use_alter=True)),
    # The weights of a merged model that is its base.
    Column("base_artifact_id", Text, ForeignKey("artifacts.id", ondelete="SET NULL", use_alter=True)),
    Column("artifact_ttl", Integer),  # seconds from the end of the job; null: its files stay
    Column("error", JSONB),
    Column("metadata", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("event_seq", Integer, nullable=False, server_default=text("0")),
    _time("cancel_requested_at"),
    _time("pause_requested_at"),  # null again once the job was told to go on
    Column(
        "webhooks", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")
    ),  # those it names; they may be gone
    _time("paused_at"),  # the clock of max_seconds stands still since then, until the next claim
    Column("paused_s", Double, nullable=False, server_default=text("0")),  # seconds for which it did so before
    Column("retries", Integer, nullable=False, server_default=text("0")),
    _now(),
    _time("started_at"),
    _time("finished_at"),
    Index(None, "project_id", "id"),
    Index(None, "adapter_id", postgresql_where=text("adapter_id is not null")),
    Index(None, "base_artifact_id", postgresql_where=text("base_artifact_id is not null")),
    Index(None, "project_id", "status", "id"),
    Index(None, "dataset_id"),
    postgresql_with={"fillfactor": 70},  # progress rewrites the row each second: leave room for HOT updates
)

steps = Table(
    "steps",
    metadata,
    Column("id", Text, primary_key=True),
    _project(),  # of its job, so that a claim reads one table
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("step", Text, nullable=False),
    Column("shard", Integer, nullable=False, server_default=text("0")),
    Column("shards", Integer, nullable=False, server_default=text("1")),
    Column("after", ARRAY(Text), nullable=False, server_default=text("'{}'::text[]")),  # names of steps
    Column("status", Text, nullable=False),
    Column("token", Integer, nullable=False, server_default=text("0")),  # fencing token of the newest attempt
    _time("lease_until"),  # not indexed, so that heartbeats stay HOT
    Column("worker", Text),
    Column("crashes", Integer, nullable=False, server_default=text("0")),
    Column("queue", Text, nullable=False),
    Column("priority", Integer, nullable=False, server_default=text("0")),  # of its job
    Column("model_digest", Text),  # null: this step needs no model
    Column("weight", Double, nullable=False, server_default=text("1")),  # estimated seconds
    Column("progress", Double, nullable=False, server_default=text("0")),
    Column("checkpoint", JSONB),
    Column("facts", JSONB),
    Column(
        "fingerprint", Text
    ),  # where outputs can be used again: of a step that is done its own, before that the expected
    Column("reused", JSONB),  # {"job_id", "seconds"} of the attempt that computed its outputs for an earlier job
    Column("seconds", Double),
    _now(),
    _time("started_at"),
    _time("finished_at"),
    UniqueConstraint("job_id", "step", "shard"),
    postgresql_with={"fillfactor": 70},
)
Index("ix_steps_ready", steps.c.queue, steps.c.id, postgresql_where=steps.c.status == "ready")
Index("ix_steps_fingerprint", steps.c.fingerprint, postgresql_where=steps.c.fingerprint.is_not(None))
Index(
    "ix_steps_judged",
    steps.c.step,
    steps.c.finished_at,
    postgresql_where=text("status = 'done' and token = 1 and weight >= 0.5"),  # as app.db.estimates.is_judged has it
)
Index("ix_steps_running", steps.c.id, postgresql_where=steps.c.status == "running")

attempts = Table(
    "attempts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("step_id", Text, ForeignKey("steps.id", ondelete="CASCADE"), nullable=False),
    Column("token", Integer, nullable=False),
    Column("worker", Text, nullable=False),
    Column("outcome", Text, nullable=False, server_default="running"),
    Column("error", JSONB),
    Column("log", JSONB),  # the newest lines that its worker noted
    Column("log_dropped", Integer, nullable=False, server_default=text("0")),  # older ones that are gone
    Column("seconds", Double),
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    _time("finished_at"),
    UniqueConstraint("step_id", "token"),
    Index(None, "job_id"),
)

artifacts = Table(
    "artifacts",
    metadata,
    Column("id", Text, primary_key=True),
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("step_id", Text, ForeignKey("steps.id", ondelete="CASCADE"), nullable=False),
    Column("name", Text, nullable=False),
    Column("media_type", Text, nullable=False),
    Column("sha256", Text, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    _now(),
    _time("deleted_at"),
    _time("expires_at"),  # set when its job ends, or by its owner; null: it stays as long as its job
    UniqueConstraint("job_id", "name"),
    Index(None, "step_id"),
    Index(None, "sha256"),
)

head_maps = Table(
    "head_maps",
    metadata,
    Column("id", Text, primary_key=True),
    _project(),  # of its job, where it has one
    # One that was imported has neither job nor dataset, and instead of an artifact the object itself.
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), unique=True),
    Column("artifact_id", Text, ForeignKey("artifacts.id", ondelete="CASCADE")),
    Column("sha256", Text),
    Column("size_bytes", BigInteger),
    Column("base_model", Text, nullable=False),
    Column("model_digest", Text, nullable=False),
    Column("dataset_id", Text, ForeignKey("datasets.id")),
    Column("scorer", Text, nullable=False),
    _now(),
    Index(None, "project_id", "id"),
    Index(None, "artifact_id"),
    Index(None, "sha256"),
)

selections = Table(
    "selections",
    metadata,
    Column("id", Text, primary_key=True),
    _project(),  # of its job
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, unique=True),
    Column("artifact_id", Text, ForeignKey("artifacts.id", ondelete="CASCADE"), nullable=False),
    Column("base_model", Text, nullable=False),
    Column("model_digest", Text, nullable=False),
    Column("dataset_id", Text, ForeignKey("datasets.id"), nullable=False),
    Column("validation_dataset_id", Text, ForeignKey("datasets.id")),
    Column("scorer", Text, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("kept", Integer, nullable=False),
    _now(),
    Index(None, "project_id", "id"),
    Index(None, "artifact_id"),
)

comparisons = Table(
    "comparisons",
    metadata,
    Column("id", Text, primary_key=True),
    _project(),
    Column("name", Text, nullable=False, server_default=""),
    Column("job_ids", ARRAY(Text), nullable=False),  # in their order; a job may be gone
    _now(),
    Index(None, "project_id", "id"),
)

tallies = Table(
    "tallies",
    metadata,
    # What app.db.measures counts of jobs that were deleted, so that no counter ever falls.
    Column("name", Text, primary_key=True),
    Column("step", Text, primary_key=True),
    Column("outcome", Text, primary_key=True),
    Column("code", Text, primary_key=True),
    Column("bucket", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
    Column("total", Double, nullable=False),
)

events = Table(
    "events",
    metadata,
    Column("job_id", Text, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("type", Text, nullable=False),
    Column("data", JSONB, nullable=False),
    _now(),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", Text, primary_key=True),
    _project(),
    Column("url", Text, nullable=False),
    Column("events", ARRAY(Text), nullable=False),
    Column("jobs", Text, nullable=False, server_default="all"),  # of which it is told: all, or those that name it
    Column("description", Text, nullable=False, server_default=""),
    Column("enabled", Boolean, nullable=False, server_default=text("true")),
    Column("disabled_reason", Text),  # where the service did it
    Column("secret_version", Integer, nullable=False, server_default=text("1")),  # the secret itself is nowhere
    Column("pepper_mark", Text, nullable=False),  # which pepper the secret comes from
    _time("rotated_at"),
    _time("failing_since"),  # the first failed try since the last that succeeded
    _now(),
    Index(None, "project_id", "id"),
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", Text, primary_key=True),  # also the `webhook-id` that is sent
    _project(),
    Column("webhook_id", Text, ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("job_id", Text),  # which may be gone
    Column("type", Text, nullable=False),
    Column("data", JSONB, nullable=False),
    Column("status", Text, nullable=False, server_default="pending"),
    Column("token", Integer, nullable=False, server_default=text("0")),  # fencing token of the newest try
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("tries", Integer, nullable=False, server_default=text("0")),  # the same, since it was last asked for
    _time("lease_until"),  # somebody is sending it
    Column("next_try_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    _time("tried_at"),
    Column("response_status", Integer),
    Column("error", Text),
    _now(),
    _time("finished_at"),
    Index(None, "webhook_id", "id"),
    Index(None, "finished_at"),
)
Index(
    "ix_webhook_deliveries_due",
    webhook_deliveries.c.next_try_at,
    postgresql_where=webhook_deliveries.c.status == "pending",
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    _project(primary_key=True),
    Column("route", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("request_hash", Text, nullable=False),
    Column("status_code", Integer),  # null until the first request has its answer
    Column("headers", JSONB),
    Column("body", JSONB),
    _now(),
)
