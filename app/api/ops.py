"""Whether the process runs, whether its servers answer, and which version it is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import redis
from fastapi import APIRouter

from app.access_errors import NotMigrated
from app.api.context import OpenContext, Services
from app.api.documentation import errors
from app.db.engine import DatabaseUnavailable, PoolTimeout, SchemaBehind
from app.db.schema import lacking
from app.errors import StoreUnavailable, Unavailable
from app.views import HealthView, ReadinessView, VersionView

router = APIRouter(tags=["service"])

OPEN: dict[str, object] = {"security": []}
"""What /openapi.json says of a route that anybody may ask."""

Check = Literal["ok", "unavailable", "not_migrated"]


@router.get("/healthz", openapi_extra=OPEN)
async def healthz() -> HealthView:  # without a thread: it answers however many are taken
    """The process runs. Says nothing of the servers behind it."""
    return HealthView()


@router.get("/readyz", openapi_extra=OPEN, responses=errors(Unavailable, NotMigrated))
def readyz(services: OpenContext) -> ReadinessView:
    """Database, with the tables of this version, and store answer. Without the broker jobs only start later: `degraded`."""
    checks = {"database": _database(services), "store": _store(services), "broker": _broker(services)}
    if "unavailable" in (checks["database"], checks["store"]):
        raise Unavailable("A server behind the service does not answer.", checks=checks)
    if checks["database"] == "not_migrated":
        raise NotMigrated(checks=checks)
    return ReadinessView(status="ok" if checks["broker"] == "ok" else "degraded", checks=checks)


@router.get("/version", openapi_extra=OPEN)
def get_version() -> VersionView:
    """Which version of P2D runs."""
    return VersionView(version=product_version())


def product_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("p2d")
    except PackageNotFoundError:  # a checkout that was not installed
        return "0+unknown"


def _database(services: Services) -> Check:
    try:
        with services.engine.connect() as conn:
            return "not_migrated" if lacking(conn) else "ok"
    except SchemaBehind:
        return "not_migrated"
    except (DatabaseUnavailable, PoolTimeout):
        return "unavailable"


def _store(services: Services) -> Check:
    try:
        services.blobs.ping()
    except StoreUnavailable:
        return "unavailable"
    return "ok"


def _broker(services: Services) -> Check:
    try:
        with redis.Redis.from_url(
            services.settings.url("broker_url"), socket_timeout=1, socket_connect_timeout=1
        ) as broker:
            broker.ping()
    except (redis.RedisError, OSError):
        return "unavailable"
    return "ok"
