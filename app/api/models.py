"""The base models that are installed, usable or not. Installing one is the operator's business (`p2d models add`)."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi import Path as PathParameter

from app.api.bodies import read_json, receive_json
from app.api.context import Context, IdempotencyKey, Services
from app.api.documentation import MODEL_CHECK_BODY, errors
from app.api.etags import IfNoneMatch, send_view
from app.problems import problem_body
from app.schemas import ModelCheckBody
from app.views import ModelView, Page
from p2d.errors import ModelError, ModelNotFound
from p2d.model_info import ModelShape, find_model, list_models, read_model_info, shape_of

router = APIRouter(tags=["models"])

_DIGEST = re.compile("[0-9a-f]{64}")


@router.get("/models")
def get_models(services: Context) -> Page[ModelView]:
    """All installed models; a handful, so always one page."""
    found = list_models(services.settings.models_dir)
    return Page[ModelView](data=[_view(name, model) for name, model in found], has_more=False)


@router.post("/models/check", response_model=ModelView, openapi_extra=MODEL_CHECK_BODY)
async def check_model(request: Request, services: Context, key: IdempotencyKey) -> ModelView:
    """Whether a model can be used, and why not, by its config.json alone, before anything is downloaded or installed.

    The headers of its weight files are checked when it is installed, their values when it is loaded. Nothing is stored, so an
    Idempotency-Key is taken and not needed.
    """
    body = read_json(ModelCheckBody, await receive_json(request, services.settings))
    try:
        return _view(body.name, shape_of(body.config, name=body.name))
    except ModelError as error:
        return _view(body.name, error)


@router.get("/models/{ref}", response_model=ModelView, responses=errors(ModelNotFound))
def get_one_model(
    ref: Annotated[str, PathParameter(max_length=128, description="Name or digest.")],
    services: Context,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """One installed model, by its name or by its digest, as jobs and head maps tell it."""
    return send_view(_find(services, ref), if_none_match)


def _find(services: Services, ref: str) -> ModelView:
    models_dir = services.settings.models_dir
    if _DIGEST.fullmatch(ref):
        for name, model in list_models(models_dir):
            if not isinstance(model, ModelError) and model.digest == ref:
                return _view(name, model)
    directory = find_model(models_dir, ref)
    try:
        return _view(ref, read_model_info(directory))
    except ModelError as error:
        return _view(ref, error)


def _view(name: str, model: ModelShape | ModelError) -> ModelView:
    if isinstance(model, ModelError):
        return ModelView.model_validate({"name": name, "supported": False, "error": problem_body(model.to_json())})
    return ModelView.model_validate({"name": name, **asdict(model), "supported": True})
