"""A job's JSON, read so that a fault of one field hides no fault of another, nor of the model and data that it names."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from app.problems import body_faults, invalid
from app.schemas import Body, JobBody
from p2d.config import JobConfig, Kind
from p2d.config_checks import check
from p2d.errors import ConfigError, ErrorDetail

_GROUPS = frozenset({"heads", "data", "training", "limits"})
"""Objects of which a field may be left out alone. Of any other field half would be another thing: a mapping, rows, a source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedJob:
    """A job as a request asks for it. Where it has faults, no job can be made of it, but what it names can be looked up."""

    body: JobBody
    """A field that cannot be read counts as left out, and so does one that is not known."""
    faults: Sequence[ErrorDetail] = ()
    """Wrong types, missing and unknown fields; wrong values are found by `p2d.config_checks.check`."""
    unread: frozenset[tuple[str, ...]] = frozenset()
    """The fields with those faults, each by the way to it."""

    def has_read(self, *field: str) -> bool:
        """Whether `body` says of the field what the request says."""
        return not any(field[: len(one)] == one for one in self.unread)


def as_asked(read: Body, kind: Kind | None) -> AskedJob:
    """The job of a body that was read, of a `kind` where its shape has none."""
    if not isinstance(read, JobBody):
        fields = {**read.model_dump(mode="json", exclude_unset=True), "kind": kind}
        read = JobBody.model_validate_json(json.dumps(fields))
    return AskedJob(body=read)


def read_job(value: Any, shape: type[Body], *, kind: Kind | None = None) -> AskedJob:
    """The job that a JSON value describes, with all faults of its fields. Raises RequestInvalid for what is no object."""
    try:
        return as_asked(shape.model_validate_json(json.dumps(value)), kind)
    except ValidationError as error:
        found = error.errors()
    faults = body_faults(found)
    if not isinstance(value, dict):
        raise invalid(faults)
    unread = frozenset(_field(value, fault["loc"]) for fault in found)
    rest = shape.model_validate_json(json.dumps(_without(value, unread)))
    return AskedJob(body=as_asked(rest, kind).body, faults=faults, unread=unread)


def job_config(value: Mapping[str, Any]) -> JobConfig:
    """The config of a job that is made here and now. Raises RequestInvalid or ConfigError, with all that is wrong with it."""
    asked = read_job(value, JobBody)
    config = asked.body.config()
    try:
        check(config)
    except ConfigError as error:
        if asked.faults:
            raise invalid([*asked.faults, *error.errors]) from None
        raise
    if asked.faults:
        raise invalid([*asked.faults])
    return config


def _field(value: Mapping[str, Any], loc: Sequence[int | str]) -> tuple[str, ...]:
    """The way to the field that must be left out for a fault."""
    grouped = loc[0] in _GROUPS and len(loc) > 1 and isinstance(value.get(str(loc[0])), dict)
    return tuple(map(str, loc[: 2 if grouped else 1]))


def _without(value: Mapping[str, Any], unread: frozenset[tuple[str, ...]]) -> dict[str, Any]:
    rest = {
        name: {leaf: one for leaf, one in field.items() if (name, leaf) not in unread} if name in _GROUPS else field
        for name, field in value.items()
        if (name,) not in unread
    }
    # The one field that has no default; nobody looks it up.
    return {"base_model": "unread", **rest}
