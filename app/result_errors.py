"""Errors of results: head maps, selections and artifacts that cannot be taken, deleted or had. Branches of the tree in
app.errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from app.errors import Conflict, NotFound, RequestError, ServiceError


class HeadMapInvalid(RequestError):
    """A file that is no head map of the model that it names; errors[] lists what is wrong."""

    code, hint = "head_map.invalid", "Send a head_map.json as it was downloaded (GET /head-maps/{id}.json)."


class HeadMapInUse(Conflict):
    """A head map that a job which has not ended reads, or has just made."""

    code, hint = "head_map.in_use", "Wait for the jobs in facts.by, or cancel them, and delete the head map then."

    def __init__(self, *, id: str, by: Sequence[str]) -> None:
        super().__init__("A job that has not ended needs the head map.", id=id, by=list(by))


class SelectionRanksNothing(Conflict):
    """A ratio of a selection that gives all rows the same score: it would keep the first ones of the file."""

    code, hint = (
        "selection.ranks_nothing",
        "Leave the ratio out, or make a selection that ranks: POST /selections scores every row.",
    )

    def __init__(self) -> None:
        super().__init__("No row is ranked before another, so a part of them would be the first of the file.")


class HeadMapRanksNothing(Conflict):
    """A head map that gives all heads the same score, so that it cannot be compared with another."""

    code, hint = (
        "head_map.ranks_nothing",
        "Compare head maps by a scorer that ranks, such as attribution: POST /head-maps makes one alone.",
    )

    def __init__(self, *, ids: Sequence[str]) -> None:
        super().__init__("No head is ranked before another, so there is nothing to compare.", ids=list(ids))


class SelectionInUse(Conflict):
    """A selection that a job which has not ended reads, or has just made."""

    code, hint = "selection.in_use", "Wait for the jobs in facts.by, or cancel them, and delete the selection then."

    def __init__(self, *, id: str, by: Sequence[str]) -> None:
        super().__init__("A job that has not ended needs the selection.", id=id, by=list(by))


class SelectionRowNotFound(NotFound):
    """No row of that number in the selection."""

    code, hint = "selection.row_not_found", "Rows are counted from 0; GET /selections/{id} says how many there are."

    def __init__(self, *, row: int, rows: int) -> None:
        ServiceError.__init__(self, f"There is no row {row}; the selection has {rows}.", row=row, rows=rows)


class ArtifactInUse(Conflict):
    """An artifact that a job which has not ended, a head map or a selection needs."""

    code, hint = (
        "artifact.in_use",
        "Wait for the jobs in facts.by, or cancel them; the file of a head map or selection goes when that is deleted.",
    )

    def __init__(self, *, id: str, by: Sequence[str]) -> None:
        super().__init__("The artifact is still needed.", id=id, by=list(by))


class ArtifactExpired(NotFound):
    """An artifact whose time to live is over."""

    code, hint = "artifact.expired", "Clone its job to make it anew; a longer artifact_ttl keeps it longer."

    def __init__(self, *, id: str, expires_at: datetime | None) -> None:
        at = expires_at.isoformat() if expires_at else None
        ServiceError.__init__(self, "The artifact has expired.", id=id, expires_at=at)


class NotAnAdapter(Conflict):
    """An artifact that is not the weights of a head adapter."""

    code, hint = "artifact.not_an_adapter", "Name the artifact heads.safetensors of a job of kind adapt."

    def __init__(self, *, id: str, name: str) -> None:
        super().__init__(f"{name!r} is not a head adapter.", id=id, name=name)


class NotABaseModel(Conflict):
    """An artifact that is not the weights of a full model which was merged."""

    code, hint = (
        "artifact.not_a_base_model",
        "Merge the adapter (POST /artifacts/{id}/merge, formats: merged) and name the model.safetensors of that export, or its "
        "model.safetensors.index.json.",
    )

    def __init__(self, *, id: str, name: str) -> None:
        super().__init__(f"{name!r} is not the weights of a merged model.", id=id, name=name)


class ResultsGone(Conflict):
    """Files that finished steps of the job had made are gone, so it cannot go on behind them."""

    code, hint = "job.results_gone", "Clone the job: the new one makes them anew."

    def __init__(self, *, job_id: str, names: Sequence[str]) -> None:
        super().__init__("Files that the job had made were deleted or have expired.", job_id=job_id, names=list(names))


class DeadlinePassed(Conflict):
    """A job that is to be retried, and whose deadline has passed."""

    code, hint = "job.deadline_passed", "Clone the job with a later limits.deadline, or with null for none."

    def __init__(self, *, job_id: str, deadline: str) -> None:
        super().__init__(f"The job had to end by {deadline}.", job_id=job_id, deadline=deadline)
