"""The web application: routers, problem handlers, and the servers it holds while it runs.

    uvicorn --factory app.main:app_from_environment

Starts no server and migrates nothing: `app.embedded` and `p2d migrate` do. Importing it leaves torch unloaded.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI

from app import problems
from app.api import (
    artifacts,
    datasets,
    documentation,
    events,
    head_maps,
    job_moves,
    job_views,
    jobs,
    models,
    ops,
    selections,
    uploads,
)
from app.api.bodies import sweep
from app.api.context import Services, Wake
from app.api.event_hub import EventHub
from app.blobs import BlobStore
from app.core.garbage import ObjectBook
from app.core.wake import Waker
from app.db.engine import make_engine
from app.settings import Settings

DESCRIPTION = "Adapt a language model by training about 10 % of its attention heads on about 10 % of the data."


def create_app(settings: Settings, *, waker: Wake | None = None) -> FastAPI:
    """Build the application on servers that run already.

    Args:   settings: with all three server URLs set.
            waker: what tells workers of new work; the broker of the settings without one.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = make_engine(
            settings.url("database_url"), pool_size=settings.db_pool_size, pool_wait_s=settings.db_pool_wait_s
        )
        own = Waker(settings.url("broker_url")) if waker is None else None
        hub = EventHub(engine, poll_s=settings.sse_poll_s, max_streams=settings.max_streams)
        blobs = BlobStore.open(settings.url("store_url"), ObjectBook(engine))
        app.state.services = Services(settings, engine, blobs, own or waker, hub)  # type: ignore[arg-type]
        sweep(settings)
        polling = asyncio.create_task(hub.run())
        try:
            yield
        finally:
            await hub.close()
            polling.cancel()
            if own is not None:
                own.close()
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
    problems.install(app)
    documentation.install(app)
    for room in (jobs, job_views, job_moves, events, artifacts, datasets, uploads, head_maps, selections, models, ops):
        app.include_router(room.router)
    app.add_middleware(problems.RequestIds)
    return app


def app_from_environment() -> FastAPI:
    """What uvicorn's `--factory` calls."""
    return create_app(Settings())
