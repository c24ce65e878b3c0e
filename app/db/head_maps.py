"""Rows about head maps: which job found one, for which model. The map itself is the artifact `head_map.json`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import insert, select

from app.db.engine import Connection
from app.db.ids import new_id
from app.db.tables import artifacts, head_maps


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMapRecord:
    """A head map that a later job can name. `sha256` and `size_bytes` are those of its artifact."""

    id: str
    job_id: str
    artifact_id: str
    sha256: str
    size_bytes: int
    base_model: str
    model_digest: str
    dataset_id: str
    scorer: str
    created_at: datetime


_QUERY = select(head_maps, artifacts.c.sha256, artifacts.c.size_bytes).join(
    artifacts, artifacts.c.id == head_maps.c.artifact_id
)


def insert_head_map(
    conn: Connection,
    *,
    job_id: str,
    artifact_id: str,
    base_model: str,
    model_digest: str,
    dataset_id: str,
    scorer: str,
) -> str:
    """Record the head map of a job and return its id."""
    head_map_id = new_id("hm")
    conn.execute(
        insert(head_maps).values(
            id=head_map_id,
            job_id=job_id,
            artifact_id=artifact_id,
            base_model=base_model,
            model_digest=model_digest,
            dataset_id=dataset_id,
            scorer=scorer,
        )
    )
    return head_map_id


def get_head_map(conn: Connection, head_map_id: str) -> HeadMapRecord | None:
    """The head map, or None."""
    row = conn.execute(_QUERY.where(head_maps.c.id == head_map_id)).first()
    return HeadMapRecord(**row._mapping) if row else None


def head_map_of_job(conn: Connection, job_id: str) -> HeadMapRecord | None:
    """The head map that a job made, or None while it has none."""
    row = conn.execute(_QUERY.where(head_maps.c.job_id == job_id)).first()
    return HeadMapRecord(**row._mapping) if row else None
