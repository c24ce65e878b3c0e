"""What every route takes: the servers behind the service, ids that are ids, pages and keys. Typed dependencies only."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from fastapi import Depends, Header, Path, Query, Request

from app.api.event_hub import EventHub
from app.blobs import BlobStore
from app.db.engine import Engine
from app.db.ids import ID_PATTERN
from app.errors import (
    ArtifactNotFound,
    CursorInvalid,
    DatasetNotFound,
    HeadMapNotFound,
    JobNotFound,
    NotFound,
    RequestInvalid,
    SelectionNotFound,
    UploadNotFound,
)
from app.schemas import read_cursor, write_cursor
from app.settings import Settings
from p2d.errors import ErrorDetail


class Wake(Protocol):
    """What tells workers that there is something to claim; `app.core.wake.Waker` is one."""

    def wake(self, queue: str, *, count: int = 1) -> None:
        """Never raises."""


@dataclass(frozen=True, slots=True)
class Services:
    """What the app holds while it runs."""

    settings: Settings
    engine: Engine
    blobs: BlobStore
    waker: Wake
    hub: EventHub


def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


Context = Annotated[Services, Depends(_services)]


PathId = Annotated[str, Path(description="An id: prefix, underscore, 26 characters.")]


def _id(prefix: str, error: type[NotFound]) -> Callable[[str], str]:
    """A path parameter that is an id of this prefix; anything else names nothing: 404, before the database is asked."""

    def check(id: PathId) -> str:
        if not (re.fullmatch(ID_PATTERN, id) and id.startswith(prefix + "_")):
            raise error(id=id)
        return id

    return check


JobId = Annotated[str, Depends(_id("job", JobNotFound))]
DatasetId = Annotated[str, Depends(_id("ds", DatasetNotFound))]
ArtifactId = Annotated[str, Depends(_id("art", ArtifactNotFound))]
UploadId = Annotated[str, Depends(_id("upl", UploadNotFound))]
HeadMapId = Annotated[str, Depends(_id("hm", HeadMapNotFound))]
SelectionId = Annotated[str, Depends(_id("sel", SelectionNotFound))]

Limit = Annotated[int, Query(ge=1, le=100, description="Entries of one page.")]
Cursor = Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")]


def page_after(cursor: str | None) -> str | None:
    """The id that a cursor of an id-ordered list stands for."""
    if cursor is None:
        return None
    value: Any = read_cursor(cursor)
    if not isinstance(value, str) or not re.fullmatch(ID_PATTERN, value):
        raise CursorInvalid()
    return value


def page_of(items: list[Any], ids: list[str], limit: int) -> dict[str, Any]:
    """The page made of up to `limit` of `items`, which were asked for with one more."""
    more = len(items) > limit
    return {"data": items[:limit], "has_more": more, "next_cursor": write_cursor(ids[limit - 1]) if more else None}


def _idempotency_key(
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="Up to 255 printable ASCII characters of your own; the same key again gives the same answer.",
        ),
    ] = None,
) -> str | None:
    if key is not None and not re.fullmatch(r"[\x21-\x7e]{1,255}", key):
        detail = ErrorDetail(
            code="field.idempotency_key",
            message="Expected 1 to 255 printable ASCII characters.",
            pointer="/header/Idempotency-Key",
        )
        raise RequestInvalid("The Idempotency-Key cannot be used.", errors=[detail])
    return key


IdempotencyKey = Annotated[str | None, Depends(_idempotency_key)]
