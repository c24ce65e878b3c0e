"""Refuse query parameters that a path does not have: a misspelt filter would else be passed over, and everything be listed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from fastapi import Depends, Request
from fastapi._compat import ModelField
from fastapi.dependencies.models import Dependant
from fastapi.dependencies.utils import request_params_to_args
from fastapi.routing import APIRoute

from app.api.bodies import drain
from app.problems import body_faults, invalid
from p2d.errors import ErrorDetail

_NAME = re.compile(r"[\w\[\].-]{1,40}")
"""What is said again: any other name is a stranger's text."""


async def _refuse_unknown(request: Request) -> None:
    """Raise RequestInvalid with every parameter that the route does not have, and all else that is wrong with its query."""
    sent = request.query_params
    if not sent:
        return
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    fields = list(_fields(route.dependant))
    known = sorted(field.alias for field in fields)
    # Pairs such as metadata[team]=blue, which FastAPI does not know: their route looks at them itself.
    pairs = tuple(parameter["name"] for parameter in (route.openapi_extra or {}).get("parameters", ()))
    unknown = [name for name in sent if name not in known and name.partition("[")[0] not in pairs]
    if unknown:
        await drain(request.stream())
        _, wrong = request_params_to_args(fields, sent)
        raise invalid([*(_unknown(name, [*known, *pairs]) for name in unknown), *body_faults(wrong)])


STRICT = Depends(_refuse_unknown)
"""Dependency of every room."""


def _fields(dependant: Dependant) -> Iterator[ModelField]:
    yield from dependant.query_params
    for one in dependant.dependencies:
        yield from _fields(one)


def _unknown(name: str, known: list[str]) -> ErrorDetail:
    near = difflib.get_close_matches(name, known, n=1)
    plain = _NAME.fullmatch(name) is not None
    text = f"There is no query parameter {name!r} here" if plain else "There is no such query parameter here"
    if near:
        text += f"; did you mean {near[0]!r}?"
    elif known:
        text += f"; there are {', '.join(known)}."
    else:
        text += ", nor any other."
    expected = f"one of {', '.join(known)}" if known else "no parameters"
    pointer = f"/query/{name}" if plain else "/query"
    return ErrorDetail(code="field.unknown", message=text, pointer=pointer, expected=expected)
