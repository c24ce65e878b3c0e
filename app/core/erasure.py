"""Deleting a dataset, and what jobs have made of it: that is named, and deleted with it where its owner asks for that.

Everything that was computed from the rows counts: chosen rows with their text, scores, adapters. The bytes are collected later
(app.core.garbage). Each function takes a Connection and never commits.
"""

from __future__ import annotations

from app.core.moves import delete_all
from app.db.datasets import Dataset, DerivedJob, delete_dataset, derived_jobs, get_dataset, lock_dataset
from app.db.engine import Connection
from app.db.jobs import lock_job
from app.errors import DatasetInUse, DatasetNotFound


def erase(conn: Connection, dataset_id: str) -> tuple[Dataset, list[DerivedJob]]:
    """Delete a dataset; returns it, and the jobs that have read its content, each with the files that it still has.

    Jobs over an earlier dataset of the same content count: their files hold the same rows.
    Raises: DatasetNotFound, DatasetInUse while a job that has not ended reads the dataset.
    """
    dataset = lock_dataset(conn, dataset_id)
    if dataset is None:
        raise DatasetNotFound(id=dataset_id)
    derived = derived_jobs(conn, dataset)
    if by := [job.job_id for job in derived if job.needs_it]:
        raise DatasetInUse(dataset_id=dataset_id, by=by)
    delete_dataset(conn, dataset_id)
    return dataset, derived


def erase_all(conn: Connection, dataset_id: str) -> tuple[Dataset, list[tuple[DerivedJob, list[str]]]]:
    """As `erase`, and delete these jobs with all that they have made; each with the sha256 of every file that it had.

    Raises: as `erase`; JobInUse where a job over other rows, which has not ended, reads the head map, selection or adapter of
            one; MoveNotAllowed where one over an earlier dataset has not ended.
    """
    if (known := get_dataset(conn, dataset_id)) is not None:
        for job in derived_jobs(conn, known):
            lock_job(conn, job.job_id)  # first: whoever retries a job locks it before its dataset
    dataset, derived = erase(conn, dataset_id)
    hashes = delete_all(conn, [job.job_id for job in derived])
    return dataset, list(zip(derived, hashes, strict=True))
