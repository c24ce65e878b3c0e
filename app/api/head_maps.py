"""Head maps: the scores of all heads, as JSON, picture or table. Which heads a ratio picks is a view of it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from app.api.content import send_blob
from app.api.context import Context, HeadMapId, Services
from app.api.documentation import errors
from app.blobs import Blob
from app.db.head_maps import HeadMapRecord, get_head_map
from app.errors import HeadMapNotFound
from app.views import HeadMapView
from p2d.config import DEFAULT_RATIO
from p2d.head_maps import HeadMap

router = APIRouter(tags=["head maps"])

Ratio = Annotated[float, Query(gt=0, le=1, allow_inf_nan=False, description="Share of heads that is outlined.")]


def _file(media_type: str) -> dict[int | str, dict[str, object]]:
    return {200: {"description": "The file.", "content": {media_type: {}}}}


# The paths with an ending come first: `{id}` would take `hm_....svg` too.


@router.get(
    "/head-maps/{id}.json",
    response_class=Response,
    responses={**_file("application/json"), **errors(HeadMapNotFound)},
)
def get_head_map_json(request: Request, head_map_id: HeadMapId, services: Context) -> Response:
    """The file `head_map.json`, byte for byte."""
    found = _find(services, head_map_id)
    blob = Blob(found.sha256, found.size_bytes)
    return send_blob(request, services.blobs, blob, media_type="application/json", file_name=f"{found.id}.json")


@router.get(
    "/head-maps/{id}.svg",
    response_class=Response,
    responses={**_file("image/svg+xml"), **errors(HeadMapNotFound)},
)
def get_head_map_svg(head_map_id: HeadMapId, services: Context, ratio: Ratio = DEFAULT_RATIO) -> Response:
    """A picture, layers by heads; the heads that the ratio picks are outlined."""
    head_map = _load(services, _find(services, head_map_id))
    # No script may run should a browser open it.
    headers = {
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
        "X-Content-Type-Options": "nosniff",
    }
    return Response(head_map.to_svg(ratio), media_type="image/svg+xml", headers=headers)


@router.get(
    "/head-maps/{id}.csv",
    response_class=Response,
    responses={**_file("text/csv"), **errors(HeadMapNotFound)},
)
def get_head_map_csv(head_map_id: HeadMapId, services: Context) -> Response:
    """A table, one line per head, best first."""
    return Response(_load(services, _find(services, head_map_id)).to_csv(), media_type="text/csv")


@router.get("/head-maps/{id}", responses=errors(HeadMapNotFound))
def get_one_head_map(head_map_id: HeadMapId, services: Context) -> HeadMapView:
    """A head map with all its scores; a later job may name it as `heads.head_map`."""
    found = _find(services, head_map_id)
    content = json.loads(b"".join(services.blobs.stream(found.sha256)))
    fields = {name: getattr(found, name) for name in HeadMapView.model_fields if name != "map"}
    return HeadMapView.model_validate({**fields, "map": content})


def _find(services: Services, head_map_id: str) -> HeadMapRecord:
    with services.engine.connect() as conn:
        found = get_head_map(conn, head_map_id)
    if found is None:
        raise HeadMapNotFound(id=head_map_id)
    return found


def _load(services: Services, record: HeadMapRecord) -> HeadMap:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head_map.json"
        services.blobs.fetch(record.sha256, path)
        return HeadMap.load(path)
