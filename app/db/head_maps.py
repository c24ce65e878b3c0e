"""Rows about head maps: which job found one, or that it was imported, for which model. The map itself lies in the store: the
artifact `head_map.json` of the job, or an object of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, insert, select

from app.db.engine import Connection
from app.db.ids import new_id
from app.db.objects import hold_objects
from app.db.paging import newest_first
from app.db.tables import artifacts, head_maps, jobs


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadMapRecord:
    """A head map that a later job can name. `sha256` and `size_bytes` are those of the file."""

    id: str
    job_id: str | None
    """None: it was imported, as is `artifact_id`."""
    artifact_id: str | None
    sha256: str
    size_bytes: int
    base_model: str
    model_digest: str
    dataset_id: str | None
    """None: the file says of which rows it is, by their hash alone."""
    scorer: str
    created_at: datetime


_OWN = [head_maps.c[name] for name in HeadMapRecord.__dataclass_fields__ if name not in ("sha256", "size_bytes")]
_QUERY = select(
    *_OWN,
    func.coalesce(head_maps.c.sha256, artifacts.c.sha256).label("sha256"),
    func.coalesce(head_maps.c.size_bytes, artifacts.c.size_bytes).label("size_bytes"),
).outerjoin(artifacts, artifacts.c.id == head_maps.c.artifact_id)


def insert_head_map(
    conn: Connection,
    *,
    project_id: str,
    job_id: str,
    artifact_id: str,
    base_model: str,
    model_digest: str,
    dataset_id: str,
    scorer: str,
) -> str:
    """Record the head map of a job and return its id."""
    return _insert(
        conn,
        project_id=project_id,
        job_id=job_id,
        artifact_id=artifact_id,
        base_model=base_model,
        model_digest=model_digest,
        dataset_id=dataset_id,
        scorer=scorer,
    )


def insert_imported(
    conn: Connection, *, sha256: str, size_bytes: int, base_model: str, model_digest: str, scorer: str
) -> str:
    """Record a head map whose file came from outside, for the project that is spoken for. Raises ObjectCollected."""
    hold_objects(conn, [sha256])
    return _insert(
        conn,
        sha256=sha256,
        size_bytes=size_bytes,
        base_model=base_model,
        model_digest=model_digest,
        scorer=scorer,
    )


def get_head_map(conn: Connection, head_map_id: str) -> HeadMapRecord | None:
    """The head map, or None."""
    row = conn.execute(_QUERY.where(head_maps.c.id == head_map_id)).first()
    return HeadMapRecord(**row._mapping) if row else None


def keep_head_map(conn: Connection, head_map_id: str) -> bool:
    """Let nobody delete the head map until the caller's transaction, which is about to refer to it, has ended.

    Returns: whether it is still there.
    """
    query = select(head_maps.c.id).where(head_maps.c.id == head_map_id).with_for_update(read=True, key_share=True)
    return conn.execute(query).first() is not None


def head_map_of_job(conn: Connection, job_id: str) -> HeadMapRecord | None:
    """The head map that a job made, or None while it has none."""
    row = conn.execute(_QUERY.where(head_maps.c.job_id == job_id)).first()
    return HeadMapRecord(**row._mapping) if row else None


def list_head_maps(
    conn: Connection,
    *,
    limit: int,
    before: str | None = None,
    base_model: str | None = None,
    dataset_id: str | None = None,
    scorer: str | None = None,
) -> list[HeadMapRecord]:
    """Newest first, filtered; `before` is the id of the last one of the page before."""
    wanted = {"base_model": base_model, "dataset_id": dataset_id, "scorer": scorer}
    query = newest_first(_QUERY, head_maps, limit=limit, before=before, **wanted)
    return [HeadMapRecord(**row._mapping) for row in conn.execute(query)]


def lock_head_map(conn: Connection, head_map_id: str) -> HeadMapRecord | None:
    """The head map, which no job can come to read until the transaction ends; or None."""
    conn.execute(select(head_maps.c.id).where(head_maps.c.id == head_map_id).with_for_update())
    return get_head_map(conn, head_map_id)


def readers_of_head_map(conn: Connection, head_map: HeadMapRecord) -> list[str]:
    """Jobs that have not ended and need it: those that name it, and the one that made it."""
    named = jobs.c.config[("heads", "head_map")].astext == head_map.id
    needs = named if head_map.job_id is None else named | (jobs.c.id == head_map.job_id)
    query = select(jobs.c.id).where(jobs.c.finished_at.is_(None), needs).order_by(jobs.c.id)
    return list(conn.scalars(query))


def delete_head_map(conn: Connection, head_map_id: str) -> None:
    """Delete the row of a locked head map."""
    conn.execute(delete(head_maps).where(head_maps.c.id == head_map_id))


def _insert(conn: Connection, **values: Any) -> str:
    head_map_id = new_id("hm")
    conn.execute(insert(head_maps).values(id=head_map_id, **values))
    return head_map_id
