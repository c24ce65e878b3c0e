"""Refuse query parameters that a path does not have, or has once and is sent twice: a filter would else be passed over."""

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
    """Raise RequestInvalid with every parameter that the route does not take so, and all else that is wrong with its query."""
    sent = request.query_params
    if not sent:
        return
    route = request.scope["route"]
    fields = list(query_fields(route))
    known = sorted(field.alias for field in fields)
    # Pairs such as metadata[team]=blue, which FastAPI does not know: their route looks at them itself.
    pairs = tuple(parameter["name"] for parameter in (route.openapi_extra or {}).get("parameters", ()))
    unknown = [name for name in sent if name not in known and name.partition("[")[0] not in pairs]
    twice = [name for name in known if len(sent.getlist(name)) > 1]
    if unknown or twice:
        await drain(request.stream())
        _, wrong = request_params_to_args(fields, sent)
        faults = [_unknown(name, [*known, *pairs]) for name in unknown] + [_twice(name) for name in twice]
        raise invalid([*faults, *body_faults(wrong)])


STRICT = Depends(_refuse_unknown)
"""Dependency of every room."""


def query_fields(route: APIRoute) -> Iterator[ModelField]:
    """The query parameters of a route; each has one value."""
    return _fields(route.dependant)


def _fields(dependant: Dependant) -> Iterator[ModelField]:
    yield from dependant.query_params
    for one in dependant.dependencies:
        yield from _fields(one)


def _twice(name: str) -> ErrorDetail:
    text = f"The query parameter {name!r} has one value; send it once."
    return ErrorDetail(code="field.given_twice", message=text, pointer=f"/query/{name}", expected="one value")


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
