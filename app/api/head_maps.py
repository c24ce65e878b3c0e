"""Head maps: made alone or imported, listed, compared, and the scores of all heads as JSON, table, array or picture.

Which heads a ratio picks is a view of a map.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from app.access_errors import StorageFull, TooManyJobs
from app.api.bodies import Received, receive
from app.api.content import PARTIAL, STORED, send_blob
from app.api.context import Context, Cursor, HeadMapId, IdempotencyKey, Limit, Link, Services, page_after, page_of
from app.api.documentation import HEAD_MAP_BODY, errors
from app.api.etags import IfMatch, IfNoneMatch, require_match, send_view
from app.api.head_map_imports import import_head_map
from app.api.job_requests import FILES, REFUSALS
from app.api.jobs import queue_stage
from app.api.receipts import receipt
from app.blobs import Blob
from app.core.results import delete_head_map
from app.db.head_maps import HeadMapRecord, get_head_map, list_head_maps
from app.errors import HeadMapMismatch, HeadMapNotFound, IdempotencyInFlight, IdempotencyMismatch, RangeNotSatisfiable
from app.key_schemas import ReceiptView
from app.result_errors import HeadMapInUse, HeadMapInvalid, HeadMapRanksNothing
from app.result_schemas import HeadMapBody, HeadMapDiffView, HeadMapSummary, HeadMapView
from app.schemas import Text
from app.views import JobView, Page
from p2d.config import DEFAULT_RATIO
from p2d.head_map_diff import compare
from p2d.head_maps import HeadMap

router = APIRouter(tags=["head maps"])

Ratio = Annotated[float, Query(gt=0, le=1, allow_inf_nan=False, description="Share of heads that is outlined.")]
KeptRatio = Annotated[float, Query(gt=0, le=1, allow_inf_nan=False, description="Share of heads that each map keeps.")]
With = Annotated[Text, Query(alias="with", max_length=64, description="Id of the head map to compare with.")]
OfModel = Annotated[Text | None, Query(max_length=128, description="Only those of this base model, by its name.")]
OfDataset = Annotated[Text | None, Query(max_length=64, description="Only those over this dataset, by its id.")]
OfScorer = Annotated[Text | None, Query(max_length=64, description="Only those of this scorer.")]

_IMPORTED: dict[int | str, dict[str, Any]] = {
    201: {"model": HeadMapSummary, "description": "The head map was imported."},
}
_MORE = (IdempotencyInFlight, IdempotencyMismatch, StorageFull, TooManyJobs, HeadMapInvalid)


def _file(media_type: str) -> dict[int | str, dict[str, object]]:
    return {200: {"description": "The file.", "content": {media_type: {}}}}


@router.post(
    "/head-maps",
    status_code=202,
    response_model=JobView,
    responses={**_IMPORTED, **errors(*REFUSALS, *_MORE)},
    openapi_extra=HEAD_MAP_BODY,
)
async def create_head_map(request: Request, services: Context, key: IdempotencyKey) -> Response:
    """Score all heads for a dataset: 202 with a job of kind `identify_heads`, whose `head_map` it then is.

    With the form's file `head_map` instead: take in a head map that was made elsewhere. It is checked against the installed
    base model of its digest.
    """
    files = (*FILES, "head_map")
    async with receive(request, services.settings, files=files, json_part="job", json=True) as received:
        make = import_head_map if "head_map" in received.files else _create
        return await run_in_threadpool(make, services, received, key)


@router.get("/head-maps")
def get_head_maps(
    services: Context,
    link: Link,
    limit: Limit = 20,
    cursor: Cursor = None,
    base_model: OfModel = None,
    dataset: OfDataset = None,
    scorer: OfScorer = None,
) -> Page[HeadMapSummary]:
    """All head maps, newest first."""
    before = page_after(cursor)
    with services.engine.connect() as conn:
        found = list_head_maps(
            conn, limit=limit + 1, before=before, base_model=base_model, dataset_id=dataset, scorer=scorer
        )
    views = [HeadMapSummary.model_validate(one) for one in found]
    return link(Page[HeadMapSummary].model_validate(page_of(views, [one.id for one in found], limit)))


# The paths with an ending come first: `{id}` would take `hm_....svg` too.


@router.get(
    "/head-maps/{id}.json",
    response_class=Response,
    responses={**_file("application/json"), **PARTIAL, **errors(HeadMapNotFound, RangeNotSatisfiable, *STORED)},
)
def get_head_map_json(request: Request, head_map_id: HeadMapId, services: Context) -> Response:
    """The file `head_map.json`, byte for byte."""
    found = _find(services, head_map_id)
    blob = Blob(found.sha256, found.size_bytes)
    return send_blob(request, services.blobs, blob, media_type="application/json", file_name=f"{found.id}.json")


@router.get(
    "/head-maps/{id}.svg",
    response_class=Response,
    responses={**_file("image/svg+xml"), **errors(HeadMapNotFound, *STORED)},
)
def get_head_map_svg(head_map_id: HeadMapId, services: Context, ratio: Ratio = DEFAULT_RATIO) -> Response:
    """A picture, layers by heads; the heads that the ratio picks are outlined. All grey where the map ranks nothing."""
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
    responses={**_file("text/csv"), **errors(HeadMapNotFound, *STORED)},
)
def get_head_map_csv(head_map_id: HeadMapId, services: Context) -> Response:
    """A table, one line per head, best first."""
    return Response(_load(services, _find(services, head_map_id)).to_csv(), media_type="text/csv")


@router.get(
    "/head-maps/{id}.npz",
    response_class=Response,
    responses={**_file("application/octet-stream"), **errors(HeadMapNotFound, *STORED)},
)
def get_head_map_npz(head_map_id: HeadMapId, services: Context) -> Response:
    """A NumPy archive: `scores` [layer, head] and, of maps that have them, `halves` [half, layer, head]; float64, no pickles."""
    headers = {"Content-Disposition": f'attachment; filename="{head_map_id}.npz"', "X-Content-Type-Options": "nosniff"}
    content = _load(services, _find(services, head_map_id)).to_npz()
    return Response(content, media_type="application/octet-stream", headers=headers)


@router.get("/head-maps/{id}/diff", responses=errors(HeadMapNotFound, HeadMapMismatch, HeadMapRanksNothing, *STORED))
def diff_head_maps(
    head_map_id: HeadMapId, services: Context, other: With, ratio: KeptRatio = DEFAULT_RATIO
) -> HeadMapDiffView:
    """Two head maps side by side: rank correlation, whole and by layer, and how many of the kept heads they share against chance.

    Their models may differ, as long as layers and heads are of the same number. A map that ranks nothing, as those by `uniform`,
    is compared with none.
    """
    records = _find(services, head_map_id), _find(services, other)
    one, two = (_load(services, record) for record in records)
    if (one.n_layers, one.n_heads) != (two.n_layers, two.n_heads):
        text = f"{one.n_layers} layers of {one.n_heads} heads cannot be compared with {two.n_layers} of {two.n_heads}."
        raise HeadMapMismatch(text)
    if flat := [record.id for record, head_map in zip(records, (one, two), strict=True) if not head_map.ranks]:
        raise HeadMapRanksNothing(ids=flat)
    found = asdict(compare(one, two, ratio))
    same = one.model_digest == two.model_digest
    return HeadMapDiffView.model_validate(
        {**found, "head_map": head_map_id, "with_head_map": other, "same_model": same}
    )


@router.get("/head-maps/{id}", response_model=HeadMapView, responses=errors(HeadMapNotFound, *STORED))
def get_one_head_map(head_map_id: HeadMapId, services: Context, if_none_match: IfNoneMatch = None) -> Response:
    """A head map with all its scores; a later job may name it as `heads.head_map`."""
    return send_view(_view(services, head_map_id), if_none_match)


@router.delete("/head-maps/{id}", responses=errors(HeadMapNotFound, HeadMapInUse, *STORED))
def delete_one_head_map(head_map_id: HeadMapId, services: Context, if_match: IfMatch = None) -> ReceiptView:
    """Delete a head map and its file. Refused while a job that has not ended needs it; its job stays."""
    # Without a lock: a head map is deleted or as it was made.
    require_match(if_match, lambda: _view(services, head_map_id))
    with services.engine.begin() as conn:
        return receipt(services, conn, "head_map", head_map_id, delete_head_map(conn, head_map_id))


def _create(services: Services, received: Received, key: str | None) -> Response:
    return queue_stage(services, received, key, shape=HeadMapBody, kind="identify_heads", path="/head-maps")


def _find(services: Services, head_map_id: str) -> HeadMapRecord:
    with services.engine.connect() as conn:
        found = get_head_map(conn, head_map_id)
    if found is None:
        raise HeadMapNotFound(id=head_map_id)
    return found


def _view(services: Services, head_map_id: str) -> HeadMapView:
    found = _find(services, head_map_id)
    content = json.loads(b"".join(services.blobs.checked(found.sha256)))
    return HeadMapView.model_validate({**asdict(found), "map": content})


def _load(services: Services, record: HeadMapRecord) -> HeadMap:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head_map.json"
        services.blobs.fetch(record.sha256, path)
        return HeadMap.load(path)
