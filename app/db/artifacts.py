"""Rows about immutable stored files: which job's step published which sha256 under which name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import insert, select

from app.db.engine import Connection
from app.db.ids import new_id
from app.db.objects import hold_objects
from app.db.tables import artifacts


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
    rows = conn.execute(insert(artifacts).values(values).returning(artifacts))
    return [Artifact(**row._mapping) for row in rows]


def list_artifacts(conn: Connection, job_id: str) -> list[Artifact]:
    """All files of a job, by name."""
    query = select(artifacts).where(artifacts.c.job_id == job_id).order_by(artifacts.c.name)
    return [Artifact(**row._mapping) for row in conn.execute(query)]


def get_artifact(conn: Connection, artifact_id: str) -> Artifact | None:
    """The file, or None."""
    row = conn.execute(select(artifacts).where(artifacts.c.id == artifact_id)).first()
    return Artifact(**row._mapping) if row else None


def find_artifact(conn: Connection, job_id: str, name: str) -> Artifact | None:
    """The file of that name, for example `report.json`, or None."""
    row = conn.execute(select(artifacts).where(artifacts.c.job_id == job_id, artifacts.c.name == name)).first()
    return Artifact(**row._mapping) if row else None
