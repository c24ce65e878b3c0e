"""GET /metrics in Prometheus' text format: the ledger as it is at the scrape, and the requests that were served."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access_errors import InsufficientScope, NotAllowed
from app.api.context import Admin
from app.api.documentation import errors
from app.db.engine import Engine
from app.db.measures import RATIOS, SECONDS, Counted, Measures, Queue, measure
from app.db.projects import DEFAULT_PROJECT

router = APIRouter(tags=["service"])

LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper ends of the buckets of a request's seconds."""

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus' text format."}
}


@router.get(
    "/metrics",
    response_class=Response,
    responses={**_TEXT, **errors(InsufficientScope, NotAllowed)},
)
def get_metrics(request: Request, caller: Admin) -> Response:
    """Numbers of the whole service for Prometheus; needs an admin key of the project `default` once there are keys.

    Those of the ledger are the same from every API process; those of HTTP requests are of the processes that `p2d up` started.
    """
    if caller.project_id != DEFAULT_PROJECT:
        raise NotAllowed("These numbers are of all projects; use an admin key of the project 'default'.")
    registry: CollectorRegistry = request.app.state.metrics
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)


class Requests:
    """Counts requests by route, method and class of status, and times them until their answer begins."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry | None) -> None:
        self._app = app
        self._number = Counter(
            "p2d_http_requests",
            "HTTP requests, by the route's template.",
            ("route", "method", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "p2d_http_request_seconds",
            "Seconds until an answer began; streams and downloads go on after that.",
            ("route", "method"),
            buckets=LATENCIES,
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        begun = False

        def count(status: int) -> None:
            nonlocal begun
            begun = True
            route = getattr(scope.get("route"), "path", "none")  # a made-up path must not make a series
            method = scope["method"] if scope["method"] in METHODS else "other"
            self._number.labels(route, method, f"{status // 100}xx").inc()
            self._seconds.labels(route, method).observe(time.perf_counter() - started)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            if not begun:  # an unknown exception: it is answered outside of here
                count(500)


class Ledger(Collector):
    """Reads the ledger when it is asked."""

    def __init__(self, engine: Engine, queue: str) -> None:
        """`queue`: shown also while nothing waits in it, so that an alert can tell nothing from no answer."""
        self._engine, self._queue = engine, queue

    def describe(self) -> Iterator[Metric]:
        """Nothing beforehand: registering must not ask the database."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """One scrape. Raises DatabaseUnavailable."""
        with self._engine.connect() as conn:
            found = measure(conn)
        yield from _gauges(found, {self._queue: Queue(ready=0, oldest_s=0.0), **found.queues})
        yield from _counters(found)


def _gauges(found: Measures, queues: Mapping[str, Queue]) -> Iterator[Metric]:
    by_status = GaugeMetricFamily("p2d_jobs", "Jobs by status.", labels=["status"])
    for status, number in found.jobs.items():
        by_status.add_metric([status], number)
    ready = GaugeMetricFamily("p2d_steps_ready", "Steps that wait for a worker.", labels=["queue"])
    oldest = GaugeMetricFamily(
        "p2d_steps_ready_oldest_seconds", "Age of the step that waits longest.", labels=["queue"]
    )
    for name, queue in queues.items():
        ready.add_metric([name], queue.ready)
        oldest.add_metric([name], queue.oldest_s)
    yield from (by_status, ready, oldest)
    for name, said, value in (
        ("p2d_steps_running", "Steps that a worker holds.", found.running_steps),
        ("p2d_lease_oldest_seconds", "Age of the oldest claim that is still held.", found.oldest_running_s),
        ("p2d_leases_expired", "Claims whose worker is silent, until the next sweep.", found.expired_leases),
        ("p2d_workers_busy", "Workers that hold a step; idle ones are not known.", found.busy_workers),
        ("p2d_store_objects", "Objects in the store.", found.objects),
        ("p2d_store_bytes", "Bytes of the objects in the store.", found.stored_bytes),
        ("p2d_webhooks_disabled", "Webhooks that the service disabled: gone, or failing.", found.disabled_webhooks),
    ):
        yield GaugeMetricFamily(name, said, value)
    deliveries = GaugeMetricFamily(
        "p2d_webhook_deliveries", "Deliveries to webhooks that are kept, by status.", labels=["status"]
    )
    for status, number in found.deliveries.items():
        deliveries.add_metric([status], number)
    yield deliveries
    error = GaugeMetricFamily(
        "p2d_estimate_error",
        "Quantiles of actual over estimated seconds of a step, of the newest finished ones: what intervals are made of.",
        labels=["step", "quantile"],
    )
    for step, past in found.errors.items():
        for quantile, value in (("0.1", past.p10), ("0.5", past.p50), ("0.9", past.p90)):
            error.add_metric([step, quantile], value)
    off = GaugeMetricFamily(
        "p2d_estimate_absolute_error",
        "Median of |actual / estimated seconds - 1| of the newest finished steps, and of whole jobs (`job`).",
        labels=["step"],
    )
    for step, past_off in found.absolute_errors.items():
        off.add_metric([step], past_off.median)
    yield from (error, off)


def _counters(found: Measures) -> Iterator[Metric]:
    tried = CounterMetricFamily(
        "p2d_attempts", "Attempts that ended, by step, outcome and error.", labels=["step", "outcome", "code"]
    )
    for labels, number in found.attempts.items():
        tried.add_metric(labels, number)
    yield tried
    sent = CounterMetricFamily(
        "p2d_webhook_tries", "Tries to deliver an event to a webhook, by what came of it.", labels=["outcome"]
    )
    for outcome, number in found.delivery_tries.items():
        sent.add_metric([outcome], number)
    yield sent
    yield CounterMetricFamily("p2d_uploaded_bytes", "Bytes of datasets as uploaded.", found.uploaded_bytes)
    yield _histogram(
        "p2d_step_seconds",
        "Seconds of finished steps, without those whose outputs an earlier job had.",
        SECONDS,
        found.step_seconds,
    )
    yield _histogram(
        "p2d_estimate_ratio", "Actual over estimated seconds of finished steps.", RATIOS, found.estimate_ratios
    )


def _histogram(name: str, said: str, edges: Sequence[float], by_step: Mapping[str, Counted]) -> Metric:
    metric = HistogramMetricFamily(name, said, labels=["step"])
    for step, counted in by_step.items():
        below, buckets = 0, []
        for edge, number in zip((*map(str, edges), "+Inf"), counted.numbers, strict=True):
            below += number
            buckets.append((edge, float(below)))
        metric.add_metric([step], buckets, counted.total)
    return metric
