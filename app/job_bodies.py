"""A job's JSON, read so that everything that is wrong with it is told at once: wrong types and wrong values alike."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from app.problems import body_faults, invalid
from app.schemas import Body, JobBody
from p2d.config import Kind, check
from p2d.errors import ConfigError, ErrorDetail

Shape = TypeVar("Shape", bound=Body)


def read_job_body(value: Any, shape: type[Shape], *, kind: Kind | None = None) -> Shape:
    """The job that a JSON value describes, of a `kind` where `shape` has none. Raises RequestInvalid.

    Values (names, ranges, contradictions) are judged here only if a type is wrong too, so that both are told: a field of a
    wrong type counts as left out. Of a body whose types are right, they are judged with its model and datasets.
    """
    try:
        return shape.model_validate(value)
    except ValidationError as error:
        rest = copy.deepcopy(value)
        if isinstance(rest, dict) and kind is not None:
            rest["kind"] = kind
        for fault in error.errors():
            _leave_out(rest, fault["loc"])
        raise invalid([*body_faults(error.errors()), *_wrong_values(rest)]) from None


def _leave_out(value: Any, loc: Sequence[int | str]) -> None:
    """Remove the field of a fault; steps of its place that name a type and no field end the way there."""
    for at, step in enumerate(loc):
        inside = value.get(step) if isinstance(value, dict) else None
        if isinstance(inside, dict) and at + 1 < len(loc):
            value = inside
        elif isinstance(value, dict):
            value.pop(step, None)
            return


def _wrong_values(value: Any) -> tuple[ErrorDetail, ...]:
    if not isinstance(value, dict):
        return ()
    try:
        check(JobBody.model_validate({"base_model": "left out", **value}).config())
    except ConfigError as error:
        return tuple(error.errors)
    except ValidationError:  # what was left out was needed, or is wrong in another way still
        return ()
    return ()
