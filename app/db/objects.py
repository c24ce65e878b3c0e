"""Rows about objects of the store: announced before they are put, confirmed after, held when registered, condemned, collected.

A row's lock and its generation order writers and removal, see docs/decisions/0016. The bytes are app.blobs' business.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, Select, Text, and_, false, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert

from app.db.engine import Connection
from app.db.tables import artifacts, datasets, head_maps, jobs, objects, reports, steps
from app.errors import ObjectCollected


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredObject:
    """An object that the store has, or is about to have."""

    sha256: str
    size_bytes: int
    generation: int
    used_at: datetime


_NAMES = tuple(StoredObject.__dataclass_fields__)
_FIELDS = [objects.c[name] for name in _NAMES]


def announce_object(conn: Connection, sha256: str, size_bytes: int) -> int | None:
    """Say that the bytes are about to be put; commit before putting. Waits while the very same ones are removed.

    Returns the generation to confirm after they were put, or None if the store has them.
    """
    new = insert(objects).values(sha256=sha256, size_bytes=size_bytes, used_at=func.clock_timestamp())
    changed = {"used_at": new.excluded.used_at, "size_bytes": new.excluded.size_bytes, "collected_at": None}
    query = new.on_conflict_do_update(index_elements=[objects.c.sha256], set_=changed)
    row = conn.execute(query.returning(objects.c.generation, objects.c.stored_at)).one()
    return int(row.generation) if row.stored_at is None else None


def confirm_object(conn: Connection, sha256: str, generation: int) -> bool:
    """Say that the bytes were put; False if a collector has been there since they were announced: put them again."""
    mine = and_(objects.c.sha256 == sha256, objects.c.generation == generation)
    return conn.execute(update(objects).where(mine).values(stored_at=func.now())).rowcount == 1


def hold_objects(conn: Connection, hashes: Iterable[str]) -> None:
    """Date objects anew, in the transaction that registers them. Raises ObjectCollected if one was removed meanwhile.

    One that was never announced is left alone: nobody will collect it.
    """
    wanted = sorted(set(hashes))
    if not wanted:
        return
    # In one order, so that two registrations cannot wait for each other.
    rows = select(objects.c.sha256, objects.c.stored_at).where(objects.c.sha256.in_(wanted))
    for sha256, stored_at in conn.execute(rows.order_by(objects.c.sha256).with_for_update()):
        if stored_at is None:
            raise ObjectCollected(sha256=sha256)
    conn.execute(update(objects).where(objects.c.sha256.in_(wanted)).values(used_at=func.clock_timestamp()))


# --- for the collector ------------------------------------------------------------------------------------------------


def condemn_objects(conn: Connection, *, kept_h: float, limit: int) -> list[StoredObject]:
    """Take what nothing refers to and was last used that long ago: from the commit on it cannot be registered any more."""
    query = _unreferenced(kept_h).order_by(objects.c.used_at).limit(limit).with_for_update(skip_locked=True)
    found = [row.sha256 for row in conn.execute(query)]
    # Whoever registered one since that statement's snapshot has committed by now, or waits for us: a new snapshot tells.
    used = set(conn.scalars(select(objects.c.sha256).where(objects.c.sha256.in_(found), _referenced())))
    taken = objects.c.sha256.in_([sha256 for sha256 in found if sha256 not in used])
    condemned = update(objects).where(taken).values(stored_at=None, generation=objects.c.generation + 1)
    return [StoredObject(**row._mapping) for row in conn.execute(condemned.returning(*_FIELDS))]


def lock_condemned(conn: Connection, condemned: Sequence[StoredObject]) -> list[StoredObject]:
    """Those that nobody has announced since; nobody can until the commit."""
    as_condemned = [and_(*(objects.c[name] == getattr(one, name) for name in _NAMES)) for one in condemned]
    query = select(*_FIELDS).where(or_(false(), *as_condemned), objects.c.stored_at.is_(None))
    return [StoredObject(**row._mapping) for row in conn.execute(query.with_for_update(skip_locked=True))]


def mark_collected(conn: Connection, hashes: Iterable[str]) -> None:
    """Say that locked objects are no longer in the store."""
    conn.execute(update(objects).where(objects.c.sha256.in_(list(hashes))).values(collected_at=func.now()))


def sum_unreferenced(conn: Connection, *, kept_h: float) -> tuple[int, int]:
    """How many objects, and how many bytes, a collection would remove now."""
    found = _unreferenced(kept_h).subquery()
    row = conn.execute(select(func.count(), func.coalesce(func.sum(found.c.size_bytes), 0)).select_from(found)).one()
    return int(row[0]), int(row[1])


def still_locked(conn: Connection) -> None:
    """Raise DatabaseUnavailable unless the transaction, and so its locks, is still alive."""
    conn.execute(text("select 1"))


def outlast_idleness(conn: Connection) -> None:
    """Let PostgreSQL not end this transaction while it waits for the store."""
    conn.execute(text("set local idle_in_transaction_session_timeout = 0"))


def jobs_with_old_checkpoints(conn: Connection, *, kept_d: float) -> list[str]:
    """Jobs that ended that long ago and still have a checkpoint to go on from."""
    old = jobs.c.finished_at < func.now() - func.make_interval(0, 0, 0, 0, 0, 0, kept_d * 86400)
    query = select(jobs.c.id).join(steps, steps.c.job_id == jobs.c.id).where(old, _has_checkpoint()).distinct()
    return list(conn.scalars(query.order_by(jobs.c.id)))


def forget_checkpoints(conn: Connection, job_id: str) -> None:
    """Forget the checkpoints of a locked job: a retry begins the step anew."""
    conn.execute(update(steps).where(steps.c.job_id == job_id, _has_checkpoint()).values(checkpoint=None))


def _unreferenced(kept_h: float) -> Select[tuple[str, int]]:
    old = objects.c.used_at < func.now() - func.make_interval(0, 0, 0, 0, 0, 0, kept_h * 3600)
    return select(objects.c.sha256, objects.c.size_bytes).where(objects.c.collected_at.is_(None), old, ~_referenced())


def _referenced() -> ColumnElement[bool]:
    """Whether anything refers to the row of `objects`: a new kind of reference belongs here."""
    reads = or_(jobs.c.dataset_id == datasets.c.id, jobs.c.validation_dataset_id == datasets.c.id)
    read = select(jobs.c.id).where(jobs.c.finished_at.is_(None), reads).exists()
    by_dataset = and_(datasets.c.sha256 == objects.c.sha256, or_(datasets.c.deleted_at.is_(None), read))
    files = func.jsonb_each_text(steps.c.checkpoint["files"]).table_valued("key", "value", joins_implicitly=True)
    in_checkpoint = select(files.c.value.cast(Text)).select_from(steps).where(_has_checkpoint())
    return or_(
        select(artifacts.c.id).where(artifacts.c.sha256 == objects.c.sha256, *_alive()).exists(),
        select(head_maps.c.id).where(head_maps.c.sha256 == objects.c.sha256).exists(),
        select(datasets.c.id).where(by_dataset).exists(),
        select(reports.c.id).where(reports.c.sha256 == objects.c.sha256).exists(),
        objects.c.sha256.in_(in_checkpoint.correlate(None)),
    )


def _alive() -> tuple[ColumnElement[bool], ...]:
    """Of artifacts whose bytes somebody may still ask for."""
    adapter = artifacts.alias("adapter")  # or the weights of a merged model
    named = or_(jobs.c.adapter_id == adapter.c.id, jobs.c.base_artifact_id == adapter.c.id)
    read = select(adapter.c.job_id).join(jobs, named).where(jobs.c.finished_at.is_(None))
    unexpired = or_(
        artifacts.c.expires_at.is_(None),
        artifacts.c.expires_at > func.now(),
        artifacts.c.job_id.in_(read),
    )
    return artifacts.c.deleted_at.is_(None), unexpired


def _has_checkpoint() -> ColumnElement[bool]:
    return func.jsonb_typeof(steps.c.checkpoint) == "object"
