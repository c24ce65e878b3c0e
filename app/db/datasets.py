"""Rows about datasets: what was uploaded, where its normalised rows lie in the store. Never the text itself."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, and_, bindparam, false, func, insert, or_, select, update

from app.db.engine import Connection, Json
from app.db.ids import new_id
from app.db.objects import hold_objects
from app.db.projects import lock_project
from app.db.tables import artifacts, datasets, jobs


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """One dataset, complete and valid: a file that was refused leaves no row."""

    id: str
    project_id: str
    name: str
    format: str
    rows: int
    size_bytes: int
    raw_sha256: str | None
    """Of the file as it came; None where it is not known, or there was none."""
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
    raw_sha256: str | None = None,
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
            raw_sha256=raw_sha256,
            content_hash=content_hash,
            sha256=sha256,
            stored_bytes=stored_bytes,
            report=report,
        )
        .returning(datasets)
    ).one()
    return Dataset(**row._mapping)


_BY_ID = select(datasets).where(datasets.c.id == bindparam("dataset_id"), datasets.c.deleted_at.is_(None))


_KEPT = _BY_ID.with_for_update(key_share=True, read=True)


def get_dataset(conn: Connection, dataset_id: str, *, keep: bool = False) -> Dataset | None:
    """The dataset, or None if there is none or it was deleted.

    Args:   keep: nobody deletes it before the caller's transaction has ended; if somebody just does, wait for that.
    """
    row = conn.execute(_KEPT if keep else _BY_ID, {"dataset_id": dataset_id}).first()
    return Dataset(**row._mapping) if row else None


def same_dataset(conn: Connection, content_hash: str) -> Dataset | None:
    """The dataset that already holds this content, or None; nobody deletes it before the caller's transaction has ended.

    Locks the project until the caller's transaction ends, so that two uploads of one content make one dataset. A lock of the
    content would be a second one, beside that of the quotas: two requests might take them in turn and wait for each other.
    """
    lock_project(conn)
    query = select(datasets).where(datasets.c.content_hash == content_hash, datasets.c.deleted_at.is_(None))
    first = query.order_by(datasets.c.id).limit(1)
    # One that is just being deleted is waited for, and then no longer found: its content is a new dataset.
    row = conn.execute(first.with_for_update(key_share=True, read=True)).first()
    return Dataset(**row._mapping) if row else None


def lock_dataset(conn: Connection, dataset_id: str) -> Dataset | None:
    """As `get_dataset`; no job over it can be added until the caller's transaction has ended."""
    query = select(datasets).where(datasets.c.id == dataset_id, datasets.c.deleted_at.is_(None))
    row = conn.execute(query.with_for_update()).first()  # waits for whom `keep` holds it
    return Dataset(**row._mapping) if row else None


@dataclass(frozen=True, kw_only=True, slots=True)
class DerivedJob:
    """A job that has read some content, and the files of it that are still there."""

    job_id: str
    needs_it: bool
    """Whether it reads the dataset itself, and has not ended."""
    artifact_ids: list[str]
    size_bytes: int


def derived_jobs(conn: Connection, dataset: Dataset) -> list[DerivedJob]:
    """The jobs over the content of a dataset, as theirs or to validate with, oldest first; also over deleted ones of the same."""
    same = select(datasets.c.id).where(datasets.c.content_hash == dataset.content_hash)
    reads_by = (jobs.c.dataset_id, jobs.c.validation_dataset_id)
    gone = or_(artifacts.c.deleted_at.is_not(None), func.coalesce(artifacts.c.expires_at <= func.now(), false()))
    query = (
        select(
            jobs.c.id.label("job_id"),
            and_(jobs.c.finished_at.is_(None), or_(*(column == dataset.id for column in reads_by))).label("needs_it"),
            func.array_remove(func.array_agg(artifacts.c.id), None).label("artifact_ids"),
            func.coalesce(func.sum(artifacts.c.size_bytes), 0).label("size_bytes"),
        )
        .select_from(jobs)
        .outerjoin(artifacts, and_(artifacts.c.job_id == jobs.c.id, ~gone))
        .where(or_(*(column.in_(same) for column in reads_by)))
        .group_by(jobs.c.id)
        .order_by(jobs.c.id)
    )
    return [
        DerivedJob(
            job_id=row.job_id,
            needs_it=bool(row.needs_it),
            artifact_ids=sorted(row.artifact_ids),
            size_bytes=int(row.size_bytes),
        )
        for row in conn.execute(query)
    ]


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
