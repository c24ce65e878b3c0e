"""How often a project may ask: one count for all API processes, in the broker; in this process alone while that is away."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import structlog
from limits import RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from app.access_errors import TooManyRequests

AWAY_S = 10.0
"""Seconds without a look at a broker that did not answer: each look would keep a request waiting."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a project has left."""

    remaining: int
    reset_s: int
    """Seconds until it has more."""


class Rates:
    """Counts the requests of projects over a sliding minute. Safe to share between threads."""

    def __init__(self, broker_url: str, *, per_minute: int) -> None:
        self._limit = RateLimitItemPerMinute(per_minute, namespace="p2d")
        options: dict[str, Any] = {"socket_timeout": 0.5, "socket_connect_timeout": 0.5}
        shared = RedisStorage(broker_url, wrap_exceptions=True, **options)
        self._shared = SlidingWindowCounterRateLimiter(shared)
        self._own = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._away_until = 0.0

    def take(self, project_id: str) -> tuple[bool, Allowance]:
        """Whether one more request is allowed, and what is left."""
        if time.monotonic() >= self._away_until:
            try:
                return self._take(self._shared, project_id)
            except StorageError as error:
                self._away_until = time.monotonic() + AWAY_S
                log.warning("rates.broker_away", error=type(error.storage_error).__name__)
        return self._take(self._own, project_id)

    def headers(self, allowance: Allowance) -> dict[str, str]:
        """As draft-ietf-httpapi-ratelimit-headers has them."""
        return {
            "RateLimit-Policy": f'"minute";q={self._limit.amount};w=60',
            "RateLimit": f'"minute";r={allowance.remaining};t={allowance.reset_s}',
        }

    def refusal(self, allowance: Allowance) -> TooManyRequests:
        """The error of a request too many."""
        return TooManyRequests(per_minute=self._limit.amount, retry_after_s=allowance.reset_s)

    def _take(self, limiter: SlidingWindowCounterRateLimiter, project_id: str) -> tuple[bool, Allowance]:
        allowed = limiter.hit(self._limit, project_id)
        stats = limiter.get_window_stats(self._limit, project_id)
        left_s = min(max(math.ceil(stats.reset_time - time.time()), 1), 60)
        return allowed, Allowance(stats.remaining if allowed else 0, left_s)
