"""HTTP/1.1 on the wire: how slow a client may be, and a problem even for what is no HTTP.

uvicorn waits without end for a request that comes byte by byte, so a few thousand such sockets would leave nobody else a
connection. Here the head of a request has seconds, and a body must keep coming. What a request means is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource

import h11
import structlog
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from app.db.ids import new_id
from app.errors import RequestError, RequestTooSlow
from app.problems import MEDIA_TYPE, problem_body

log = structlog.get_logger()


def allow_connections() -> None:
    """Let this process have as many open files as it may: many a system gives 1,024, fewer than the event streams allowed."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS says "unlimited" and means less
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class PatientProtocol(H11Protocol):
    """uvicorn's own protocol with an end to its patience; for `uvicorn.Config(http=...)`."""

    head_s = 10.0
    """Seconds from the connection, or the first byte of a later request on it, to the end of the head."""
    look_s = 10.0
    """Seconds between two looks at a body that is coming."""
    body_bytes_s = 1024
    """Bytes a second that a body must bring between two looks, unless it is we who do not read."""
    body_s = 3600.0
    """Seconds that a body may take in all: a gibibyte at 2.4 Mbit/s. Larger files or slower lines send parts."""

    _deadline: asyncio.TimerHandle | None = None
    _look: asyncio.TimerHandle | None = None
    _bytes = 0
    """Received on this connection so far."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A client is there, and owes a request."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is owed any more."""
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Some bytes of a request."""
        self._bytes += len(data)
        super().data_received(data)

    def handle_events(self) -> None:
        """Go on with what was received, and see what is owed now."""
        super().handle_events()
        if self.transport.is_closing():
            return
        if self.conn.their_state is h11.SEND_BODY:
            if self._look is None:
                self._expect_body()
        elif self.conn.their_state is not h11.IDLE:
            self._expect_nothing()
        elif self._deadline is None and self.timeout_keep_alive_task is None:  # which ends a connection that is idle
            self._expect_head()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP/1.1."""
        self._end_with(RequestError("The request is not HTTP/1.1."))

    def _expect_nothing(self) -> None:
        for timer in (self._deadline, self._look):
            if timer is not None:
                timer.cancel()
        self._deadline = self._look = None

    def _expect_head(self) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(self.head_s, self._give_up)

    def _expect_body(self) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(self.body_s, self._give_up)
        self._look_again(judge_next=True)

    def _look_again(self, *, judge_next: bool) -> None:
        self._look = self.loop.call_later(self.look_s, self._look_at_body, self._bytes, judge_next)

    def _look_at_body(self, before: int, judge: bool) -> None:
        waits_for_us = self.flow.read_paused or self.cycle.waiting_for_100_continue
        if judge and not waits_for_us and self._bytes - before < self.body_bytes_s * self.look_s:
            self._give_up()
            return
        self._look_again(judge_next=not waits_for_us)

    def _give_up(self) -> None:
        client = self.client[0] if self.client else None
        log.warning("connection.too_slow", client=client, bytes=self._bytes)
        if self._bytes == 0:
            self.transport.close()  # no request, so no answer: browsers open connections that they never use
            return
        self._end_with(RequestTooSlow())

    def _end_with(self, error: RequestError) -> None:
        """Answer with a problem, if no other answer has begun, and close the connection."""
        self._expect_nothing()
        if self.cycle is not None:
            self.cycle.disconnected = True  # whatever the application still says goes nowhere
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            request_id = new_id("req")
            body = problem_body(error.to_json(), request_id=request_id)
            headers = {
                "Content-Type": MEDIA_TYPE,
                "Content-Length": str(len(content := json.dumps(body).encode())),
                "X-Request-Id": request_id,
                "Connection": "close",
            }
            status = int(body["status"])
            head = h11.Response(status_code=status, headers=list(headers.items()), reason=STATUS_PHRASES[status])
            for event in (head, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
