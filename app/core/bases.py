"""Base models: those that are installed, and those that an export of the project has merged, named by the id of their weights.

Such a model is all files of the export's step `merge`. Its digest is that of a directory which holds them, so it is known from the
ledger; its shape is read from its config.json and the headers of its weights. Workers bring the files (`workers.bases`).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from app.blobs import BlobStore
from app.core.results import find_artifact, lock_artifact, unexpired
from app.db.artifacts import Artifact, deleted_files, files_of_step
from app.db.engine import Connection, Engine
from app.db.ids import ID_PATTERN
from app.db.jobs import Job
from app.db.steps import list_steps
from app.errors import ArtifactNotFound
from app.result_errors import NotABaseModel
from p2d.errors import ErrorDetail, P2DError
from p2d.model_info import ModelInfo, digest_of, find_model, read_model_info, read_outline

WEIGHTS = frozenset({"model.safetensors", "model.safetensors.index.json"})
"""What a merged model is named by: its weights, or the index of them."""

MERGE = "merge"
"""The step that makes one."""

READ = frozenset({"config.json", "model.safetensors.index.json"})
"""Files that are read whole to describe a model."""


def is_artifact(base_model: str) -> bool:
    """Whether the name of a base model is the id of an artifact."""
    return base_model.startswith("art_") and re.fullmatch(ID_PATTERN, base_model) is not None


def find_base(engine: Engine, blobs: BlobStore, models_dir: Path, base_model: str) -> ModelInfo:
    """What a job must know of the base model that it names. No connection is held while the store is read.

    Raises: ModelNotFound, ModelUnsupported, ModelError; of an artifact those of `model_files`, BlobMissing, StoreUnavailable.
    """
    if not is_artifact(base_model):
        return read_model_info(find_model(models_dir, base_model))
    with engine.connect() as conn:
        files = model_files(conn, base_model)
    return _outlined(blobs, base_model, files)


def model_files(conn: Connection, artifact_id: str) -> list[Artifact]:
    """The files of the merged model that is named by its weights, all there.

    Raises: ArtifactNotFound, ArtifactExpired (of the weights or of another of its files), NotABaseModel.
    """
    return _files(conn, artifact_id, find_artifact)


def keep_base(conn: Connection, artifact_id: str) -> None:
    """`model_files`, which nobody deletes before the job that needs them is committed; raises the same.

    Call it before anything else is locked: it locks the export, as everybody does first who deletes one of its files.
    """
    _files(conn, artifact_id, lock_artifact)


def base_files(conn: Connection, job: Job) -> dict[str, str]:
    """`name -> sha256` of the files of a job's own base. Of a job that has not ended they are kept, expired or not."""
    assert job.base_artifact_id is not None, "its base is installed"
    weights = find_artifact(conn, job.base_artifact_id)
    return {file.name: file.sha256 for file in files_of_step(conn, weights.step_id)}


def _files(conn: Connection, artifact_id: str, find: Callable[[Connection, str], Artifact]) -> list[Artifact]:
    try:
        weights = unexpired(find(conn, artifact_id))
        merged = {step.id for step in list_steps(conn, weights.job_id) if step.step == MERGE}
        if weights.name not in WEIGHTS or weights.step_id not in merged:
            raise NotABaseModel(id=artifact_id, name=weights.name)
        if gone := deleted_files(conn, weights.step_id):
            raise ArtifactNotFound(id=f"{weights.job_id}/{gone[0]}")
        return [unexpired(file) for file in files_of_step(conn, weights.step_id)]
    except P2DError as error:
        error.errors = (ErrorDetail(code=error.code, message=error.text, pointer="/base_model"),)
        error.errors_total = 1
        raise


def _outlined(blobs: BlobStore, name: str, files: list[Artifact]) -> ModelInfo:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / name
        directory.mkdir()
        for file in files:
            place = directory / file.name
            if file.name in READ:
                blobs.fetch(file.sha256, place)
                continue
            with place.open("wb") as outline:
                if place.suffix == ".safetensors":
                    outline.write(_header(blobs, file))
                    outline.truncate(file.size_bytes)  # a hole, as long as the weights
        return read_outline(directory, digest_of({file.name: file.sha256 for file in files}))


def _header(blobs: BlobStore, file: Artifact) -> bytes:
    """The first bytes of a safetensors file: the length of its header, and the header."""
    length = b"".join(blobs.stream(file.sha256, 0, min(8, file.size_bytes)))
    end = min(8 + int.from_bytes(length, "little"), file.size_bytes)
    return length + b"".join(blobs.stream(file.sha256, 8, end)) if end > 8 else length
