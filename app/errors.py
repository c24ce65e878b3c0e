"""The tree of errors that the service adds to the engine's; every one carries a stable code, whose fault and a hint.

P2DError (p2d.errors)
└── ServiceError
    ├── RequestError        the HTTP request itself is wrong
    ├── NotAllowed          the caller may not do this          ┐ in app.access_errors
    ├── TooMuch             the caller's project has had enough ┘
    ├── NotFound            a thing that is not there
    ├── Conflict            a thing that is there, in a state that forbids the request
    ├── Unavailable         a server behind the service does not answer
    ├── JobFailure          why a job ended; met in `job.error`, never as an answer
    ├── ProcessFailed       a process that `p2d up` starts; met on the command line only
    └── LeaseLost           a worker that no longer owns its step; never seen by a user

Status codes are HTTP's business: the table is in `app.problems`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from p2d.errors import ErrorDetail, Fault, P2DError

MAX_PARTS_LISTED = 100
"""Missing parts of an upload that get an entry in errors[]; `facts` holds them all."""


class ServiceError(P2DError):
    """Anything that goes wrong around the engine."""

    hint = "Try again; if it stays, report it with the request id."


# --- the request -----------------------------------------------------------------------------------------------------


class RequestError(ServiceError):
    """A request that cannot be read."""

    code, fault, hint = "request.malformed", "user", "Compare the request with /openapi.json."


class RequestInvalid(RequestError):
    """A readable body, path or query with wrong fields; errors[] lists all of them."""

    code, hint = "request.invalid", "Mend the fields that are named and try again."


class RequestTooLarge(RequestError):
    """A body above the limit."""

    code, hint = "request.too_large", "Send a smaller body."

    def __init__(self, *, limit: int) -> None:
        super().__init__(f"The body is larger than {limit} bytes.", limit=limit)


class RequestTooSlow(RequestError):
    """A request that did not come fast enough: its head, or its body."""

    code, hint = "request.too_slow", "Send it again on a better line; large files may come in parts (POST /uploads)."

    def __init__(self) -> None:
        super().__init__("The request did not arrive in time.")


class UnsupportedMediaType(RequestError):
    """A body of a type that the path does not take."""

    code, hint = "request.unsupported_media_type", "Send one of the content types named in the message."

    def __init__(self, *, expected: Sequence[str]) -> None:
        super().__init__(f"Expected a body of type {' or '.join(expected)}.", expected=list(expected))


class MethodNotAllowed(RequestError):
    """A path that exists, with a method that it does not have."""

    code, hint = "request.method_not_allowed", "Use a method listed in the Allow header."


class RouteNotFound(RequestError):
    """A path that does not exist."""

    code, hint = "request.no_such_path", "See /openapi.json for all paths."


class RangeNotSatisfiable(RequestError):
    """A Range that starts behind the end of the object."""

    code, hint = "request.range", "Ask for a range inside of the size given in Content-Range."

    def __init__(self, *, size_bytes: int) -> None:
        super().__init__(f"The range lies outside of the {size_bytes} bytes.", size_bytes=size_bytes)


class PreconditionFailed(RequestError):
    """The resource has changed since the client read it."""

    code, hint = "request.precondition_failed", "Read the resource again, and send the change with its new ETag."

    def __init__(self, *, etag: str) -> None:
        super().__init__("The resource does not have the ETag of If-Match.", etag=etag)


class PartWrong(RequestError):
    """A part of another size, or with another sha256, than was said."""

    code, hint = "upload.part_wrong", "Send the part again, cut as part_bytes says."


class PresignUnavailable(RequestError):
    """A signed URL of a store that signs none, or where the operator hands out none."""

    code, hint = (
        "store.no_signed_urls",
        "Send the part to PUT /uploads/{id}/parts/{number} of this service; signed URLs need an S3 store and P2D_PRESIGN.",
    )


class UploadWrong(RequestError):
    """All parts are there, but together they do not have the sha256 that was said."""

    code, hint = (
        "upload.hash_mismatch",
        "Compare the parts' sha256 with the file's, send the wrong ones again, then complete.",
    )

    def __init__(self, *, expected: str, found: str) -> None:
        super().__init__("The file does not have the sha256 that was said.", expected=expected, found=found)


class CursorInvalid(RequestError):
    """A paging cursor that this service did not make."""

    code, hint = "request.cursor", "Use the next_cursor of the page before, unchanged."

    def __init__(self) -> None:
        detail = ErrorDetail(code=self.code, message="Not a cursor of this list.", pointer="/query/cursor")
        super().__init__("The cursor is not one of this list.", errors=[detail])


# --- not there -------------------------------------------------------------------------------------------------------


class NotFound(ServiceError):
    """A thing that is not there."""

    code, fault, hint = "resource.not_found", "user", "Check the id."
    what = "object"

    def __init__(self, *, id: str) -> None:
        super().__init__(f"There is no {self.what} with the id {id[:80]!r}.", id=id[:80])


class JobNotFound(NotFound):
    """No job of that id."""

    code, what = "job.not_found", "job"


class DatasetNotFound(NotFound):
    """No dataset of that id."""

    code, what = "dataset.not_found", "dataset"


class UploadNotFound(NotFound):
    """No upload of that id, or it was deleted or has expired."""

    code, what = "upload.not_found", "upload"
    hint = "Check the id; an upload without new parts expires: begin a new one."


class ArtifactNotFound(NotFound):
    """No artifact of that id, or the job has not made it (yet)."""

    code, what = "artifact.not_found", "artifact"


class ReportNotFound(NotFound):
    """No report of that id, or its time is over."""

    code, what = "report.not_found", "report"
    hint = "Check the id; reports on refused files stay for some days: send the file again."


class ComparisonNotFound(NotFound):
    """No comparison of that id."""

    code, what = "comparison.not_found", "comparison"


class HeadMapNotFound(NotFound):
    """No head map of that id."""

    code, what = "head_map.not_found", "head map"


class SelectionNotFound(NotFound):
    """No selection of that id."""

    code, what = "selection.not_found", "selection"


class KeyNotFound(NotFound):
    """No API key of that id."""

    code, what = "key.not_found", "API key"


# --- in the way ------------------------------------------------------------------------------------------------------


class Conflict(ServiceError):
    """A request that the present state forbids."""

    code, hint = "request.conflict", "Read the resource and decide again."
    fault: ClassVar[Fault] = "user"


class JobAlreadyFinal(Conflict):
    """The job has ended; it cannot be cancelled any more."""

    code, hint = "job.already_final", "Nothing to do: read the job for how it ended."

    def __init__(self, *, job_id: str, status: str, allowed: Sequence[str]) -> None:
        super().__init__(f"The job has already {status}.", job_id=job_id, status=status, allowed=list(allowed))


class MoveNotAllowed(Conflict):
    """The job's status does not allow what was asked."""

    code, hint = "job.move_not_allowed", "Do one of the moves in facts.allowed, or wait until the status changes."

    def __init__(self, *, job_id: str, status: str, move: str, allowed: Sequence[str]) -> None:
        text = f"A job that is {status} cannot be asked to {move}."
        super().__init__(text, job_id=job_id, status=status, move=move, allowed=list(allowed))


class JobInUse(Conflict):
    """A job whose head map, selection or adapter another job reads that has not ended."""

    code, hint = "job.in_use", "Wait for the jobs in facts.by, or cancel them, and delete this one then."

    def __init__(self, *, job_id: str, by: Sequence[str]) -> None:
        super().__init__(
            "A job that has not ended reads its head map, selection or adapter.", job_id=job_id, by=list(by)
        )


class DatasetInUse(Conflict):
    """A dataset that a job which has not ended still reads."""

    code, hint = "dataset.in_use", "Wait for the jobs in facts.by, or cancel them, and delete the dataset then."

    def __init__(self, *, dataset_id: str, by: Sequence[str]) -> None:
        super().__init__("A job that has not ended reads the dataset.", dataset_id=dataset_id, by=list(by))


class UploadIncomplete(Conflict):
    """An upload that is to be completed and still lacks parts."""

    code, hint = "upload.incomplete", "Send the parts listed in errors[], then complete the upload again."

    def __init__(self, *, missing: Sequence[int], total: int) -> None:
        faults = [
            ErrorDetail(code="upload.part_missing", message=f"Part {number} is missing.", pointer=f"/parts/{number}")
            for number in missing[:MAX_PARTS_LISTED]
        ]
        text = f"{len(missing)} of {total} parts are missing."
        super().__init__(text, errors=faults, errors_total=len(missing), missing=list(missing), total=total)


class UploadCompleted(Conflict):
    """A part for an upload that is a dataset already."""

    code, hint = "upload.completed", "Nothing to do: read the upload for its dataset."

    def __init__(self, *, upload_id: str, dataset_id: str) -> None:
        super().__init__("The upload is complete.", upload_id=upload_id, dataset_id=dataset_id)


class ModelNameTaken(Conflict):
    """Another base model is installed under that name; met on the command line only."""

    code, hint = "model.name_taken", "Choose another name, or delete the installed model's directory."

    def __init__(self, *, name: str) -> None:
        super().__init__(f"Other weights are installed as {name!r}.", name=name)


class HeadMapMismatch(Conflict):
    """A head map of another base model."""

    code, hint = "head_map.mismatch", "Use a head map that was made with the same base model."


class SelectionMismatch(Conflict):
    """A selection over another dataset or with another base model."""

    code, hint = "selection.mismatch", "Use a selection that was made over the same dataset with the same base model."


class IdempotencyMismatch(Conflict):
    """An Idempotency-Key that came before with another request."""

    code, hint = "idempotency.mismatch", "Use a new key for a new request."

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used before with another request.")


class IdempotencyInFlight(Conflict):
    """The first request with this Idempotency-Key has not ended yet."""

    code, fault, hint = "idempotency.in_flight", "capacity", "Wait a second and send the same request again."

    def __init__(self) -> None:
        super().__init__("A request with this Idempotency-Key is still running.")


# --- servers behind the service --------------------------------------------------------------------------------------


class Unavailable(ServiceError):
    """A server behind the service does not answer."""

    code, hint = "service.unavailable", "Try again in a few seconds."
    fault: ClassVar[Fault] = "dependency"


class DatabaseUnavailable(Unavailable):
    """PostgreSQL does not answer, or all connections are taken."""

    code = "database.unavailable"

    def __init__(self) -> None:
        super().__init__("The database does not answer.")


class StoreUnavailable(Unavailable):
    """The object store does not answer."""

    code = "store.unavailable"

    def __init__(self) -> None:
        super().__init__("The object store does not answer.")


class ObjectCollected(StoreUnavailable):
    """An object was removed between being put and being registered; putting it again helps."""

    def __init__(self, *, sha256: str) -> None:
        Unavailable.__init__(self, "The object was removed before it was registered.", sha256=sha256)


class TooManyStreams(Unavailable):
    """More event streams are open than the process allows."""

    code, fault, hint = "service.too_many_streams", "capacity", "Close streams, or poll the events as JSON."

    def __init__(self) -> None:
        super().__init__("Too many event streams are open.")


class DiskFull(Unavailable):
    """The disk of the service is full, or nearly."""

    code, fault, hint = (
        "service.disk_full",
        "capacity",
        "Try again later; tell the operator that the disk is full, or that P2D_DISK_FLOOR asks for more free space than there is.",
    )

    def __init__(self, text: str = "There is no space left to work in.") -> None:
        super().__init__(text)


class BlobMissing(ServiceError):
    """An object that the database knows is not in the store."""

    code, fault, hint = (
        "store.object_missing",
        "service",
        "Run the job again; tell the operator that the store lost an object.",
    )

    def __init__(self, *, sha256: str) -> None:
        super().__init__("A stored object is missing.", sha256=sha256)


class BlobCorrupt(ServiceError):
    """An object whose bytes do not have their hash."""

    code, fault, hint = (
        "store.object_corrupt",
        "service",
        "Run the job again; tell the operator that the store changed an object.",
    )

    def __init__(self, *, sha256: str) -> None:
        super().__init__("A stored object does not have its hash.", sha256=sha256)


# --- why a job ended -------------------------------------------------------------------------------------------------


class JobFailure(ServiceError):
    """A job that ended without a result."""

    code, hint = "job.failed", "Send the job again; if it fails again, report it with the job id."
    fault: ClassVar[Fault] = "service"


class WorkerLost(JobFailure):
    """Every worker that tried a step died."""

    code, hint = (
        "job.worker_lost",
        "Lower training.batch_size (the usual cause is memory), or look into the worker's log.",
    )

    def __init__(self, *, step: str, crashes: int) -> None:
        super().__init__(f"The step {step!r} lost its worker {crashes} times.", step=step, crashes=crashes)


class LimitReached(JobFailure):
    """The job needed more than its limits allow, or had not ended at limits.deadline; what was finished is kept."""

    code, fault, hint = "job.limit_reached", "user", "Clone the job with a higher limit, or make it smaller."

    def __init__(self, *, limit: str, value: object) -> None:
        text = (
            f"It had not ended at {value}."
            if limit == "deadline"
            else f"The job needed more than limits.{limit}, {value}."
        )
        super().__init__(text, limit=limit, value=value)


class Stalled(JobFailure):
    """The engine made no progress for too long."""

    code, hint = "job.stalled", "Send the job again; if it stalls again, report it with the job id."

    def __init__(self, *, step: str, seconds: float) -> None:
        super().__init__(f"The step {step!r} made no progress for {seconds:.0f} seconds.", step=step, seconds=seconds)


# --- on the command line -----------------------------------------------------------------------------------------------


class ProcessFailed(ServiceError):
    """A process of the service could not be started, or ended by itself."""

    code, hint = "process.failed", "Read the end of its log above; `p2d doctor` checks the parts one by one."
    fault: ClassVar[Fault] = "dependency"


class NoKeys(ProcessFailed):
    """The API is to listen beyond this machine, and nobody has made a key yet."""

    code, hint = "service.no_keys", "Make one with `p2d keys create`, or leave P2D_HOST at 127.0.0.1."
    fault: ClassVar[Fault] = "user"

    def __init__(self, *, host: str) -> None:
        super().__init__(f"Without API keys the service listens on loopback only, not on {host}.", host=host)


class PepperMissing(ServiceError):
    """Keys or webhooks were made with a pepper that this process does not have."""

    code, hint = (
        "service.pepper_missing",
        "Set P2D_KEY_PEPPER to what the first one was made with, or run this where its file `key-pepper` is.",
    )

    def __init__(self) -> None:
        super().__init__(
            "There are keys or webhooks already, and their pepper is neither in P2D_KEY_PEPPER nor in a file here."
        )


# --- never seen by a user --------------------------------------------------------------------------------------------


class LeaseLost(ServiceError):
    """A later attempt owns the step; whoever meets this stops and changes nothing."""

    code, hint = "step.lease_lost", "Nothing to do: another worker has the step."

    def __init__(self, *, step_id: str, token: int) -> None:
        super().__init__("The lease on the step is lost.", step_id=step_id, token=token)
