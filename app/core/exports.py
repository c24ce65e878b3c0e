"""Exports: a head adapter in another form, made by a worker in a job of its own (docs/decisions/0024)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from app.core.lifecycle import open_job
from app.core.results import find_artifact, unexpired
from app.db.artifacts import Artifact
from app.db.artifacts import find_artifact as artifact_of_job
from app.db.engine import Connection
from app.db.jobs import Job, insert_job, lock_job
from app.db.steps import NewStep
from app.errors import ArtifactNotFound
from app.result_errors import NotAnAdapter

WEIGHTS, MANIFEST = "heads.safetensors", "manifest.json"

STEPS: Mapping[str, str] = {"merged": "merge", "peft": "export_peft"}
"""Format -> the step that makes it."""

GUESSED_S = 10.0
"""Seconds of one format. A guess: the files are read and written once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest:
    """An export as asked for."""

    formats: Collection[Literal["merged", "peft"]]
    name: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    artifact_ttl: int | None = None
    webhooks: Sequence[str] = ()
    """Ids, looked up."""


def find_adapter(conn: Connection, artifact_id: str) -> tuple[Artifact, Job]:
    """The weights of an adapter that are there with their manifest, and the job that trained them, locked.

    Raises: ArtifactNotFound, ArtifactExpired, NotAnAdapter.
    """
    job = lock_job(conn, find_artifact(conn, artifact_id).job_id)
    artifact = unexpired(find_artifact(conn, artifact_id))
    assert job is not None
    if artifact.name != WEIGHTS:
        raise NotAnAdapter(id=artifact_id, name=artifact.name)
    manifest = artifact_of_job(conn, job.id, MANIFEST)
    if manifest is None:
        raise ArtifactNotFound(id=f"{job.id}/{MANIFEST}")
    unexpired(manifest)
    return artifact, job


def submit_export(conn: Connection, artifact_id: str, request: ExportRequest, *, queue: str) -> Job:
    """Record an export with its steps and its first event. Raises as `find_adapter` and `keep_base`; nothing is written then."""
    adapter, trained = find_adapter(conn, artifact_id)
    job = insert_job(
        conn,
        kind="export",
        name=request.name,
        config={**trained.config, "kind": "export"},
        dataset_id=trained.dataset_id,
        validation_dataset_id=trained.validation_dataset_id,
        base_model=trained.base_model,
        model_digest=trained.model_digest,
        queue=queue,
        priority=request.priority,
        max_seconds=None,
        metadata=dict(request.metadata),
        resolved=trained.resolved or {},
        artifact_ttl=request.artifact_ttl,
        adapter_id=adapter.id,
        webhooks=request.webhooks,
        base_artifact_id=trained.base_artifact_id,
    )
    planned = [
        NewStep(step=STEPS[one], shard=0, shards=1, after=(), queue=queue, model_digest=None, weight=GUESSED_S)
        for one in sorted(set(request.formats))
    ]
    open_job(conn, job, planned)
    return job
