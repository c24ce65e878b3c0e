"""Rows about uploads in parts: what is to come, which parts are there, what became of it. The bytes lie in the store.

A part's row is written before its bytes are, so that whatever was stored can be found and removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import ColumnElement, and_, delete, distinct, func, insert, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert

from app.db.engine import Connection
from app.db.ids import new_id
from app.db.paging import newest_first
from app.db.tables import upload_parts as parts
from app.db.tables import uploads


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """A file that comes in parts."""

    id: str
    name: str
    size_bytes: int
    sha256: str | None
    """What the whole file must have; None: its sender did not say."""
    part_bytes: int
    """Size of every part but the last."""
    dataset_id: str | None
    """The dataset that it became; no part is taken any more."""
    created_at: datetime
    expires_at: datetime

    @property
    def part_count(self) -> int:
        """How many parts make the file."""
        return -(-self.size_bytes // self.part_bytes)

    def size_of(self, number: int) -> int:
        """Bytes of one part; numbers start at 1."""
        return min(self.part_bytes, self.size_bytes - (number - 1) * self.part_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedUpload(Upload):
    """An upload, and how many of its parts are there."""

    parts_there: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One part that is in the store. Sent again with other bytes it is another part of the same number; the last counts."""

    upload_id: str
    number: int
    sha256: str

    @property
    def key(self) -> str:
        """Its name in the store."""
        return f"{self.upload_id}.{self.number}.{self.sha256}"


_FIELDS = [uploads.c[name] for name in Upload.__dataclass_fields__]


def insert_upload(
    conn: Connection, *, name: str, size_bytes: int, sha256: str | None, part_bytes: int, expiry_h: float
) -> Upload:
    """Record an upload without any part."""
    row = conn.execute(
        insert(uploads)
        .values(
            id=new_id("upl"),
            name=name,
            size_bytes=size_bytes,
            sha256=sha256,
            part_bytes=part_bytes,
            expires_at=_after(expiry_h),
        )
        .returning(*_FIELDS)
    ).one()
    return Upload(**row._mapping)


def get_upload(conn: Connection, upload_id: str) -> Upload | None:
    """The upload, or None if there is none, it was deleted or has expired."""
    row = conn.execute(select(*_FIELDS).where(uploads.c.id == upload_id, ~_gone())).first()
    return Upload(**row._mapping) if row else None


def list_uploads(
    conn: Connection, *, limit: int, before: str | None = None, open: bool | None = None, sha256: str | None = None
) -> list[ListedUpload]:
    """Newest first, without what `get_upload` does not find; `before` is the id of the last one of the page before.

    Args: open: only those that are still to become a dataset, or only those that did.
    """
    is_there = and_(parts.c.upload_id == uploads.c.id, parts.c.stored_at.is_not(None))
    there = select(func.count(distinct(parts.c.number))).where(is_there).correlate(uploads).scalar_subquery()
    query = newest_first(
        select(*_FIELDS, there.label("parts_there")).where(~_gone()),
        uploads,
        limit=limit,
        before=before,
        sha256=sha256,
    )
    if open is not None:
        query = query.where(uploads.c.dataset_id.is_(None) if open else uploads.c.dataset_id.is_not(None))
    return [ListedUpload(**row._mapping) for row in conn.execute(query)]


def lock_upload(conn: Connection, upload_id: str) -> Upload | None:
    """As `get_upload`; nobody else changes it until the caller's transaction ends."""
    row = conn.execute(select(*_FIELDS).where(uploads.c.id == upload_id, ~_gone()).with_for_update()).first()
    return Upload(**row._mapping) if row else None


def announce_part(conn: Connection, part: Part, *, expiry_h: float) -> None:
    """Say that the part's bytes are about to be stored; the upload lives on for as long as a new one."""
    conn.execute(
        upsert(parts).values(upload_id=part.upload_id, number=part.number, sha256=part.sha256).on_conflict_do_nothing()
    )
    conn.execute(update(uploads).where(uploads.c.id == part.upload_id).values(expires_at=_after(expiry_h)))


def confirm_part(conn: Connection, part: Part) -> None:
    """Say that the part's bytes are stored: from now on it is the one of its number."""
    conn.execute(update(parts).where(_is(part)).values(stored_at=func.clock_timestamp()))


def count_others(conn: Connection, part: Part) -> int:
    """How many other parts were ever announced under the part's number, whether they are there or not."""
    others = and_(_same_number(part), parts.c.sha256 != part.sha256)
    return int(conn.execute(select(func.count()).select_from(parts).where(others)).scalar_one())


def parts_of(conn: Connection, upload_id: str) -> list[Part]:
    """The parts that are there, by number."""
    query = (
        select(parts.c.upload_id, parts.c.number, parts.c.sha256)
        .where(parts.c.upload_id == upload_id, parts.c.stored_at.is_not(None))
        .order_by(parts.c.number, parts.c.stored_at)
    )
    return list({row.number: Part(**row._mapping) for row in conn.execute(query)}.values())


def replaced_by(conn: Connection, part: Part) -> list[Part]:
    """Parts of the same number that are in the store, though one that came later counts."""
    query = (
        select(parts.c.upload_id, parts.c.number, parts.c.sha256)
        .where(_same_number(part), parts.c.stored_at.is_not(None))
        .order_by(parts.c.stored_at.desc())
        .offset(1)
    )
    return [Part(**row._mapping) for row in conn.execute(query)]


def mark_removed(conn: Connection, part: Part) -> None:
    """Say that the part's bytes were removed. Its row stays: under a signed URL they may come once more."""
    conn.execute(update(parts).where(_is(part)).values(stored_at=None))


def finish_upload(conn: Connection, upload_id: str, dataset_id: str) -> None:
    """Say what dataset the upload became."""
    conn.execute(update(uploads).where(uploads.c.id == upload_id).values(dataset_id=dataset_id))


def delete_upload(conn: Connection, upload_id: str) -> bool:
    """Hide an upload; False if there was none. Its row stays until its parts have been removed."""
    done = conn.execute(update(uploads).where(uploads.c.id == upload_id, ~_gone()).values(deleted_at=func.now()))
    return done.rowcount == 1


# --- removing what is not needed any more -----------------------------------------------------------------------------


def uploads_to_empty(conn: Connection) -> list[str]:
    """Uploads that ended, whichever way, and whose parts may still be stored."""
    ended = or_(uploads.c.dataset_id.is_not(None), _gone())
    return list(conn.scalars(select(uploads.c.id).where(ended, uploads.c.emptied_at.is_(None))))


def uploads_to_forget(conn: Connection, *, grace_h: float) -> list[str]:
    """Uploads that expired so long ago that no request still brings a part."""
    return list(conn.scalars(select(uploads.c.id).where(uploads.c.expires_at < _after(-grace_h))))


def all_parts(conn: Connection, upload_id: str) -> list[Part]:
    """Every part that may be stored: also those sent anew later, and those whose bytes never came."""
    query = select(parts.c.upload_id, parts.c.number, parts.c.sha256).where(parts.c.upload_id == upload_id)
    return [Part(**row._mapping) for row in conn.execute(query)]


def mark_emptied(conn: Connection, upload_id: str) -> None:
    """Say that the upload's parts were removed."""
    conn.execute(update(uploads).where(uploads.c.id == upload_id).values(emptied_at=func.now()))


def forget_upload(conn: Connection, upload_id: str) -> None:
    """Remove the upload's row and those of its parts."""
    conn.execute(delete(uploads).where(uploads.c.id == upload_id))


def _gone() -> ColumnElement[bool]:
    return or_(uploads.c.deleted_at.is_not(None), uploads.c.expires_at <= func.now())


def _is(part: Part) -> ColumnElement[bool]:
    return and_(_same_number(part), parts.c.sha256 == part.sha256)


def _same_number(part: Part) -> ColumnElement[bool]:
    return and_(parts.c.upload_id == part.upload_id, parts.c.number == part.number)


def _after(hours: float) -> ColumnElement[datetime]:
    return func.now() + func.make_interval(0, 0, 0, 0, 0, 0, hours * 3600)
