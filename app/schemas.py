"""The wire: what JSON the service takes and gives. Shapes and types only.

Ranges and names are checked by `p2d.config.check`, for HTTP, command line and Python alike; the bounds noted here are
documentation for OpenAPI. Views are filled from the rows of app.db by attribute, so nothing here knows the database.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from p2d.columns import FIELDS
from p2d.config import (
    DEFAULT_RATIO,
    MIN_ROWS,
    PROXY_ROWS,
    Control,
    DataConfig,
    HeadsConfig,
    JobConfig,
    Kind,
    Limits,
    Metric,
    Mode,
    Precision,
    Projection,
    Reuse,
    TrainingConfig,
)
from p2d.model_info import MODEL_NAME

Status = Literal["queued", "running", "pausing", "paused", "cancelling", "cancelled", "succeeded", "failed"]
Auto = Literal["auto"]


def _plain(text: str) -> str:
    # PostgreSQL stores no NUL, and half of a surrogate pair has no UTF-8.
    if "\x00" in text or (not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)):
        raise ValueError("the text holds a NUL or half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_plain)]
Id = Annotated[Text, Field(min_length=1, max_length=64)]
Ratio = Annotated[float, Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})]


MAX_METADATA = 16
"""Most pairs of text on one job."""

Priority = Annotated[int, Field(ge=-10, le=10)]

Count = Annotated[int, Field(le=1_000_000)]


Mapping = Annotated[
    dict[Text, Text],
    Field(
        max_length=len(FIELDS),
        description="Field -> column, where a file names its columns otherwise, as in "
        '`{"prompt": "Frage", "completion": "Antwort"}`. Fields: ' + ", ".join(FIELDS) + ".",
    ),
]


class Body(BaseModel):
    """Base of what clients send: unknown fields are refused, and nothing is guessed ("0.1" is not a number)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class HeadsBody(Body):
    """Stage 1: which heads count as task-sensitive."""

    scorer: Text = Field(default="auto", description="Name of a head scorer; `auto` = the recipe's.")
    ratio: Ratio = Field(default=DEFAULT_RATIO, description="Share of query heads kept, above 0 and at most 1.")
    proxy_rows: Count | Auto = Field(
        default="auto", description=f"Rows of the proxy run; `auto` = {PROXY_ROWS}, or all training rows if fewer."
    )
    head_map: Id | None = Field(
        default=None, description="Id of an earlier head map of the same base model: stage 1 is skipped."
    )


class DataBody(Body):
    """Stage 2: which rows the chosen heads respond to."""

    scorer: Text = Field(default="auto", description="Name of a data scorer; `auto` = the recipe's.")
    ratio: Ratio | Auto = Field(
        default="auto", description=f"Share of rows kept; `auto` = {DEFAULT_RATIO:.0%}, but at least {MIN_ROWS} rows."
    )
    mode: Mode = Field(default="faithful", description="`fast` = a fraction of the cost: fewer rows are scored.")
    metric: Metric = Field(
        default="log_likelihood", description="`icl`: how answers are judged; the last two generate, which costs more."
    )
    n_demos: Count = Field(default=DataConfig().n_demos, description="`icl`: rows shown as examples in one group.")
    n_queries: Count = Field(
        default=DataConfig().n_queries, description="`icl`: rows answered after the demos of one group."
    )
    selection: Id | None = Field(
        default=None, description="Id of an earlier selection over the same dataset: stage 2 is skipped."
    )


class TrainingBody(Body):
    """Stage 3: how the chosen head slices are trained."""

    slices: list[Projection] | Auto = Field(
        default="auto", description="Projections that are sliced; `auto` = the recipe's."
    )
    rank: Count | None = Field(
        default=None, description="Rank of the update inside each slice, at most the head width; absent = whole slices."
    )
    epochs: Count = Field(default=TrainingConfig().epochs, description="Passes over the selected rows.")
    learning_rate: float | Auto = Field(
        default="auto", description="Peak rate; `auto` = a short search on held-out rows."
    )
    batch_size: Count = Field(default=TrainingConfig().batch_size, description="Rows per optimizer step.")
    max_length: Count | Auto = Field(
        default="auto", description="Most tokens of one row; `auto` = the model's context."
    )
    precision: Precision = Field(default="auto", description="Compute type of the frozen weights.")
    seed: int = Field(default=0, le=2**63 - 1, description="Fixes row order, proxies, folds and random controls.")


class LimitsBody(Body):
    """What a job may use at most."""

    max_seconds: int | None = Field(default=None, le=2**31 - 1, description="Seconds from the first claim.")


class JobBody(Body):
    """What `POST /jobs` takes."""

    kind: Kind = Field(default="adapt", description="How far the job goes.")
    recipe: Text = Field(default="default", description="Names the defaults: `default`, or `paper` as published.")
    base_model: Text = Field(description="Name of an installed model, see GET /models.")
    revision: Text | None = Field(
        default=None, description="Digest that the base model must have; absent = whatever is installed."
    )
    dataset: Id | None = Field(
        default=None, description="Id of a dataset; absent in multipart, where the file is sent along."
    )
    validation_dataset: Id | None = Field(
        default=None, description="Id of held-out rows; absent = rows are held out of the dataset."
    )
    heads: HeadsBody = HeadsBody()
    data: DataBody = DataBody()
    training: TrainingBody = TrainingBody()
    mapping: Mapping = Field(default={}, description="Columns of the files that are sent along, as in POST /datasets.")
    controls: list[Control] = Field(
        default=[], max_length=2, description="Arms trained beside the job's own, at equal size."
    )
    limits: LimitsBody = LimitsBody()
    reuse: Reuse = Field(
        default="auto",
        description="`auto` = finding heads and scoring rows take what an earlier job has computed from the same rows, model "
        "and settings; `never` = all is computed anew.",
    )
    metadata: dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]] = Field(
        default={}, max_length=MAX_METADATA, description="Pairs of text of your own."
    )
    name: Annotated[Text, Field(max_length=200)] = Field(default="", description="A name of your own.")
    priority: Priority = Field(
        default=0, description="Within a project, ready steps of a higher one are claimed first; none is stopped."
    )

    def config(self) -> JobConfig:
        """The same as the engine's own types."""
        training = self.training.model_dump()
        if isinstance(self.training.slices, list):
            training["slices"] = tuple(self.training.slices)
        return JobConfig(
            kind=self.kind,
            recipe=self.recipe,
            heads=HeadsConfig(**self.heads.model_dump()),
            data=DataConfig(**self.data.model_dump()),
            training=TrainingConfig(**training),
            controls=tuple(self.controls),
            limits=Limits(**self.limits.model_dump()),
            reuse=self.reuse,
        )


class JobPatch(Body):
    """What `PATCH /jobs/{id}` takes, as a JSON merge patch: only what is to change; null empties it."""

    name: Annotated[Text, Field(max_length=200)] | None = Field(default=None, description="A name of your own.")
    metadata: dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)] | None] | None = Field(
        default=None, description=f"Pairs to set; null removes one. Up to {MAX_METADATA} in the end."
    )
    priority: Priority | None = Field(default=None, description="From the next claim on; null is 0.")


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="In lower-case hexadecimal digits.")]


class UploadBody(Body):
    """What `POST /uploads` takes."""

    name: Annotated[Text, Field(max_length=200)] = Field(default="", description="The file's name, a label.")
    size_bytes: int = Field(ge=1, le=2**63 - 1, description="Of the whole file.")
    sha256: Sha256 | None = Field(default=None, description="Of the whole file; checked when it is complete.")


class CompleteBody(Body):
    """What `POST /uploads/{id}/complete` takes; no body at all is fine too."""

    mapping: Mapping = {}


class ModelCheckBody(Body):
    """What `POST /models/check` takes."""

    name: Annotated[str, Field(pattern=f"^{MODEL_NAME.pattern}$")] = Field(
        default="model", description="How the answer calls the model."
    )
    config: dict[str, JsonValue] = Field(description="The contents of the model's config.json.")


# --- answers ---------------------------------------------------------------------------------------------------------


class View(BaseModel):
    """Base of what the service answers."""

    model_config = ConfigDict(from_attributes=True, frozen=True)


class FaultView(View):
    """One fault among several."""

    code: str
    message: str
    pointer: str | None = Field(default=None, description="JSON pointer into the body or the row.")
    line: int | None = Field(default=None, description="1-based line of the dataset file.")


class Problem(View):
    """Every error of the service (RFC 9457), and `job.error`. Match on `code`: it never changes its meaning."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    fault: Literal["user", "service", "capacity", "dependency"]
    retryable: bool = Field(description="Whether the same request can work later.")
    hint: str = Field(description="What to do next.")
    errors: list[FaultView] = []
    errors_total: int = Field(default=0, description="More than the length of errors where that is capped.")
    facts: dict[str, Any] = {}
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
    kind: str
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


class DatasetView(View):
    """A dataset, complete and checked."""

    id: str
    name: str
    format: str
    rows: int
    size_bytes: int
    content_hash: str = Field(description="Sha256 over prompts and answers; the same for any format.")
    created_at: datetime
    deduplicated: bool = Field(default=False, description="The same content was there already; this is that dataset.")


class PartView(View):
    """One part of an upload that is there."""

    number: int = Field(description="From 1.")
    sha256: str


class UploadView(View):
    """A file that comes in parts, any order, each as often as it takes."""

    id: str
    status: Literal["open", "completed"]
    name: str
    size_bytes: int
    sha256: str | None
    part_bytes: int = Field(description="Size of every part but the last, which has the rest.")
    part_count: int
    parts: list[PartView] = Field(description="Those that are there, by number.")
    dataset_id: str | None = Field(description="The dataset that it became.")
    created_at: datetime
    expires_at: datetime = Field(description="Given up then; every part puts it off.")


class DatasetReportView(View):
    """What the check of a dataset found."""

    dataset_id: str
    format: str
    rows: int
    size_bytes: int
    content_hash: str
    longest_row_chars: int
    duplicates: int
    duplicate_lines: list[int]
    warnings: list[str]
    compression: Literal["gzip", "zstd"] | None = Field(
        default=None, description="How the file came; lines are those of the unpacked file."
    )
    mapping: dict[str, str] = Field(default={}, description="What was said of its columns: field -> column.")
    source: dict[str, Any] | None = Field(
        default=None, description="Where it was fetched, when, and the bytes' sha256."
    )


class EventView(View):
    """One thing that happened to a job; `end` is the last, unless the job is retried."""

    seq: int = Field(description="1, 2, 3 ... without gaps.")
    type: str
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


class HeadMapView(View):
    """A head map: a score for every head, the recipe that made it and how reproducible it is."""

    id: str
    job_id: str
    artifact_id: str
    base_model: str
    model_digest: str
    dataset_id: str
    scorer: str
    created_at: datetime
    map: dict[str, JsonValue] = Field(description="The file `head_map.json`.")


class SelectionView(View):
    """A selection: a score for every row of a dataset."""

    id: str
    job_id: str
    artifact_id: str
    base_model: str
    model_digest: str
    dataset_id: str
    validation_dataset_id: str | None
    scorer: str
    rows: int
    kept: int
    created_at: datetime


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
    checks: dict[str, Literal["ok", "unavailable"]]


class VersionView(View):
    """What runs here."""

    version: str
