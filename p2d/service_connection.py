"""Requests to the service that are tried again where that can help: cut connections, 429, 503, a first try still at work.

What is asked is `p2d.client`'s business.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx

from p2d.service_answers import ServiceProblem, ServiceUnreachable

RETRY_STATUS = frozenset({429, 502, 503, 504})
"""Answers that mean: the same request can work in a moment."""


class ServiceConnection:
    """Connections to one service, and how patient to be with it; safe to share between threads like httpx.Client."""

    def __init__(self, http: httpx.Client, *, retries: int, sleep: Callable[[float], None] = time.sleep) -> None:
        self.http, self.retries, self.sleep = http, retries, sleep

    def json(self, method: str, path: str, **request: Any) -> Any:
        """The JSON of an answer; None where there is none. Raises ServiceProblem, ServiceUnreachable."""
        answer = self.retry(lambda: self.http.request(method, path, **request))
        return answer.json() if answer.content else None

    def post_once(
        self, path: str, body: Mapping[str, Any] | None = None, *, key: str | None = None, **request: Any
    ) -> Any:
        """POST under an Idempotency-Key, so that sent again after a cut it still has one effect; the answer's JSON."""
        request |= {} if body is None else {"json": dict(body)}
        return self.json("POST", path, headers={"Idempotency-Key": key or str(uuid.uuid4())}, **request)

    def text(self, path: str) -> str:
        """The text of a file that the service makes."""
        return self.retry(lambda: self.http.get(path)).text

    def pages(self, path: str, filters: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
        """Every entry of a list, page by page."""
        cursor: str | None = None
        while True:
            page = self.json("GET", path, params=dict(filters) | ({"cursor": cursor} if cursor else {}))
            yield from page["data"]
            cursor = page.get("next_cursor")
            if not cursor:
                return

    def retry(self, send: Callable[[], httpx.Response]) -> httpx.Response:
        """The first answer that asks for no other try; the last problem when there were too many."""
        for failures in range(self.retries + 1):
            wait_s = backoff_s(failures + 1)
            try:
                answer = send()
                raise_for(answer)
                return answer
            except httpx.TransportError as error:
                last: Exception = ServiceUnreachable(f"No answer from {self.http.base_url}: {error}")
            except Retry as error:
                last, wait_s = error.problem, max(wait_s, error.after_s)
            if failures < self.retries:
                self.sleep(wait_s)
        raise last


class Retry(Exception):
    """An answer that asks for another try."""

    def __init__(self, problem: ServiceProblem, after_s: float) -> None:
        super().__init__(str(problem))
        self.problem = problem
        self.after_s = after_s


def raise_for(answer: httpx.Response) -> None:
    """Raise Retry or ServiceProblem for an answer that is no success."""
    if answer.is_success:
        return
    answer.read()
    try:
        body = answer.json()
    except ValueError:
        body = {}
    problem = ServiceProblem(answer.status_code, body if isinstance(body, dict) else {})
    # 409 idempotency.in_flight: the first try is still at work.
    if answer.status_code in RETRY_STATUS or problem.code == "idempotency.in_flight":
        after = answer.headers.get("Retry-After", "")
        raise Retry(problem, float(after) if after.isdigit() else 0.0)
    raise problem


def backoff_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row."""
    # Full jitter, so that clients cut together do not come back together.
    return random.uniform(0.1, min(10.0, 0.25 * 2.0**failures))  # noqa: S311
