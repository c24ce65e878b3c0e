"""Take in a head map that was made elsewhere: its file is checked field by field, and against the base model that it names."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastapi import Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from app.api.bodies import Received, ReceivedFile
from app.api.context import Services
from app.api.idempotency import Once
from app.core.quotas import allow_storage
from app.db.head_maps import get_head_map, insert_imported
from app.errors import HeadMapMismatch, RequestInvalid, RequestTooLarge
from app.problems import body_faults
from app.result_errors import HeadMapInvalid
from app.result_schemas import HeadMapFile, HeadMapSummary
from p2d.errors import ErrorDetail, ModelError
from p2d.head_maps import HeadMap
from p2d.model_info import ModelInfo, list_models
from p2d.wording import counted

MAX_BYTES = 16 << 20
"""Largest head_map.json that is read: three scores of some 20 characters for each of a quarter of a million heads."""

MAX_LISTED = 100
"""Faults in errors[] at most."""

_ROOT = "/head_map"


def import_head_map(services: Services, received: Received, key: str | None) -> Response:
    """Check and record the head map of a form: 201, or the answer of an earlier twin.

    Raises: RequestInvalid, RequestTooLarge, HeadMapInvalid, HeadMapMismatch, StorageFull. Nothing is stored then.
    """
    once = Once.of("POST /head-maps", key, None, received)
    if (replay := once.earlier(services.engine)) is not None:
        return replay
    content = _read(received)
    info = _model_of(services, content)
    if faults := list(_misshapen(content, info)):
        raise _invalid(faults)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head_map.json"
        path.write_text(content.model_dump_json())
        HeadMap.load(path).save(path)  # in the form of our own, so that what came from here is the same object again
        blob = services.blobs.put_file(path)
    with services.engine.begin() as conn:
        if (replay := once.take(conn)) is not None:
            return replay
        allow_storage(conn, services.settings, size_bytes=blob.size_bytes)
        head_map_id = insert_imported(
            conn,
            sha256=blob.sha256,
            size_bytes=blob.size_bytes,
            base_model=info.name,
            model_digest=info.digest,
            scorer=content.scorer,
        )
        services.note(conn, "head_map.import", head_map_id, {"sha256": blob.sha256})
        view = HeadMapSummary.model_validate(get_head_map(conn, head_map_id)).model_dump(mode="json")
        headers = {"Location": f"/head-maps/{head_map_id}"}
        once.keep(conn, 201, headers, view)
    return JSONResponse(view, status_code=201, headers=headers)


def _read(received: Received) -> HeadMapFile:
    others = sorted(received.files.keys() - {"head_map"}) + (["job"] if received.json is not None else [])
    if others:
        text = "A head map is imported alone: it says itself of which model it is."
        faults = [ErrorDetail(code="field.not_allowed", message=text, pointer=f"/{name}") for name in others]
        raise RequestInvalid(text, errors=faults)
    file: ReceivedFile = received.files["head_map"]
    if file.size_bytes > MAX_BYTES:
        raise RequestTooLarge(limit=MAX_BYTES)
    try:
        return HeadMapFile.model_validate_json(file.path.read_bytes())
    except ValidationError as error:
        raise _invalid(body_faults(error.errors(), root=_ROOT)) from None


def _model_of(services: Services, content: HeadMapFile) -> ModelInfo:
    """The installed model that the map is of, whatever it is called here. Raises HeadMapMismatch."""
    installed = [model for _, model in list_models(services.settings.models_dir) if not isinstance(model, ModelError)]
    same = [model for model in installed if model.digest == content.model_digest]
    if same:
        return next((model for model in same if model.name == content.model_name), same[0])
    other = next((model for model in installed if model.name == content.model_name), None)
    text = f"The head map is of a model with the digest {content.model_digest}, "
    text += f"the installed {other.name!r} has {other.digest}." if other else "which is not installed."
    detail = ErrorDetail(code=HeadMapMismatch.code, message=text, pointer=f"{_ROOT}/model_digest")
    raise HeadMapMismatch(text, errors=[detail])


def _misshapen(content: HeadMapFile, info: ModelInfo) -> Iterator[ErrorDetail]:
    tables = [("scores", content.scores), *((f"halves/{i}", half) for i, half in enumerate(content.halves))]
    if len(content.halves) == 1:
        text = "Expected the scores of two half-proxies, or none."
        yield ErrorDetail(code="head_map.halves", message=text, pointer=f"{_ROOT}/halves")
    for name, layers in tables:
        if len(layers) != info.n_layers:
            text = f"Expected {counted(info.n_layers, 'layer', 'layers')}, as {info.name!r} has; got {len(layers)}."
            yield ErrorDetail(code="head_map.shape", message=text, pointer=f"{_ROOT}/{name}")
        for layer, heads in enumerate(layers):
            if len(heads) != info.n_heads:
                text = f"Expected {counted(info.n_heads, 'head', 'heads')}, as {info.name!r} has; got {len(heads)}."
                yield ErrorDetail(code="head_map.shape", message=text, pointer=f"{_ROOT}/{name}/{layer}")


def _invalid(faults: list[ErrorDetail]) -> HeadMapInvalid:
    text = counted(len(faults), "thing in the file is wrong.", "things in the file are wrong.")
    return HeadMapInvalid(f"This is no head map: {text}", errors=faults[:MAX_LISTED], errors_total=len(faults))
