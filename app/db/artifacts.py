"""Rows about immutable stored files: which job's step published which sha256 under which name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, insert, select, update

from app.db.engine import Connection
from app.db.ids import new_id
from app.db.objects import hold_objects
from app.db.tables import artifacts, steps


@dataclass(frozen=True, kw_only=True, slots=True)
class NewArtifact:
    """A file that lies in the store and waits to be registered with the end of its step."""

    name: str
    media_type: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """A registered file of a job."""

    id: str
    job_id: str
    step_id: str
    name: str
    media_type: str
    sha256: str
    size_bytes: int
    created_at: datetime


_FIELDS = [artifacts.c[name] for name in Artifact.__dataclass_fields__]


def insert_artifacts(conn: Connection, job_id: str, step_id: str, new: Sequence[NewArtifact]) -> list[Artifact]:
    """Register files of one step; a name can be registered once per job. Raises ObjectCollected."""
    if not new:
        return []
    hold_objects(conn, (artifact.sha256 for artifact in new))
    values = [
        {
            "id": new_id("art"),
            "job_id": job_id,
            "step_id": step_id,
            "name": artifact.name,
            "media_type": artifact.media_type,
            "sha256": artifact.sha256,
            "size_bytes": artifact.size_bytes,
        }
        for artifact in new
    ]
    rows = conn.execute(insert(artifacts).values(values).returning(*_FIELDS))
    return [Artifact(**row._mapping) for row in rows]


def list_artifacts(conn: Connection, job_id: str) -> list[Artifact]:
    """All files of a job, by name."""
    query = _there().where(artifacts.c.job_id == job_id).order_by(artifacts.c.name)
    return [Artifact(**row._mapping) for row in conn.execute(query)]


def get_artifact(conn: Connection, artifact_id: str) -> Artifact | None:
    """The file, or None."""
    row = conn.execute(_there().where(artifacts.c.id == artifact_id)).first()
    return Artifact(**row._mapping) if row else None


def find_artifact(conn: Connection, job_id: str, name: str) -> Artifact | None:
    """The file of that name, for example `report.json`, or None."""
    row = conn.execute(_there().where(artifacts.c.job_id == job_id, artifacts.c.name == name)).first()
    return Artifact(**row._mapping) if row else None


def delete_artifact(conn: Connection, artifact_id: str) -> None:
    """Forget a file of a locked job; its step is no longer one whose outputs a later job could take."""
    gone = update(artifacts).where(artifacts.c.id == artifact_id).values(deleted_at=func.now())
    step_id = conn.execute(gone.returning(artifacts.c.step_id)).scalar_one()
    conn.execute(update(steps).where(steps.c.id == step_id).values(fingerprint=None))


def deleted_names(conn: Connection, job_id: str) -> list[str]:
    """Names of the files that a job had made and that were deleted since."""
    gone = artifacts.c.deleted_at.is_not(None)
    return list(conn.scalars(select(artifacts.c.name).where(artifacts.c.job_id == job_id, gone)))


def _there() -> Select[Any]:
    return select(*_FIELDS).where(artifacts.c.deleted_at.is_(None))
