"""Rows about immutable stored files: which job's step published which sha256 under which name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, false, func, insert, or_, select, update

from app.db.engine import Connection
from app.db.ids import new_id
from app.db.objects import hold_objects
from app.db.tables import artifacts, head_maps, selections, steps


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
    expires_at: datetime | None
    expired: bool
    """Its bytes are gone, or go with the next sweep."""


_EXPIRED = func.coalesce(artifacts.c.expires_at <= func.now(), false())
_FIELDS = [
    *(artifacts.c[name] for name in Artifact.__dataclass_fields__ if name != "expired"),
    _EXPIRED.label("expired"),
]


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


def files_of_step(conn: Connection, step_id: str) -> list[Artifact]:
    """All files of a step by name, but for what it says of its own cost."""
    mine = (artifacts.c.step_id == step_id, ~artifacts.c.name.startswith("accounting-"))
    return [Artifact(**row._mapping) for row in conn.execute(_there().where(*mine).order_by(artifacts.c.name))]


def deleted_files(conn: Connection, step_id: str) -> list[str]:
    """Names of the files of a step that were deleted."""
    gone = select(artifacts.c.name).where(artifacts.c.step_id == step_id, artifacts.c.deleted_at.is_not(None))
    return list(conn.scalars(gone.order_by(artifacts.c.name)))


def gone_names(conn: Connection, job_id: str) -> list[str]:
    """Names of the files that a job had made and that were deleted or have expired since."""
    gone = or_(artifacts.c.deleted_at.is_not(None), _EXPIRED)
    return list(conn.scalars(select(artifacts.c.name).where(artifacts.c.job_id == job_id, gone)))


def is_held(conn: Connection, artifact_id: str) -> bool:
    """Whether the file is a head map's or a selection's, which keep it as long as they are there."""
    return conn.execute(select(artifacts.c.id).where(artifacts.c.id == artifact_id, _held())).first() is not None


def expire_artifact(conn: Connection, artifact_id: str, ttl_s: int | None) -> Artifact:
    """Let a file expire in so many seconds, or never."""
    query = update(artifacts).where(artifacts.c.id == artifact_id).values(expires_at=_in(ttl_s)).returning(*_FIELDS)
    return Artifact(**conn.execute(query).one()._mapping)


def expire_artifacts(conn: Connection, job_id: str, ttl_s: int | None) -> None:
    """Let all files of a locked job expire in so many seconds, or never, but those of its head map and selection."""
    conn.execute(update(artifacts).where(artifacts.c.job_id == job_id, ~_held()).values(expires_at=_in(ttl_s)))


def _held() -> ColumnElement[bool]:
    return or_(
        *(select(table.c.id).where(table.c.artifact_id == artifacts.c.id).exists() for table in (head_maps, selections))
    )


def _in(seconds: int | None) -> ColumnElement[datetime] | None:
    return None if seconds is None else func.now() + func.make_interval(0, 0, 0, 0, 0, 0, seconds)


def _there() -> Select[Any]:
    return select(*_FIELDS).where(artifacts.c.deleted_at.is_(None))
