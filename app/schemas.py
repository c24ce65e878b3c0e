"""The wire, inwards: what JSON the service takes. Shapes and types only; what it gives is app/views.py.

Ranges and names are checked by `p2d.config_checks.check`, for HTTP, command line and Python alike; the bounds noted here are
documentation for OpenAPI.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
)

from p2d.columns import FIELDS
from p2d.config import (
    DEFAULT_RATIO,
    MAX_EPOCHS,
    MIN_ROWS,
    MIN_STEPS,
    PROXY_ROWS,
    RECIPES,
    AskedMode,
    Control,
    DataConfig,
    HeadsConfig,
    JobConfig,
    Kind,
    Limits,
    Metric,
    Precision,
    Projection,
    Reuse,
    TrainingConfig,
)
from p2d.model_info import MODEL_NAME

Auto = Literal["auto"]
AutoOrNull = Literal["auto", None]
"""One literal and no `| None` behind it: pydantic names no null in the faults of that."""

_DEFAULT, _PAPER = RECIPES["default"], RECIPES["paper"]


def _plain(text: str) -> str:
    # PostgreSQL stores no NUL, and half of a surrogate pair has no UTF-8.
    if "\x00" in text or (not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)):
        raise ValueError("the text holds a NUL or half of a surrogate pair")
    return text


Text = Annotated[str, AfterValidator(_plain)]
Id = Annotated[Text, Field(min_length=1, max_length=64)]
Webhooks = Annotated[list[Id], Field(max_length=16)]
Ratio = Annotated[float, Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})]


MAX_METADATA = 16
"""Most pairs of text on one job."""

Priority = Annotated[int, Field(ge=-10, le=10)]

Ttl = Annotated[int, Field(ge=60, le=10 * 366 * 86400)]
"""Seconds that a file stays: a minute to ten years."""

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


class HttpsSource(Body):
    """A file behind an https URL."""

    type: Literal["https"]
    url: Annotated[Text, Field(min_length=9, max_length=2000)] = Field(
        description="An https URL of a host that `P2D_EGRESS` allows. No credentials."
    )


class S3Source(Body):
    """An object in a bucket that the operator opened."""

    type: Literal["s3"]
    url: Annotated[Text, Field(min_length=6, max_length=1500)] = Field(
        description="`s3://bucket/key`, of a bucket in `P2D_SOURCE_BUCKETS`."
    )


class HubSource(Body):
    """Files of a dataset repository on the Hugging Face Hub: those of a config and split, or one by its path."""

    type: Literal["hf"]
    repo: Annotated[Text, Field(max_length=200)] = Field(description="`owner/name`.")
    config: Annotated[Text, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="Of the dataset card, or a folder; absent = the default one."
    )
    split: Annotated[Text, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="Absent = the only one that there is."
    )
    path: Annotated[Text, Field(max_length=500)] | None = Field(
        default=None, description="One file in the repository, instead of config and split."
    )
    revision: Annotated[Text, Field(max_length=200)] = Field(
        default="main",
        description="A commit, or a branch or tag: the commit that it is now is what is fetched, and kept in the report.",
    )


Source = Annotated[HttpsSource | S3Source | HubSource, Field(discriminator="type")]


class SourceBody(Body):
    """A dataset that lies elsewhere."""

    source: Source
    mapping: Mapping = {}


class RowsBody(Body):
    """A small dataset, written out: bounded by the size of a JSON body."""

    rows: list[JsonValue] = Field(
        description='Objects such as `{"question": ..., "answer": ...}`, as lines of a file would be.'
    )
    mapping: Mapping = {}


def _way(given: Any) -> str | None:
    """How a dataset is given; tags in angle brackets are no part of a pointer (`app.problems`)."""
    if isinstance(given, str):
        return "<id>"
    if isinstance(given, RowsBody) or (isinstance(given, dict) and "rows" in given):
        return "<rows>"
    return "<source>" if isinstance(given, SourceBody | dict) else None


DatasetBody = Annotated[
    Annotated[SourceBody, Tag("<source>")] | Annotated[RowsBody, Tag("<rows>")],
    Discriminator(_way, "dataset_type", "Expected an object with `source` or `rows`"),
]
"""What `POST /datasets` takes as JSON."""

DatasetRef = Annotated[
    Annotated[Id, Tag("<id>")] | Annotated[SourceBody, Tag("<source>")] | Annotated[RowsBody, Tag("<rows>")],
    Discriminator(_way, "dataset_type", "Expected a dataset's id, or an object with `source` or `rows`"),
]
"""A dataset of a job: the id of one that is stored, or what POST /datasets takes."""


class HeadsBody(Body):
    """Stage 1: which heads count as task-sensitive."""

    scorer: Text = Field(
        default="auto",
        description="Name of a head scorer; `auto` = `uniform`, which costs nothing, where all heads are kept, else the recipe's.",
    )
    ratio: Ratio | Auto = Field(
        default="auto",
        description="Share of query heads kept, above 0 and at most 1; `auto` = all in recipe `default`, unless `scorer`, "
        f"`head_map` or the control `random_heads` is given, else {DEFAULT_RATIO:.0%}.",
    )
    proxy_rows: Count | Auto = Field(
        default="auto",
        description=f"Rows of the proxy run; `auto` = {PROXY_ROWS}, or all training rows if fewer. Unused where no proxy is run.",
    )
    head_map: Id | None = Field(
        default=None, description="Id of an earlier head map of the same base model: stage 1 is skipped."
    )


class DataBody(Body):
    """Stage 2: which rows the chosen heads respond to."""

    scorer: Text = Field(
        default="auto",
        description="Name of a data scorer; `auto` = the recipe's, or `lexical`, by words alone, if nothing vouches for a choice.",
    )
    ratio: Ratio | Auto = Field(
        default="auto",
        description="Share of rows kept; `auto` in recipe `default` = as many as seem to be like the rows of the validation "
        "dataset, which the run finds out; without one (of 20 rows) all whose answers go with their prompts by their words, unless "
        "a choice is asked for, and then "
        f"{_DEFAULT.data_ratio:.0%}, in `paper` {_PAPER.data_ratio:.0%}, at least {MIN_ROWS} rows.",
    )
    mode: AskedMode = Field(
        default="auto",
        description="`fast` = a fraction of the cost: fewer rows are scored, and of long answers the beginning; `auto` = `fast` in "
        "recipe `default` where all rows are scored even so, else `faithful`.",
    )
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
    rank: Count | AutoOrNull = Field(
        default="auto",
        description="Rank of the update inside each slice, at most the head width; null = whole slices; `auto` = "
        f"{_DEFAULT.rank} where recipe `default` trains all heads, else whole slices.",
    )
    epochs: Count | Auto = Field(
        default="auto",
        description=f"Passes over the selected rows; `auto` = {_DEFAULT.epochs} in recipe `default`, or as many as make "
        f"{MIN_STEPS} optimizer steps, at most {MAX_EPOCHS}; {_PAPER.epochs} in `paper`.",
    )
    learning_rate: Annotated[float, Field(le=1)] | Auto = Field(
        default="auto", description="Peak rate, at most 1; `auto` = a short search on held-out rows."
    )
    batch_size: Count = Field(default=TrainingConfig().batch_size, description="Rows per optimizer step.")
    max_length: Count | Auto = Field(
        default="auto", description="Most tokens of one row; `auto` = the model's context."
    )
    precision: Precision = Field(default="auto", description="Compute type of the frozen weights.")
    seed: int = Field(default=0, le=2**63 - 1, description="Fixes row order, proxies, folds and random controls.")


def _rfc3339(value: Any) -> Any:
    # pydantic would take a number for seconds since 1970, which the description does not say.
    if not isinstance(value, datetime) and not (isinstance(value, str) and re.match(r"\d{4}-\d\d-\d\d[Tt ]", value)):
        raise ValueError("expected a time as RFC 3339 has it, such as 2026-11-25T17:05:00Z")
    return value


Moment = Annotated[AwareDatetime, Field(strict=False), BeforeValidator(_rfc3339)]
"""A time with its offset."""


def _near(value: datetime) -> datetime:
    if value.year > 9000:  # in the hours of another zone it might be beyond what a date can be
        raise ValueError("expected a time before the year 9000")
    return value


class LimitsBody(Body):
    """What a job may use at most; past a limit it fails with `job.limit_reached`, and what was finished is kept."""

    max_seconds: int | None = Field(
        default=None,
        le=2**31 - 1,
        description="Seconds on the clock from the first claim of a step on, however many run side by side and whatever was "
        "tried twice, without those in which the job was paused.",
    )
    max_gpu_seconds: int | None = Field(
        default=None,
        le=2**31 - 1,
        description="Seconds of workers (of their GPUs, where they have one), added up over all steps: three that run side by "
        "side for a minute are 180, and so is what was tried twice. Waiting and pauses are free.",
    )
    deadline: Annotated[Moment, AfterValidator(_near)] | None = Field(
        default=None,
        description="When a job that has not ended fails, also one that still waits; one that is paused, once it goes on.",
    )


class JobBody(Body):
    """What `POST /jobs` takes."""

    kind: Kind = Field(default="adapt", description="How far the job goes.")
    recipe: Text = Field(default="default", description="Names the defaults: `default`, or `paper` as published.")
    base_model: Text = Field(
        description="Name of an installed model, see GET /models; or the id of the artifact `model.safetensors` (of several files "
        "`model.safetensors.index.json`) of an export of the project, which has merged an adapter into its base."
    )
    revision: Text | None = Field(
        default=None, description="Digest that the base model must have; absent = whatever is installed."
    )
    dataset: DatasetRef | None = Field(
        default=None,
        description="Id of a dataset, or the JSON that POST /datasets takes; absent in multipart, where the file is sent along.",
    )
    validation_dataset: DatasetRef | None = Field(
        default=None, description="Held-out rows likewise; absent = rows are held out of the dataset."
    )
    heads: HeadsBody = HeadsBody()
    data: DataBody = DataBody()
    training: TrainingBody = TrainingBody()
    mapping: Mapping = Field(
        default={}, description="Columns of what is sent along or named, but for a dataset with a mapping of its own."
    )
    controls: list[Control] = Field(
        default=[],
        max_length=3,
        description="What is trained beside the job's own and judged on the same rows: `random_heads` and `random_data` at equal "
        "size; `lora`, LoRA on all linear layers and all rows, which costs what that costs.",
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

    artifact_ttl: Ttl | None = Field(
        default=None,
        description="Seconds that the job's files stay after its end, but for its head map and selection; absent = as long as "
        "the job.",
    )
    webhooks: Webhooks = Field(
        default=[],
        description="Ids of webhooks of the project that are told of this job, beside those that are told of all: see `jobs` of "
        "POST /webhooks.",
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
            limits=Limits(**self.limits.model_dump(mode="json")),
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


class PartUrlBody(Body):
    """What `POST /uploads/{id}/parts/{number}/url` takes."""

    size_bytes: int = Field(
        ge=1, le=2**63 - 1, description="Of the part: `part_bytes`, or what is left for the last one."
    )
    sha256: Sha256


class StoredPartBody(Body):
    """What `POST /uploads/{id}/parts/{number}` takes."""

    sha256: Sha256


class CompleteBody(Body):
    """What `POST /uploads/{id}/complete` takes; no body at all is fine too."""

    mapping: Mapping = {}


class ModelCheckBody(Body):
    """What `POST /models/check` takes."""

    name: Annotated[str, Field(pattern=f"^{MODEL_NAME.pattern}$")] = Field(
        default="model", description="How the answer calls the model."
    )
    config: dict[str, JsonValue] = Field(description="The contents of the model's config.json.")
