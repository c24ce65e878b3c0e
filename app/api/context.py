"""What every route takes: the servers behind the service, ids that are ids, pages and keys. Typed dependencies only.

They are `async` though they wait for nothing: FastAPI would else send each of them, in each request, to a thread and back.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import Depends, Header, Path, Query, Request, Response

from app.api.cursors import mark_cursor, read_cursor, unmarked, write_cursor
from app.api.door import Door
from app.api.event_hub import EventHub
from app.api.queries import query_fields
from app.blobs import BlobStore
from app.core.egress import Egress
from app.core.intake import Intake
from app.core.keys import Caller
from app.core.outlook import Lookout
from app.core.quotas import JobQuota
from app.core.selection_tables import SelectionTables
from app.db.audit import Action, Entry, append_entry
from app.db.engine import Connection, Engine, Json, for_project
from app.db.ids import ID_PATTERN
from app.errors import (
    ArtifactNotFound,
    ComparisonNotFound,
    CursorInvalid,
    DatasetNotFound,
    HeadMapNotFound,
    JobNotFound,
    KeyNotFound,
    NotFound,
    ReportNotFound,
    RequestInvalid,
    SelectionNotFound,
    UploadNotFound,
)
from app.problems import request_id
from app.settings import Settings
from app.views import Page
from app.webhook_errors import DeliveryNotFound, WebhookNotFound
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
    """The ledger, as far as the caller of the request may see it; before one is known, nothing of it."""
    blobs: BlobStore
    waker: Wake
    hub: EventHub
    door: Door
    egress: Egress
    lookout: Lookout
    jobs: JobQuota
    tables: SelectionTables = field(default_factory=SelectionTables)
    intake: Intake = field(default_factory=Intake)
    engines: dict[str, Engine] = field(default_factory=dict)
    """Of each project that somebody came for."""
    caller: Caller | None = None
    request_id: str = ""

    @property
    def known_caller(self) -> Caller:
        """Whoever was let in; rooms that are open to all have none."""
        assert self.caller is not None, "nobody has come in"
        return self.caller

    def note(self, conn: Connection, action: Action, object_id: str, facts: Json | None = None) -> Entry:
        """Write what the caller does into the audit log, in the transaction of the deed."""
        return append_entry(
            conn,
            actor=self.known_caller.actor,
            action=action,
            object_id=object_id,
            request_id=self.request_id,
            facts=facts or {},
        )


async def _services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


OpenContext = Annotated[Services, Depends(_services)]
"""For the few routes that anybody may ask."""


async def _caller(services: OpenContext, request: Request) -> Caller:
    return await services.door.admit(request)


AnyCaller = Annotated[Caller, Depends(_caller)]


async def _admin(caller: AnyCaller) -> Caller:
    caller.need("admin")
    return caller


Admin = Annotated[Caller, Depends(_admin)]

CLOSED = [Depends(_caller)]
"""Dependencies of every room but those that anybody may enter."""


async def _of_caller(services: OpenContext, caller: AnyCaller, request: Request) -> Services:
    engine = services.engines.get(caller.project_id)
    if engine is None:
        engine = services.engines[caller.project_id] = for_project(services.engine, caller.project_id)
    return replace(services, engine=engine, caller=caller, request_id=request_id(request))


Context = Annotated[Services, Depends(_of_caller)]


PathId = Annotated[str, Path(description="An id: prefix, underscore, 26 characters.")]


def _id(prefix: str, error: type[NotFound]) -> Callable[[str], Awaitable[str]]:
    """A path parameter that is an id of this prefix; anything else names nothing: 404, before the database is asked."""

    async def check(id: PathId) -> str:
        if not (re.fullmatch(ID_PATTERN, id) and id.startswith(prefix + "_")):
            raise error(id=id)
        return id

    return check


JobId = Annotated[str, Depends(_id("job", JobNotFound))]
DatasetId = Annotated[str, Depends(_id("ds", DatasetNotFound))]
ReportId = Annotated[str, Depends(_id("rep", ReportNotFound))]
ArtifactId = Annotated[str, Depends(_id("art", ArtifactNotFound))]
UploadId = Annotated[str, Depends(_id("upl", UploadNotFound))]
HeadMapId = Annotated[str, Depends(_id("hm", HeadMapNotFound))]
SelectionId = Annotated[str, Depends(_id("sel", SelectionNotFound))]
ComparisonId = Annotated[str, Depends(_id("cmp", ComparisonNotFound))]
KeyId = Annotated[str, Depends(_id("key", KeyNotFound))]
WebhookId = Annotated[str, Depends(_id("wh", WebhookNotFound))]


async def _delivery_id(delivery: PathId) -> str:
    return await _id("whd", DeliveryNotFound)(delivery)


DeliveryId = Annotated[str, Depends(_delivery_id)]

Limit = Annotated[int, Query(ge=1, le=100, description="Entries of one page.")]


def _place(request: Request) -> str:
    """Which list a request is for, and in which order: where one page ends says nothing of any other list."""
    route = request.scope["route"]
    order = next((field.default for field in query_fields(route) if field.alias == "order"), "")
    return f"{route.path_format.format(**request.path_params)} {request.query_params.get('order', order)}"


async def _cursor(
    request: Request,
    cursor: Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")] = None,
) -> str | None:
    return None if cursor is None else unmarked(cursor, _place(request))


Cursor = Annotated[str | None, Depends(_cursor)]
"""Where the page before ended, as the same list in the same order said it; `Link` marks it for that."""


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


Paged = TypeVar("Paged", bound=Page[Any])


async def _link(request: Request, response: Response) -> Callable[[Paged], Paged]:
    def link(page: Paged) -> Paged:
        if page.next_cursor is None:
            return page
        cursor = mark_cursor(page.next_cursor, _place(request))
        following = request.url.include_query_params(cursor=cursor)
        # Relative, as RFC 8288 allows: whoever stands before the service may have given it another name.
        response.headers["Link"] = f'<{following.path}?{following.query}>; rel="next"'
        return page.model_copy(update={"next_cursor": cursor})

    return link


class NameNext(Protocol):
    """Hands a page on, marks its cursor, and names the page after it in the answer's `Link` header."""

    def __call__(self, page: Paged, /) -> Paged: ...


Link = Annotated[NameNext, Depends(_link)]


async def _idempotency_key(
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
