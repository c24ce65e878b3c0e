"""The web application: routers, problem handlers, and the servers it holds while it runs.

    uvicorn --factory app.main:app_from_environment

Starts no server and migrates nothing: `app.embedded` and `p2d migrate` do. Importing it leaves torch unloaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from app import problems
from app.access_errors import NotMigrated
from app.api import (
    artifacts,
    audit,
    comparisons,
    datasets,
    documentation,
    error_pages,
    estimates,
    events,
    exports,
    head_maps,
    job_moves,
    job_records,
    job_views,
    jobs,
    keys,
    metrics,
    models,
    ops,
    part_urls,
    reports,
    selections,
    uploads,
    usage,
    webhooks,
)
from app.api.bodies import sweep
from app.api.context import CLOSED, Services, Wake
from app.api.door import Door, is_loopback
from app.api.event_hub import EventHub
from app.api.queries import STRICT
from app.blobs import BlobStore
from app.core.egress import Egress, egress_of
from app.core.garbage import ObjectBook
from app.core.outlook import Lookout
from app.core.quotas import JobQuota
from app.core.wake import Waker
from app.db.api_keys import any_key
from app.db.engine import NOBODY, SchemaBehind, for_project, make_engine
from app.errors import NoKeys
from app.settings import Settings

DESCRIPTION = "Adapt a language model by training its attention heads on the part of the data that they respond to."

ROOMS = (
    jobs,
    job_views,
    job_records,
    job_moves,
    estimates,
    events,
    artifacts,
    exports,
    datasets,
    reports,
    uploads,
    part_urls,
    head_maps,
    selections,
    comparisons,
    models,
    keys,
    webhooks,
    audit,
    usage,
)
"""Whose routes stand behind the door; `ops`, `metrics` and `error_pages` say themselves who may ask."""


def create_app(settings: Settings, *, waker: Wake | None = None, egress: Egress | None = None) -> FastAPI:
    """Build the application on servers that run already.

    Args:   settings: with all three server URLs set.
            waker: what tells workers of new work; the broker of the settings without one.
            egress: what fetches data by reference; that of the settings without one.
    """
    registry = CollectorRegistry()  # of this app: a process may run several
    if together := "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # with other processes: each tells what all have counted
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = make_engine(
            settings.url("database_url"), pool_size=settings.db_pool_size, pool_wait_s=settings.db_pool_wait_s
        )
        own = Waker(settings.url("broker_url")) if waker is None else None
        hub = EventHub(
            engine,
            poll_s=settings.sse_poll_s,
            max_streams=settings.max_streams,
            project_streams=settings.project_streams,
        )
        blobs = BlobStore.open(settings.url("store_url"), ObjectBook(engine))
        registry.register(ledger := metrics.Ledger(engine, settings.worker_queue))
        app.state.services = Services(
            settings=settings,
            engine=for_project(engine, NOBODY),
            blobs=blobs,
            waker=own or waker,  # type: ignore[arg-type]
            hub=hub,
            door=Door(settings, engine),
            egress=egress or egress_of(settings),
            lookout=Lookout(engine),
            jobs=JobQuota(settings),
        )
        sweep(settings)
        polling = asyncio.create_task(hub.run())
        try:
            yield
        finally:
            await hub.close()
            polling.cancel()
            if own is not None:
                own.close()
            registry.unregister(ledger)
            engine.dispose()

    app = FastAPI(
        title="P2D",
        version=ops.product_version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        responses=documentation.COMMON,
        strict_content_type=True,
        redirect_slashes=False,
    )
    app.state.metrics = registry
    problems.install(app)
    documentation.install(app)
    for room in ROOMS:
        app.include_router(room.router, dependencies=[*CLOSED, STRICT])
    for room in (ops, metrics, error_pages):
        app.include_router(room.router, dependencies=[STRICT])
    app.add_middleware(problems.RequestIds)
    app.add_middleware(metrics.Requests, registry=None if together else registry)  # last: the outermost
    return app


def may_listen(settings: Settings) -> None:
    """Raise NoKeys if the API would answer strangers, NotMigrated if nobody can tell.

    Started otherwise, it still answers none: see app.api.door.
    """
    if is_loopback(settings.host):
        return
    engine = make_engine(settings.url("database_url"))
    try:
        with engine.connect() as conn:
            if not any_key(conn):
                raise NoKeys(host=settings.host)
    except SchemaBehind:
        raise NotMigrated() from None
    finally:
        engine.dispose()


def app_from_environment() -> FastAPI:
    """What uvicorn's `--factory` calls."""
    return create_app(Settings())
