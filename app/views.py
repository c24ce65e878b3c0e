"""The wire, outwards: what JSON the service gives. Views are filled from the rows of app.db by attribute, so nothing
here knows the database.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

JobKind = Literal["identify_heads", "select_data", "adapt", "export"]
"""What `GET /jobs` can be asked for; kinds may grow. `export` is made by POST /artifacts/{id}/merge."""

Status = Literal["queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"]


class View(BaseModel):
    """Base of what the service answers."""

    model_config = ConfigDict(from_attributes=True, frozen=True)


class FaultView(View):
    """One fault among several."""

    code: str
    message: str
    pointer: str | None = Field(default=None, description="JSON pointer into the body or the row.")
    line: int | None = Field(default=None, description="1-based line of the dataset file, or of a JSON body.")
    column: int | None = Field(default=None, description="1-based character of that line.")
    expected: str | None = Field(default=None, description="What would have been right.")
    got: str | None = Field(
        default=None, description="What came instead: a type, a size, a number; never text of a row."
    )


class ErrorView(View):
    """What a code of the catalogue means."""

    code: str
    status: int = Field(description="Of an answer with this code.")
    fault: Literal["user", "service", "capacity", "dependency"] = Field(description="Who can mend it.")
    retryable: bool = Field(description="Whether the same request can work later.")
    meaning: str
    hint: str = Field(description="What to do next.")


class Problem(View):
    """Every error of the service (RFC 9457), and `job.error`. Match on `code`: it never changes its meaning."""

    type: str = Field(description="`/errors/CODE` of this service, a page that says what the code means.")
    title: str
    status: int
    detail: str
    instance: str | None = Field(default=None, description="The path that was asked, or that of the job it is about.")
    code: str
    fault: Literal["user", "service", "capacity", "dependency"]
    retryable: bool = Field(description="Whether the same request can work later.")
    hint: str = Field(description="What to do next.")
    errors: list[FaultView] = []
    errors_total: int = Field(default=0, description="More than the length of errors where that is capped.")
    facts: dict[str, Any] = {}
    report: str | None = Field(
        default=None, description="Path of the report that holds all of errors; see GET /reports/{id}."
    )
    request_id: str | None = None


Item = TypeVar("Item")


class Page(View, Generic[Item]):
    """One page of a list."""

    data: list[Item]
    has_more: bool
    next_cursor: str | None = Field(default=None, description="Pass it as `cursor` for the next page.")


class JobSummary(View):
    """A job in a list."""

    id: str
    kind: str = Field(description="`identify_heads`, `select_data`, `adapt` or `export`; kinds may grow.")
    name: str
    status: Status = Field(description="Match on this; the last three are final.")
    stage: str | None = Field(description="What it is doing; stages may grow.")
    progress: float = Field(description="0 to 1; never goes back.")
    eta_at: datetime | None = Field(default=None, description="When it will have ended, as likely earlier as later.")
    eta_p10_at: datetime | None = Field(default=None, description="Earlier than this in one of ten cases.")
    eta_p90_at: datetime | None = Field(default=None, description="Later than this in one of ten cases.")
    priority: int
    base_model: str
    model_digest: str
    dataset_id: str
    validation_dataset_id: str | None
    error: Problem | None = None
    metadata: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested_at: datetime | None
    pause_requested_at: datetime | None = Field(description="Null again once the job was told to go on.")
    retries: int = Field(description="How often it was queued again after it had ended.")
    adapter_id: str | None = Field(default=None, description="The artifact that an `export` is of.")
    artifact_ttl: int | None = Field(
        default=None, description="Seconds that its files stay after its end; null = as long as the job."
    )


class JobView(JobSummary):
    """A job in full."""

    config: dict[str, JsonValue] = Field(description="As asked, with the defaults filled in.")
    resolved: dict[str, JsonValue] | None = Field(description="Without `auto`; grows while the job learns more.")
    reasons: dict[str, str] = Field(description="Why each `auto` was resolved so: pointer -> reason.")
    warnings: list[str] = []
    estimate: dict[str, JsonValue] | None = Field(
        description="Seconds per step, from the job's own plan; how wrong such plans were before, as actual over estimated "
        "seconds (`errors`); and `interval_s`, the whole with these errors."
    )
    head_map: str | None = Field(default=None, description="Id of the head map that the job made, for later jobs.")
    selection: str | None = Field(default=None, description="Id of the selection that the job made, for later jobs.")
    webhooks: list[str] = Field(description="Ids of the webhooks that it names; one may have been deleted since.")


class JobConfigView(View):
    """What a job is computed from."""

    job_id: str
    base_model: str
    model_digest: str = Field(description="Sha256 that the base model's files must have.")
    dataset_id: str
    validation_dataset_id: str | None
    config: dict[str, JsonValue] = Field(description="As asked, with the defaults filled in; never changes.")
    resolved: dict[str, JsonValue] | None = Field(description="Without `auto`; final once the job has validated.")
    reasons: dict[str, str] = Field(description="Why each `auto` was resolved so: pointer -> reason.")
    seed: int
    versions: dict[str, str] = Field(description="Versions of the code that resolved it: name -> version.")
    webhooks: list[str] = Field(description="Ids of the webhooks that the job names.")


class AttemptView(View):
    """One try at a step by one worker."""

    id: str
    job_id: str
    step: str
    shard: int
    attempt: int = Field(description="1, 2, 3 ... of this step and shard.")
    worker: str
    outcome: Literal["running", "done", "failed", "lost", "released", "cancelled"] = Field(
        description="`lost`: its worker or process died; `released`: given back, by a pause or a worker that left."
    )
    error: Problem | None = None
    seconds: float | None = Field(description="Wall time; for `lost` until the loss was noticed.")
    started_at: datetime
    finished_at: datetime | None


class LogLineView(View):
    """What a worker noted of an attempt. No text of a row, and none of what libraries print."""

    attempt_id: str
    step: str
    shard: int
    attempt: int
    at: datetime = Field(description="By the worker's clock.")
    level: Literal["info", "warning", "error"]
    event: str = Field(
        description="`attempt.began`, `inputs.fetched`, `step.progress`, `checkpoint.stored` ...; may grow."
    )
    facts: dict[str, JsonValue]


class CheckpointFileView(View):
    """One file of a checkpoint."""

    name: str
    sha256: str
    artifact_id: str | None = Field(description="Where it can be downloaded; only files of finished steps can.")


class CheckpointView(View):
    """What the job goes on from after a pause, a retry or a lost worker: a finished step, or a training that was cut."""

    step: str
    shard: int
    kind: Literal["outputs", "training"]
    name: str = Field(description="Of a training: `step-` and its optimizer steps.")
    attempt: int = Field(description="That stored it.")
    stored_at: datetime | None
    files: list[CheckpointFileView]


class MetricPointView(View):
    """One value that a step told."""

    seq: int = Field(description="Of the event.")
    at: datetime
    attempt: int
    done: int = Field(description="Units of the step that were done, of `total`.")
    total: int
    value: float


class MetricSeriesView(View):
    """One metric of one step (shard), oldest first."""

    step: str
    shard: int
    name: str
    points: list[MetricPointView]


class JobMetricsView(View):
    """All series of a job."""

    job_id: str
    series: list[MetricSeriesView]
    thinned: bool = Field(description="Whether values were left out; first and last of each step are always there.")


class DatasetView(View):
    """A dataset, complete and checked."""

    id: str
    name: str
    format: str
    rows: int
    size_bytes: int = Field(description="Of the file as it came, before it was unpacked.")
    raw_sha256: str | None = Field(
        default=None,
        description="Sha256 of the bytes as they came, before they were unpacked; of several fetched files, one after the other. "
        "Where the content was there already, that of the file which made this dataset. Null for rows written out in a request.",
    )
    content_hash: str = Field(description="Sha256 over prompts and answers; the same for any format.")
    created_at: datetime
    deduplicated: bool = Field(default=False, description="The same content was there already; this is that dataset.")


class KnownDatasetView(DatasetView):
    """The dataset that has the content which came, as an earlier file made it."""

    received_sha256: str | None = Field(
        description="Sha256 of the bytes that came now, where `raw_sha256` is of those that made the dataset: in another format or "
        "packed otherwise they differ. Null for rows written out, and where an upload was complete before."
    )


class PartView(View):
    """One part of an upload that is there."""

    number: int = Field(description="From 1.")
    sha256: str


class PartUrlView(View):
    """Where one part can be put into the store itself. The URL is a secret until it expires."""

    url: str
    method: Literal["PUT"]
    headers: dict[str, str] = Field(description="What the request must send, exactly so; the URL is signed for them.")
    expires_at: datetime


class UploadSummary(View):
    """An upload in a list."""

    id: str
    status: Literal["open", "completed"]
    name: str
    size_bytes: int
    sha256: str | None
    part_bytes: int = Field(description="Size of every part but the last, which has the rest.")
    part_count: int
    parts_there: int = Field(description="How many of them are there.")
    dataset_id: str | None = Field(description="The dataset that it became.")
    created_at: datetime
    expires_at: datetime = Field(description="Given up then; every part puts it off.")


class UploadView(UploadSummary):
    """A file that comes in parts, any order, each as often as it takes."""

    parts: list[PartView] = Field(description="Those that are there, by number.")


class ReportView(View):
    """What the check of a file found: of one that became a dataset, or of one that was refused (`errors_total` > 0)."""

    id: str | None = Field(default=None, description="Of the report on a refused file.")
    dataset_id: str | None = Field(default=None, description="The dataset that the file became.")
    name: str = Field(description="Of the file; of both, where a job came with two that were refused.")
    code: str | None = Field(default=None, description="Of the error with which it was refused.")
    detail: str | None = Field(default=None, description="Of that error.")
    errors_total: int = Field(default=0, description="All that is wrong with its rows.")
    errors_by_code: dict[str, int] = Field(default={}, description="The same by code.")
    errors_listed: int = Field(
        default=0, description="How many GET /reports/{id}/errors lists: the first 100,000 of a file; the counts go on."
    )
    format: str | None = Field(description="Null where it was not found out.")
    rows: int = Field(description="Good ones.")
    size_bytes: int
    raw_sha256: str | None = Field(default=None, description="As that of the dataset.")
    content_hash: str | None = Field(default=None, description="This and what follows is of good files alone.")
    longest_row_chars: int | None = None
    duplicates: int | None = None
    duplicate_lines: list[int] = []
    warnings: list[str] = []
    personal: dict[str, dict[str, Any]] = Field(
        default={},
        description="What looks like personal data, by its form: kind -> `rows`, and `lines` of the first of them.",
    )
    compression: Literal["gzip", "zstd"] | None = Field(
        default=None, description="How the file came; lines are those of the unpacked file."
    )
    mapping: dict[str, str] = Field(default={}, description="What was said of its columns: field -> column.")
    source: dict[str, Any] | None = Field(
        default=None, description="Where it was fetched, when, and the bytes' sha256."
    )
    created_at: datetime
    expires_at: datetime | None = Field(default=None, description="When the report goes; null: with its dataset.")


class TurnView(View):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


class RowView(View):
    """One row of a dataset, in the form in which jobs read it."""

    line: int = Field(description="Where it stood in what was sent: 1-based line, or number where there are no lines.")
    prompt: str = Field(description="Of a conversation the last question.")
    answer: str = Field(description="What is trained.")
    before: list[TurnView] = Field(default=[], description="Of a conversation the turns before the prompt.")


class LengthsView(View):
    """Lengths in characters; quantiles are rounded up by 6 % at most, the rest is exact."""

    min: int
    mean: float
    max: int
    p10: int
    p50: int
    p90: int
    p99: int


class DatasetStatsView(View):
    """What the rows of a dataset are like."""

    dataset_id: str
    rows: int
    stored_bytes: int = Field(description="Of the rows as they are stored, all of one form.")
    duplicates: int = Field(description="Rows whose prompt and answer stand in an earlier row.")
    prompt_chars: LengthsView | None = Field(description="Null for a dataset that was checked before this was counted.")
    answer_chars: LengthsView | None
    personal: dict[str, int] = Field(description="Rows that look like personal data, by kind.")


EVENTS = {
    "job.status": "`status`, and `error` of a job that failed",
    "job.stage": "`stage`",
    "job.progress": "`progress`, `stage`, `step`, `shard`, `eta_at`, `eta_p10_at`, `eta_p90_at`; at most once a second",
    "metric": "`values` of a `step`, `shard` and `attempt` at `done` of `total`",
    "estimate": "seconds by `steps`, `total_s` and `interval_s`, once the rows are checked",
    "heads.ranked": "`head_map` (its id), `scorer`, `heads` of the model, `kept` of them, the `best` ten, `rank_correlation` of "
    "the two halves; none and null where the map ranks nothing",
    "examples.scored": "`selection` (its id), `scorer`, `rows`, `kept`",
    "checkpoint": "`name` and number of `files` of what an `attempt` at a `step` would go on from",
    "cache.hit": "`step` and `shard` that an earlier `job_id` had done, its `fingerprint` and `seconds_saved`",
    "artifact": "`id`, `name`, `sha256`, `size_bytes` of a file",
    "attempt": "`step`, `shard`, `attempt` and its `outcome`, first `running`",
    "warning": "`message`",
    "end": "`status`",
}
"""Type of an event -> what its data hold. What workers note is no event: `GET /jobs/{id}/logs` has it."""


class EventView(View):
    """One thing that happened to a job; `end` is the last, unless the job is retried."""

    seq: int = Field(description="1, 2, 3 ... without gaps.")
    type: str = Field(
        description="What `data` hold by type; types and fields may grow. No text of a row is in any, and workers' lines are "
        "not events: `/jobs/{id}/logs` has them.\n\n"
        + "\n".join(f"* `{type}`: {data}." for type, data in EVENTS.items())
    )
    data: dict[str, JsonValue]
    created_at: datetime


class ArtifactView(View):
    """A file of a job, immutable."""

    id: str
    job_id: str
    name: str
    media_type: str
    sha256: str
    size_bytes: int
    created_at: datetime
    expires_at: datetime | None = Field(
        default=None, description="When its bytes go; null while its job runs, or where they stay as long as the job."
    )
    expired: bool = Field(default=False, description="Its bytes are gone, and its content answers 410.")


class ModelView(View):
    """A base model, usable or not. What only its files say is absent where there are none."""

    name: str
    supported: bool
    digest: str | None = None
    model_type: str | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    n_kv_groups: int | None = None
    head_dim: int | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    context_length: int | None = Field(default=None, description="Tokens.")
    parameters: int | None = None
    dtype: str | None = None
    error: Problem | None = Field(default=None, description="Why it is not usable.")


class HealthView(View):
    """The process runs."""

    status: Literal["ok"] = "ok"


class ReadinessView(View):
    """The servers behind the service."""

    status: Literal["ok", "degraded"] = Field(
        description="`degraded`: the broker is away, so jobs start some seconds later."
    )
    checks: dict[str, Literal["ok", "unavailable", "not_migrated"]]


class VersionView(View):
    """What runs here."""

    version: str
