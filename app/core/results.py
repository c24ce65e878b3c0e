"""What may be deleted of what jobs have made, and what else goes with it. The bytes are collected later (app.core.garbage).

Each function takes a Connection, locks first and never commits.
"""

from __future__ import annotations

from app.db.artifacts import Artifact, expire_artifact, get_artifact, is_held
from app.db.artifacts import delete_artifact as delete_artifact_row
from app.db.engine import Connection
from app.db.head_maps import delete_head_map as delete_head_map_row
from app.db.head_maps import get_head_map, lock_head_map, readers_of_head_map
from app.db.jobs import lock_job, users_of_files
from app.db.selections import delete_selection as delete_selection_row
from app.db.selections import get_selection, lock_selection, readers_of_selection
from app.errors import ArtifactNotFound, HeadMapNotFound, SelectionNotFound
from app.result_errors import ArtifactExpired, ArtifactInUse, HeadMapInUse, SelectionInUse


def delete_head_map(conn: Connection, head_map_id: str) -> list[str]:
    """Remove a head map and its file; the job that made it stays. Returns the sha256 of the file.

    Raises: HeadMapNotFound, HeadMapInUse.
    """
    found = get_head_map(conn, head_map_id)
    if found is not None and found.job_id is not None:
        lock_job(conn, found.job_id)  # first, as everybody does who changes a job's rows
    head_map = lock_head_map(conn, head_map_id)
    if head_map is None:
        raise HeadMapNotFound(id=head_map_id)
    if by := readers_of_head_map(conn, head_map):
        raise HeadMapInUse(id=head_map_id, by=by)
    delete_head_map_row(conn, head_map_id)
    if head_map.artifact_id is not None:
        delete_artifact_row(conn, head_map.artifact_id)
    return [head_map.sha256]


def delete_selection(conn: Connection, selection_id: str) -> list[str]:
    """Remove a selection and its file; the job that made it stays. Returns the sha256 of the file.

    Raises: SelectionNotFound, SelectionInUse.
    """
    found = get_selection(conn, selection_id)
    if found is not None:
        lock_job(conn, found.job_id)
    selection = lock_selection(conn, selection_id)
    if selection is None:
        raise SelectionNotFound(id=selection_id)
    if by := readers_of_selection(conn, selection):
        raise SelectionInUse(id=selection_id, by=by)
    delete_selection_row(conn, selection_id)
    delete_artifact_row(conn, selection.artifact_id)
    return [selection.sha256]


def find_artifact(conn: Connection, artifact_id: str) -> Artifact:
    """The artifact, expired or not. Raises ArtifactNotFound."""
    artifact = get_artifact(conn, artifact_id)
    if artifact is None:
        raise ArtifactNotFound(id=artifact_id)
    return artifact


def lock_artifact(conn: Connection, artifact_id: str) -> Artifact:
    """`find_artifact`; its job is locked, so that nobody changes it until the transaction ends. Raises ArtifactNotFound."""
    lock_job(conn, find_artifact(conn, artifact_id).job_id)
    return find_artifact(conn, artifact_id)


def unexpired(artifact: Artifact) -> Artifact:
    """The artifact again. Raises ArtifactExpired."""
    if artifact.expired:
        raise ArtifactExpired(id=artifact.id, expires_at=artifact.expires_at)
    return artifact


def delete_artifact(conn: Connection, artifact_id: str) -> list[str]:
    """Remove a file of a job that has ended; its job stays. Returns its sha256.

    Raises: ArtifactNotFound, ArtifactInUse.
    """
    artifact = _free(conn, artifact_id)
    delete_artifact_row(conn, artifact_id)
    return [artifact.sha256]


def set_ttl(conn: Connection, artifact_id: str, ttl_s: int | None) -> Artifact:
    """Let a file of a job that has ended expire in so many seconds, or never.

    Raises: ArtifactNotFound, ArtifactExpired, ArtifactInUse.
    """
    unexpired(_free(conn, artifact_id))
    return expire_artifact(conn, artifact_id, ttl_s)


def _free(conn: Connection, artifact_id: str) -> Artifact:
    """The artifact of a job, which is locked, that nobody needs any more."""
    job = lock_job(conn, find_artifact(conn, artifact_id).job_id)
    artifact = find_artifact(conn, artifact_id)
    assert job is not None
    if by := ([] if job.is_final else [job.id]) + users_of_files(conn, job.id):
        raise ArtifactInUse(id=artifact_id, by=by)
    if is_held(conn, artifact_id):
        raise ArtifactInUse(id=artifact_id, by=[])
    return artifact
