"""Which jobs a list is asked for: the query of GET /jobs as a `JobFilter`. What the rows are compared with is app.db.jobs'."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Query, Request

from app.db.jobs import JobFilter, Order, Stage, Status
from app.errors import RequestInvalid
from app.schemas import MAX_METADATA, Moment, Text
from app.views import JobKind
from p2d.errors import ErrorDetail

_PAIR = re.compile(r"metadata\[([^\[\]\x00]{1,64})\]")


METADATA_QUERY = {
    "parameters": [
        {
            "name": "metadata",
            "in": "query",
            "required": False,
            "style": "deepObject",
            "explode": True,
            "description": "Only jobs whose metadata have these pairs: `metadata[team]=blue`.",
            "schema": {
                "type": "object",
                "maxProperties": MAX_METADATA,
                "propertyNames": {"pattern": r"^[^\[\]\x00]{1,64}$"},
                "additionalProperties": {"type": "string", "maxLength": 512},
            },
        }
    ]
}
"""What OpenAPI says of the pairs; FastAPI has no such parameters."""


async def _metadata(request: Request) -> dict[str, str]:
    pairs: dict[str, str] = {}
    faults: list[ErrorDetail] = []
    for name, value in request.query_params.multi_items():
        if name.partition("[")[0] != "metadata":
            continue
        match = _PAIR.fullmatch(name)
        if match is None or "\x00" in value or len(value) > 512 or match.group(1) in pairs:
            text = "Expected metadata[key]=value, each key of 1 to 64 characters once, each value of at most 512."
            faults.append(ErrorDetail(code="field.metadata", message=text, pointer="/query/metadata"))
        else:
            pairs[match.group(1)] = value
    if len(pairs) > MAX_METADATA:
        text = f"A job has at most {MAX_METADATA} pairs."
        faults.append(ErrorDetail(code="field.metadata", message=text, pointer="/query/metadata"))
    if faults:
        raise RequestInvalid("The metadata in the query cannot be used.", errors=faults)
    return pairs


async def _filter(
    metadata: Annotated[dict[str, str], Depends(_metadata)],
    status: Annotated[Status | None, Query(description="Only jobs in this status.")] = None,
    stage: Annotated[Stage | None, Query(description="Only jobs that are, or ended, in this stage.")] = None,
    kind: Annotated[JobKind | None, Query(description="Only jobs of this kind.")] = None,
    base_model: Annotated[Text | None, Query(max_length=128, description="Only jobs of this base model.")] = None,
    dataset: Annotated[Text | None, Query(max_length=64, description="Only jobs over this dataset, by id.")] = None,
    head_map: Annotated[
        Text | None, Query(max_length=64, description="Only the job that made this head map, and those that named it.")
    ] = None,
    created_after: Annotated[Moment | None, Query(description="Only jobs made at this time or later.")] = None,
    created_before: Annotated[Moment | None, Query(description="Only jobs made before this time.")] = None,
    q: Annotated[
        Text | None, Query(max_length=128, description="Only jobs whose name, id or base model has this in it.")
    ] = None,
    order: Annotated[Order, Query(description="`desc` = newest first.")] = "desc",
) -> JobFilter:
    return JobFilter(
        status=status,
        stage=stage,
        kind=kind,
        base_model=base_model,
        dataset=dataset,
        head_map=head_map,
        created_after=created_after,
        created_before=created_before,
        q=q or None,
        metadata=metadata,
        order=order,
    )


Wanted = Annotated[JobFilter, Depends(_filter)]
