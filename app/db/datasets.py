"""Rows about datasets: what was uploaded, where its normalised rows lie in the store. Never the text itself."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, exists, func, insert, or_, select, update

from app.db.engine import Connection, Json
from app.db.ids import new_id
from app.db.objects import hold_objects
from app.db.tables import datasets, jobs


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """One dataset, complete and valid: a file that was refused leaves no row."""

    id: str
    project_id: str
    name: str
    format: str
    rows: int
    size_bytes: int
    content_hash: str
    sha256: str
    stored_bytes: int
    report: Json
    created_at: datetime
    deleted_at: datetime | None


def insert_dataset(
    conn: Connection,
    *,
    name: str,
    format: str,
    rows: int,
    size_bytes: int,
    content_hash: str,
    sha256: str,
    stored_bytes: int,
    report: Json,
) -> Dataset:
    """Record a dataset whose normalised rows are in the store as `sha256` (`stored_bytes` long). Raises ObjectCollected."""
    hold_objects(conn, [sha256])
    row = conn.execute(
        insert(datasets)
        .values(
            id=new_id("ds"),
            name=name,
            format=format,
            rows=rows,
            size_bytes=size_bytes,
            content_hash=content_hash,
            sha256=sha256,
            stored_bytes=stored_bytes,
            report=report,
        )
        .returning(datasets)
    ).one()
    return Dataset(**row._mapping)


def get_dataset(conn: Connection, dataset_id: str) -> Dataset | None:
    """The dataset, or None if there is none or it was deleted."""
    row = conn.execute(select(datasets).where(datasets.c.id == dataset_id, datasets.c.deleted_at.is_(None))).first()
    return Dataset(**row._mapping) if row else None


def same_dataset(conn: Connection, content_hash: str) -> Dataset | None:
    """The dataset that already holds this content, or None.

    Locks the content until the caller's transaction ends, so that two uploads of one content make one dataset.
    """
    conn.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(content_hash, 0))))
    query = select(datasets).where(datasets.c.content_hash == content_hash, datasets.c.deleted_at.is_(None))
    row = conn.execute(query.order_by(datasets.c.id).limit(1)).first()
    return Dataset(**row._mapping) if row else None


def is_needed(conn: Connection, dataset_id: str) -> bool:
    """Whether a job that has not ended reads this dataset."""
    of_it = or_(jobs.c.dataset_id == dataset_id, jobs.c.validation_dataset_id == dataset_id)
    return bool(conn.execute(select(exists().where(of_it, jobs.c.finished_at.is_(None)))).scalar_one())


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetFilter:
    """Which datasets a list holds; None: any."""

    q: str | None = None
    """Stands in the name, in upper or lower case."""
    format: str | None = None
    content_hash: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None


def list_datasets(
    conn: Connection,
    *,
    limit: int,
    after: str | None = None,
    oldest_first: bool = False,
    only: DatasetFilter = DatasetFilter(),
) -> list[Dataset]:
    """Newest or oldest first; `after` is the id of the last one of the page before."""
    conditions: list[ColumnElement[bool]] = [datasets.c.deleted_at.is_(None)]
    if after is not None:
        conditions.append(datasets.c.id > after if oldest_first else datasets.c.id < after)
    if only.q is not None:
        conditions.append(datasets.c.name.icontains(only.q, autoescape=True))
    conditions += [
        datasets.c[name] == value
        for name, value in (("format", only.format), ("content_hash", only.content_hash))
        if value is not None
    ]
    if only.created_after is not None:
        conditions.append(datasets.c.created_at >= only.created_after)
    if only.created_before is not None:
        conditions.append(datasets.c.created_at < only.created_before)
    order = datasets.c.id if oldest_first else datasets.c.id.desc()
    query = select(datasets).where(*conditions).order_by(order).limit(limit)
    return [Dataset(**row._mapping) for row in conn.execute(query)]


def delete_dataset(conn: Connection, dataset_id: str) -> bool:
    """Hide a dataset; False if there was none. Its row stays for the jobs that name it."""
    done = conn.execute(
        update(datasets)
        .where(datasets.c.id == dataset_id, datasets.c.deleted_at.is_(None))
        .values(deleted_at=func.now())
    )
    return done.rowcount == 1
