"""From a request to a queued job with its steps: refuses what cannot work before any model is loaded.

Reads the datasets' rows in the ledger, never their text; that is the validate step's work. The caller commits, then wakes
the queue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.core.lifecycle import open_job
from app.core.plan import plan_job
from app.db.datasets import Dataset, get_dataset
from app.db.engine import Connection
from app.db.head_maps import get_head_map
from app.db.jobs import Job, get_job, insert_job
from app.db.selections import SelectionRecord, get_selection
from app.db.steps import insert_steps
from app.errors import DatasetNotFound, HeadMapMismatch, HeadMapNotFound, SelectionMismatch, SelectionNotFound
from p2d.config import JobConfig, check, config_json
from p2d.errors import DatasetTooSmall, ErrorDetail
from p2d.model_info import ModelInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """A job as asked for, its model looked up and its datasets stored."""

    config: JobConfig
    model: ModelInfo
    dataset_id: str
    validation_dataset_id: str | None = None
    name: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


def submit(conn: Connection, request: JobRequest, *, shard_rows: int, queue: str) -> Job:
    """Record the job, its steps and its first event.

    Raises: ConfigError, DatasetNotFound, DatasetTooSmall, HeadMapNotFound, HeadMapMismatch, SelectionNotFound,
            SelectionMismatch. Nothing is written then.
    """
    config = request.config
    check(config)
    dataset = _dataset(conn, request.dataset_id, "/dataset")
    validation = None
    if request.validation_dataset_id is not None:
        validation = _dataset(conn, request.validation_dataset_id, "/validation_dataset")
    if config.heads.head_map is None:
        _check_rows(config, dataset)
    else:
        _check_head_map(conn, request, config.heads.head_map)
    if config.data.selection is not None:
        _check_selection(conn, request, dataset, validation, config.data.selection)
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
        max_seconds=config.limits.max_seconds,
        metadata=dict(request.metadata),
    )
    digest = request.model.digest
    insert_steps(
        conn, job.id, plan_job(config, rows=dataset.rows, shard_rows=shard_rows, queue=queue, model_digest=digest)
    )
    open_job(conn, job)
    return job


def _dataset(conn: Connection, dataset_id: str, pointer: str) -> Dataset:
    dataset = get_dataset(conn, dataset_id)
    if dataset is None:
        error = DatasetNotFound(id=dataset_id)
        error.errors = (ErrorDetail(code=error.code, message="No such dataset.", pointer=pointer),)
        raise error
    return dataset


def _check_rows(config: JobConfig, dataset: Dataset) -> None:
    needed = config.heads.proxy_rows
    if dataset.rows < needed:
        text = f"The dataset has {dataset.rows} rows; the proxy needs {needed}."
        detail = ErrorDetail(code=DatasetTooSmall.code, message=text, pointer="/heads/proxy_rows")
        raise DatasetTooSmall(text, errors=[detail], rows=dataset.rows, needed=needed)


def _check_head_map(conn: Connection, request: JobRequest, head_map_id: str) -> None:
    head_map = get_head_map(conn, head_map_id)
    if head_map is None:
        raise HeadMapNotFound(id=head_map_id)
    if head_map.model_digest != request.model.digest:
        raise HeadMapMismatch(
            f"The head map was made with {head_map.base_model!r} of another digest than {request.model.name!r}.",
            errors=[ErrorDetail(code=HeadMapMismatch.code, message="Another base model.", pointer="/heads/head_map")],
        )


def _check_selection(
    conn: Connection, request: JobRequest, dataset: Dataset, validation: Dataset | None, selection_id: str
) -> None:
    selection = get_selection(conn, selection_id)
    if selection is None:
        raise SelectionNotFound(id=selection_id)
    if reason := _selection_mismatch(conn, request, dataset, validation, selection):
        raise SelectionMismatch(
            f"The selection was made {reason}.",
            errors=[ErrorDetail(code=SelectionMismatch.code, message=f"Made {reason}.", pointer="/data/selection")],
        )


def _selection_mismatch(
    conn: Connection, request: JobRequest, dataset: Dataset, validation: Dataset | None, selection: SelectionRecord
) -> str | None:
    if selection.model_digest != request.model.digest:
        return "with another base model"
    if _content(conn, selection.dataset_id) != dataset.content_hash:
        return "over another dataset"
    if _content(conn, selection.validation_dataset_id) != (validation.content_hash if validation else None):
        return "with another validation dataset"
    maker = get_job(conn, selection.job_id)
    # Without a validation dataset the seed decides which rows are held out: another seed would train on rows that are
    # then used to judge the result.
    if validation is None and maker and maker.config["training"]["seed"] != request.config.training.seed:
        return "with another seed, which holds other rows out of the dataset"
    return None


def _content(conn: Connection, dataset_id: str | None) -> str | None:
    dataset = get_dataset(conn, dataset_id) if dataset_id else None
    return dataset.content_hash if dataset else None
