"""From a request to a queued job with its steps: refuses what cannot work before any model is loaded.

Reads the datasets' rows in the ledger, never their text; that is the validate step's work. The caller commits, then wakes
the queue.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from app.core.bases import is_artifact, keep_base
from app.core.exports import find_adapter
from app.core.lifecycle import open_job
from app.core.plan import plan_job
from app.db.artifacts import get_artifact
from app.db.datasets import Dataset, get_dataset
from app.db.engine import Connection, Json
from app.db.head_maps import HeadMapRecord, get_head_map, keep_head_map
from app.db.jobs import Job, get_job, insert_job, keep_job, lock_job, seconds_until
from app.db.selections import SelectionRecord, get_selection, keep_selection
from app.errors import (
    DatasetNotFound,
    HeadMapMismatch,
    HeadMapNotFound,
    SelectionMismatch,
    SelectionNotFound,
)
from p2d.config import JobConfig, config_json, least_proxy_rows
from p2d.config_checks import check, check_given_heads, check_rank
from p2d.errors import ConfigError, DatasetTooSmall, ErrorDetail, P2DError
from p2d.model_info import ModelInfo
from p2d.plans import guide_count, held_out_count
from p2d.resolution import Resolution, resolve
from p2d.versions import versions


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """A job as asked for, its model looked up and its datasets stored."""

    config: JobConfig
    model: ModelInfo
    dataset: Dataset
    """Made in the same transaction, or found with `keep`; so the validation dataset."""
    validation_dataset: Dataset | None = None
    name: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    artifact_ttl: int | None = None
    webhooks: Sequence[str] = ()
    """Ids, looked up."""
    base_artifact_id: str | None = None
    """Of a base model that was merged, with `keep_base`."""


def submit(conn: Connection, request: JobRequest, *, shard_rows: int, queue: str) -> Job:
    """Record the job, its steps and its first event.

    Raises: ConfigError, DatasetTooSmall, HeadMapNotFound, HeadMapMismatch, SelectionNotFound,
            SelectionMismatch. Nothing is written then.
    """
    config = request.config
    check(config)
    dataset, validation = request.dataset, request.validation_dataset
    earlier = _keep_earlier(conn, config.heads.head_map, config.data.selection)
    inputs = Inputs(model=request.model, dataset=dataset, validation=validation)
    for error in refusals(conn, config, inputs, earlier):
        raise error
    job = insert_job(
        conn,
        kind=config.kind,
        name=request.name,
        config=config_json(config),
        dataset_id=dataset.id,
        validation_dataset_id=validation.id if validation else None,
        base_model=request.model.name,
        model_digest=request.model.digest,
        queue=queue,
        priority=request.priority,
        max_seconds=config.limits.max_seconds,
        max_gpu_seconds=config.limits.max_gpu_seconds,
        deadline_at=config.limits.ends_at,
        metadata=dict(request.metadata),
        resolved=_resolved(config, request.model, dataset, validation, earlier.map_scorer),
        artifact_ttl=request.artifact_ttl,
        webhooks=request.webhooks,
        base_artifact_id=request.base_artifact_id,
    )
    digest = request.model.digest
    planned = plan_job(config, rows=dataset.rows, shard_rows=shard_rows, queue=queue, model_digest=digest)
    open_job(conn, job, planned)
    return job


def _resolved(
    config: JobConfig, model: ModelInfo, dataset: Dataset, validation: Dataset | None, map_scorer: str | None
) -> Json:
    """What every "auto" means. The validate step says it again, from the rows that are left for training."""
    validation_rows = validation.rows if validation else None
    found = resolution_of(config, model, dataset.rows, validation_rows, map_scorer=map_scorer).resolution
    return {
        "config": config_json(found.config),
        "reasons": found.reasons,
        "warnings": list(found.warnings),
        "versions": versions(),
    }


class Content(Protocol):
    """What must be known of a dataset, stored or about to be."""

    @property
    def rows(self) -> int:
        """Number of rows."""

    @property
    def stored_bytes(self) -> int:
        """Size of the normalised rows."""

    @property
    def content_hash(self) -> str:
        """Sha256 over prompts and answers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What a job is to work on, as far as it was found. Of what is not known nothing is judged."""

    model: ModelInfo | None
    dataset: Content | None
    validation: Content | None = None
    validation_known: bool = True
    """Whether the job's is `validation`, or none where that is None."""
    seed_known: bool = True
    """Whether the job's is that of its config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """What a job names of earlier results; None where it names none, or one that is not there."""

    head_map: HeadMapRecord | None = None
    selection: SelectionRecord | None = None

    @property
    def map_scorer(self) -> str | None:
        """How the head map was made."""
        return self.head_map.scorer if self.head_map is not None else None


def find_earlier(conn: Connection, config: JobConfig) -> Earlier:
    """Look up what the config names. Whether that is there and fits, `refusals` says."""
    head_map, selection = config.heads.head_map, config.data.selection
    return Earlier(
        head_map=get_head_map(conn, head_map) if head_map is not None else None,
        selection=get_selection(conn, selection) if selection is not None else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstResolution:
    """What "auto" means before any row was read, and how the rows will be set apart."""

    resolution: Resolution
    train_rows: int
    held_out: int


def resolution_of(
    config: JobConfig, model: ModelInfo, rows: int, validation_rows: int | None, *, map_scorer: str | None
) -> FirstResolution:
    """Resolve a config that was checked. The validate step does it again, from the rows themselves."""
    held_out = held_out_count(rows, validation_rows, proxy_rows=0)
    train_rows = rows - held_out if validation_rows is None else rows
    resolution = resolve(
        config,
        rows=train_rows,
        context_length=model.context_length,
        head_dim=model.head_dim,
        map_scorer=map_scorer,
        validation_guide=0 if validation_rows is None else guide_count(validation_rows),
    )
    return FirstResolution(resolution=resolution, train_rows=train_rows, held_out=held_out)


def refusals(conn: Connection, config: JobConfig, inputs: Inputs, earlier: Earlier) -> Iterator[P2DError]:
    """Everything about model, datasets and earlier results that forbids the job; writes nothing.

    The API also asks before it stores an uploaded file, so that a refused job leaves nothing behind.
    """
    model, dataset, validation = inputs.model, inputs.dataset, inputs.validation
    deadline = config.limits.ends_at
    if deadline is not None and (left_s := seconds_until(conn, deadline)) < 0:
        text = f"The deadline was {-left_s:.0f} seconds ago."
        fault = ErrorDetail(code="config.deadline", message=text, pointer="/limits/deadline", expected="a time to come")
        yield ConfigError(text, errors=[fault])
    if config.heads.head_map is not None:
        yield from _head_map_refusals(config, model, config.heads.head_map, earlier.head_map)
    if model is not None:
        try:
            check_rank(config, head_dim=model.head_dim)
        except ConfigError as error:
            yield error
    if dataset is not None and inputs.validation_known:
        own, proxy_rows = validation.rows if validation else None, least_proxy_rows(config)
        try:
            held_out_count(dataset.rows, own, proxy_rows=proxy_rows)
        except DatasetTooSmall as error:
            yield error
    if config.data.selection is not None:
        yield from _selection_refusals(conn, config, inputs, config.data.selection, earlier.selection)


def find_dataset(conn: Connection, dataset_id: str, pointer: str, *, keep: bool = False) -> Dataset:
    """The dataset that the body names at `pointer`. Raises DatasetNotFound.

    Args:   keep: nobody deletes it before the job that reads it is committed and seen to need it.
    """
    dataset = get_dataset(conn, dataset_id, keep=keep)
    if dataset is None:
        raise _at(pointer, DatasetNotFound(id=dataset_id))
    return dataset


def hold_makers(conn: Connection, job: Job) -> None:
    """Lock the jobs that made the merged base and the adapter of a recorded one, as far as they are there.

    Before that one is locked: whoever deletes such a job locks it first, and then every job that names its files.
    """
    for artifact_id in (job.base_artifact_id, job.adapter_id):
        if artifact_id is not None and (artifact := get_artifact(conn, artifact_id)) is not None:
            lock_job(conn, artifact.job_id)


def find_inputs(conn: Connection, job: Job) -> None:
    """Make sure that everything a recorded job reads is still there, and stays until the transaction has ended.

    Raises: DatasetNotFound, HeadMapNotFound, SelectionNotFound; for an export, or a base that was merged, ArtifactNotFound,
            ArtifactExpired.
    """
    if is_artifact(job.base_model):
        keep_base(conn, job.base_model)
    if job.kind == "export":
        find_adapter(conn, job.adapter_id or "")
        return
    find_dataset(conn, job.dataset_id, "/dataset", keep=True)
    if job.validation_dataset_id is not None:
        find_dataset(conn, job.validation_dataset_id, "/validation_dataset", keep=True)
    _keep_earlier(conn, job.config["heads"]["head_map"], job.config["data"]["selection"])


def _keep_earlier(conn: Connection, head_map_id: str | None, selection_id: str | None) -> Earlier:
    """Let nobody delete what a job names, nor the jobs that made it, before that job is committed and seen to need it."""
    head_map, selection = None, None
    if head_map_id is not None:
        head_map = get_head_map(conn, head_map_id)
        if head_map is not None and head_map.job_id is not None:
            keep_job(conn, head_map.job_id)  # first, because whoever deletes a job locks it before its head map
        if head_map is None or not keep_head_map(conn, head_map_id):
            raise _at("/heads/head_map", HeadMapNotFound(id=head_map_id))
    if selection_id is not None:
        selection = get_selection(conn, selection_id)
        if selection is not None:
            keep_job(conn, selection.job_id)
        if selection is None or not keep_selection(conn, selection_id):
            raise _at("/data/selection", SelectionNotFound(id=selection_id))
    return Earlier(head_map=head_map, selection=selection)


def _head_map_refusals(
    config: JobConfig, model: ModelInfo | None, head_map_id: str, head_map: HeadMapRecord | None
) -> Iterator[P2DError]:
    pointer = "/heads/head_map"
    if head_map is None:
        yield _at(pointer, HeadMapNotFound(id=head_map_id))
    elif model is not None and head_map.model_digest != model.digest:
        text = f"The head map was made with {head_map.base_model!r} of another digest than {model.name!r}."
        yield _at(pointer, HeadMapMismatch(text))
    else:
        try:
            check_given_heads(config, head_map.scorer)
        except ConfigError as error:
            yield error


def _selection_refusals(
    conn: Connection, config: JobConfig, inputs: Inputs, selection_id: str, selection: SelectionRecord | None
) -> Iterator[P2DError]:
    pointer = "/data/selection"
    if selection is None:
        yield _at(pointer, SelectionNotFound(id=selection_id))
    elif reason := _selection_mismatch(conn, config, inputs, selection):
        yield _at(pointer, SelectionMismatch(f"The selection was made {reason}."))


def _at(pointer: str, error: P2DError) -> P2DError:
    error.errors = (ErrorDetail(code=error.code, message=error.text, pointer=pointer),)
    error.errors_total = 1
    return error


def _selection_mismatch(conn: Connection, config: JobConfig, inputs: Inputs, selection: SelectionRecord) -> str | None:
    model, dataset, validation = inputs.model, inputs.dataset, inputs.validation
    if model is not None and selection.model_digest != model.digest:
        return "with another base model"
    if dataset is not None and _content(conn, selection.dataset_id) != dataset.content_hash:
        return "over another dataset"
    if not inputs.validation_known:
        return None
    if _content(conn, selection.validation_dataset_id) != (validation.content_hash if validation else None):
        return "with another validation dataset"
    maker = get_job(conn, selection.job_id)
    # Without a validation dataset the seed decides which rows are held out: another seed would train on rows that are
    # then used to judge the result.
    seed = config.training.seed
    if inputs.seed_known and validation is None and maker and maker.config["training"]["seed"] != seed:
        return "with another seed, which holds other rows out of the dataset"
    return None


def _content(conn: Connection, dataset_id: str | None) -> str | None:
    dataset = get_dataset(conn, dataset_id) if dataset_id else None
    return dataset.content_hash if dataset else None
