"""What the client gives: jobs, events and files as the service shows them, and what can go wrong on the way. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from p2d.errors import ErrorDetail

FINAL = frozenset({"succeeded", "failed", "cancelled"})
"""Statuses of a job that has ended; only a retry changes them again."""


class ServiceProblem(Exception):
    """The service refused or failed a request: the problem+json as attributes, its text as message."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        self.status = status
        self.code = str(body.get("code", "http.error"))
        self.fault = str(body.get("fault", "service"))
        self.retryable = bool(body.get("retryable", False))
        self.hint = str(body.get("hint", ""))
        self.request_id = str(body.get("request_id", ""))
        self.report: str | None = body.get("report")
        """Path of the report that lists all of which `errors` holds the first; see `Client.faults`."""
        self.facts: Mapping[str, Any] = body.get("facts") or {}
        self.errors = tuple(fault_of(entry) for entry in body.get("errors") or [])
        self.errors_total = int(body.get("errors_total", len(self.errors)))
        super().__init__(str(body.get("detail") or body.get("title") or f"The service answered {status}."))


class ServiceUnreachable(Exception):
    """Nobody answers at the address, or the connection broke more often than the client retries."""


class DownloadCorrupt(Exception):
    """A file arrived whole, but not with the sha256 that the service registered."""


class NoSuchFile(Exception):
    """The job has no file of that name (yet)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job as the service shows it; `raw` has the fields that this client does not name."""

    id: str
    kind: str
    status: str
    stage: str | None
    progress: float
    error: Mapping[str, Any] | None
    raw: Mapping[str, Any]

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self.status in FINAL


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One event of a job; `end` is the last, unless the job is retried."""

    seq: int
    type: str
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """One file of a job."""

    id: str
    name: str
    sha256: str
    size_bytes: int


def fault_of(body: Mapping[str, Any]) -> ErrorDetail:
    """The fault that an answer shows."""
    known = ErrorDetail.__dataclass_fields__
    return ErrorDetail(**{key: value for key, value in body.items() if key in known})


def job_of(body: Mapping[str, Any]) -> Job:
    """The job that an answer shows."""
    return Job(
        id=body["id"],
        kind=body["kind"],
        status=body["status"],
        stage=body.get("stage"),
        progress=float(body.get("progress") or 0.0),
        error=body.get("error"),
        raw=body,
    )
