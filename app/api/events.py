"""The event log of a job: a JSON page, a long poll, or server-sent events, by the Accept header.

Each number is sent once and in order: the log has no gaps, and a stream that breaks goes on after Last-Event-ID.
A database connection is held for one read, never while a client waits.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from app.access_errors import KeyRefused, TooManyProjectStreams
from app.api.context import Context, JobId, Services
from app.api.documentation import errors
from app.db.engine import DatabaseUnavailable, PoolTimeout
from app.db.events import Event, list_events
from app.db.jobs import find_job
from app.errors import CursorInvalid, JobNotFound, RequestError, RequestInvalid, TooManyStreams
from app.views import EventView, Page
from p2d.errors import ErrorDetail

router = APIRouter(tags=["jobs"])

BATCH = 200
"""Events of one read of a stream."""

MAX_WAIT_S = 30

AGAIN_S = 1.0
"""Between two tries of a stream to read from a database that does not answer."""

_STREAM = {
    "description": "A page, or the stream; its `id` is the event's number and its `data` the event's.",
    "content": {"text/event-stream": {"schema": {"type": "string"}}},
}


@router.get(
    "/jobs/{id}/events",
    response_model=Page[EventView],
    responses={
        200: _STREAM,
        204: {"description": "The stream has ended before; do not come back."},
        **errors(JobNotFound, TooManyProjectStreams, TooManyStreams),
    },
)
async def list_job_events(
    request: Request,
    job_id: JobId,
    services: Context,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="Only events numbered above this.")] = 0,
    cursor: Annotated[str | None, Query(max_length=20, description="The same as `after`, as lists have it.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000, description="Events of one page.")] = 100,
    wait: Annotated[
        float, Query(ge=0, le=MAX_WAIT_S, allow_inf_nan=False, description="Seconds to wait for the first one.")
    ] = 0,
    last_event_id: Annotated[str | None, Header(description="Go on after this event; for the stream.")] = None,
) -> Response:
    """What happened to a job. With `Accept: text/event-stream` a stream that ends with the event `end`.

    A job that is retried goes on in the same log, so an earlier `end` may stand in the middle of it.
    """
    after = max(after, _number(cursor, CursorInvalid()))
    if "text/event-stream" in request.headers.get("accept", ""):
        return await _stream(services, job_id, max(after, _number(last_event_id, _not_an_event())))
    log, events = await run_in_threadpool(_read, services, job_id, after, limit + 1)
    if not events and wait and not log.is_final:
        async with services.hub.watch(job_id, services.known_caller):
            await services.hub.wait(job_id, after, wait)
        log, events = await run_in_threadpool(_read, services, job_id, after, limit + 1)
    page = {
        "data": [EventView.model_validate(event) for event in events[:limit]],
        "has_more": len(events) > limit,
        "next_cursor": str(events[limit - 1].seq) if len(events) > limit else None,
    }
    return Response(Page[EventView].model_validate(page).model_dump_json(), media_type="application/json")


async def _stream(services: Services, job_id: str, after: int) -> Response:
    log, _ = await run_in_threadpool(_read, services, job_id, after, 1)
    if log.is_final and after >= log.last_seq:
        return Response(status_code=204)  # tells an EventSource to stop coming back
    after = min(after, log.last_seq)  # a number that was never given would skip what is to come
    watch = services.hub.watch(job_id, services.known_caller)
    await watch.__aenter__()  # here and not in the generator: too many streams must still be a 429 or 503
    return _EventStream(_frames(services, job_id, after), watch)


class _EventStream(StreamingResponse):
    """A stream that stops watching its job however it ends, even if it never began."""

    def __init__(self, frames: AsyncIterator[bytes], watch: Any) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(frames, media_type="text/event-stream", headers=headers)
        self._watch = watch

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._watch.__aexit__(None, None, None)


async def _frames(services: Services, job_id: str, after: int) -> AsyncIterator[bytes]:
    yield b"retry: 1000\n\n"
    while not services.hub.closing:
        try:
            log, events = await run_in_threadpool(_read, services, job_id, after, BATCH)
            await run_in_threadpool(services.door.still_open, services.caller)
        except (JobNotFound, KeyRefused):
            return  # it was deleted, or the key was revoked: whoever comes back gets 404 or 401
        except (DatabaseUnavailable, PoolTimeout):  # for a while: who came back now would only wait elsewhere
            yield b": waiting for the database\n\n"
            await asyncio.sleep(AGAIN_S)
            continue
        if events:
            yield b"".join(_frame(event) for event in events)
            after = events[-1].seq
        # The job was read before its events: if it was retried in between, the last of them is no `end`.
        if log.is_final and after >= log.last_seq and (not events or events[-1].type == "end"):
            return
        if not events and not await services.hub.wait(job_id, after, services.settings.sse_ping_s):
            yield b": ping\n\n"


def _frame(event: Event) -> bytes:
    data = json.dumps(event.data, ensure_ascii=False, separators=(",", ":"))
    return f"id: {event.seq}\nevent: {event.type}\ndata: {data}\n\n".encode()


class _Log(NamedTuple):
    """How far a job's log has got. The job itself, with its configuration, is not kept for as long as a stream lasts."""

    is_final: bool
    last_seq: int


def _read(services: Services, job_id: str, after: int, limit: int) -> tuple[_Log, list[Event]]:
    with services.engine.connect() as conn:
        job = find_job(conn, job_id)
        return _Log(job.is_final, job.event_seq), list_events(conn, job_id, after=after, limit=limit)


def _number(text: str | None, otherwise: RequestError) -> int:
    if text is None or text == "":
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise otherwise
    return min(int(text), 2**31 - 1)


def _not_an_event() -> RequestInvalid:
    pointer = "/header/Last-Event-ID"
    detail = ErrorDetail(code="field.event_number", message="Expected the number of an event.", pointer=pointer)
    return RequestInvalid("The event number cannot be used.", errors=[detail])
