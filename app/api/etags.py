"""Conditional requests (RFC 9110): the ETag of a view, 304 for who has it already, 412 for who wants to change another.

A route that reads takes `IfNoneMatch` and ends in `send_view`; one that changes takes `IfMatch` and calls `require_match` under
its lock. What they can answer then, app.api.documentation tells by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated

from fastapi import Header, Response
from pydantic import BaseModel

from app.errors import PreconditionFailed

IfNoneMatch = Annotated[str | None, Header(description="ETags that the client has; a match answers 304.")]
IfMatch = Annotated[str | None, Header(description="ETag that the resource must still have; else 412.")]


def send_view(view: BaseModel, if_none_match: str | None = None) -> Response:
    """The view as JSON with its ETag, or 304."""
    body = view.model_dump_json().encode()
    headers = {"ETag": _etag(body)}
    if matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def require_match(if_match: str | None, now: Callable[[], BaseModel]) -> None:
    """Raise PreconditionFailed unless the resource is as the client has seen it, or it named nothing.

    Args: now: what GET would answer at this moment; asked only where the client named something.
    """
    if if_match is None:
        return
    etag = _etag(now().model_dump_json().encode())
    if not {etag, "*"} & {tag.strip() for tag in if_match.split(",")}:
        raise PreconditionFailed(etag=etag)


def matches(if_none_match: str | None, etag: str) -> bool:
    """Whether If-None-Match names the ETag, by weak comparison."""
    if if_none_match is None:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or "*" in tags


def _etag(body: bytes) -> str:
    return f'"{hashlib.sha256(body).hexdigest()[:32]}"'
