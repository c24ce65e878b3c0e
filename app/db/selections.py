"""Rows about selections: which job made one, over which dataset. The rows' scores are the artifact `selection.jsonl`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, insert, select

from app.db.engine import Connection
from app.db.ids import new_id
from app.db.paging import newest_first
from app.db.tables import artifacts, jobs, selections


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionRecord:
    """A selection that a later job can name. `sha256` and `size_bytes` are those of its artifact."""

    id: str
    job_id: str
    artifact_id: str
    sha256: str
    size_bytes: int
    base_model: str
    model_digest: str
    dataset_id: str
    validation_dataset_id: str | None
    scorer: str
    rows: int
    kept: int
    created_at: datetime


_OWN = [selections.c[name] for name in SelectionRecord.__dataclass_fields__ if name not in ("sha256", "size_bytes")]
_QUERY = select(*_OWN, artifacts.c.sha256, artifacts.c.size_bytes).join(
    artifacts, artifacts.c.id == selections.c.artifact_id
)


def insert_selection(
    conn: Connection,
    *,
    project_id: str,
    job_id: str,
    artifact_id: str,
    base_model: str,
    model_digest: str,
    dataset_id: str,
    validation_dataset_id: str | None,
    scorer: str,
    rows: int,
    kept: int,
) -> str:
    """Record the selection of a job and return its id."""
    selection_id = new_id("sel")
    conn.execute(
        insert(selections).values(
            id=selection_id,
            project_id=project_id,
            job_id=job_id,
            artifact_id=artifact_id,
            base_model=base_model,
            model_digest=model_digest,
            dataset_id=dataset_id,
            validation_dataset_id=validation_dataset_id,
            scorer=scorer,
            rows=rows,
            kept=kept,
        )
    )
    return selection_id


def get_selection(conn: Connection, selection_id: str) -> SelectionRecord | None:
    """The selection, or None."""
    row = conn.execute(_QUERY.where(selections.c.id == selection_id)).first()
    return SelectionRecord(**row._mapping) if row else None


def selection_of_job(conn: Connection, job_id: str) -> SelectionRecord | None:
    """The selection that a job made, or None while it has none."""
    row = conn.execute(_QUERY.where(selections.c.job_id == job_id)).first()
    return SelectionRecord(**row._mapping) if row else None


def list_selections(
    conn: Connection,
    *,
    limit: int,
    before: str | None = None,
    base_model: str | None = None,
    dataset_id: str | None = None,
    scorer: str | None = None,
) -> list[SelectionRecord]:
    """Newest first, filtered; `before` is the id of the last one of the page before."""
    wanted = {"base_model": base_model, "dataset_id": dataset_id, "scorer": scorer}
    query = newest_first(_QUERY, selections, limit=limit, before=before, **wanted)
    return [SelectionRecord(**row._mapping) for row in conn.execute(query)]


def keep_selection(conn: Connection, selection_id: str) -> bool:
    """Let nobody delete the selection until the caller's transaction, which is about to refer to it, has ended.

    Returns: whether it is still there.
    """
    mine = selections.c.id == selection_id
    query = select(selections.c.id).where(mine).with_for_update(read=True, key_share=True)
    return conn.execute(query).first() is not None


def lock_selection(conn: Connection, selection_id: str) -> SelectionRecord | None:
    """The selection, which no job can come to read until the transaction ends; or None."""
    conn.execute(select(selections.c.id).where(selections.c.id == selection_id).with_for_update())
    return get_selection(conn, selection_id)


def readers_of_selection(conn: Connection, selection: SelectionRecord) -> list[str]:
    """Jobs that have not ended and need it: those that name it, and the one that made it."""
    needs = (jobs.c.config[("data", "selection")].astext == selection.id) | (jobs.c.id == selection.job_id)
    query = select(jobs.c.id).where(jobs.c.finished_at.is_(None), needs).order_by(jobs.c.id)
    return list(conn.scalars(query))


def delete_selection(conn: Connection, selection_id: str) -> None:
    """Delete the row of a locked selection."""
    conn.execute(delete(selections).where(selections.c.id == selection_id))
