"""What each code of the catalogue means: the page to which the `type` of a problem leads. Anybody may read it."""

from __future__ import annotations

from html import escape
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse

from app.api.documentation import errors
from app.api.ops import OPEN
from app.errors import NotFound
from app.problems import STATUS, catalogue
from app.views import ErrorView
from p2d.errors import P2DError

router = APIRouter(tags=["service"])

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{code}</title>
<h1>{code}</h1>
<p>{meaning}</p>
<p>What to do: {hint}</p>
<p>Status {status}, fault: {fault}. {again}</p>
</html>
"""


@router.get(
    "/errors/{code}",
    response_model=ErrorView,
    responses={
        200: {"description": "As JSON, or as a page for who asks for HTML.", "content": {"text/html": {}}},
        **errors(NotFound),
    },
    openapi_extra=OPEN,
)
def get_error(
    request: Request, code: Annotated[str, Path(max_length=80, description="Such as `dataset.invalid`.")]
) -> Response:
    """What the code of a problem means, whose fault it is and what to do next. `type` of every problem is such a path."""
    cls = catalogue().get(code)
    if cls is None:
        raise NotFound(id=code)
    view = _view(code, cls)
    if "text/html" not in request.headers.get("accept", ""):
        return JSONResponse(view.model_dump(mode="json"), headers={"Vary": "Accept"})
    again = "The same request can work later." if view.retryable else "The same request will not work later."
    page = _PAGE.format(**{name: escape(str(value)) for name, value in view.model_dump().items()}, again=again)
    return HTMLResponse(page, headers={"Content-Security-Policy": "default-src 'none'", "Vary": "Accept"})


def _view(code: str, cls: type[P2DError]) -> ErrorView:
    meaning = (cls.__doc__ or "").splitlines()[0]
    status, fault = STATUS[code], cls.fault
    return ErrorView(code=code, status=status, fault=fault, retryable=fault != "user", meaning=meaning, hint=cls.hint)
