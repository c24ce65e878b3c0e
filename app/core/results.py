"""What may be deleted of what jobs have made, and what else goes with it. The bytes are collected later (app.core.garbage).

Each function takes a Connection, locks first and never commits.
"""

from __future__ import annotations

from app.db.artifacts import delete_artifact
from app.db.engine import Connection
from app.db.head_maps import delete_head_map as delete_head_map_row
from app.db.head_maps import get_head_map, lock_head_map, readers_of_head_map
from app.db.jobs import lock_job
from app.db.selections import delete_selection as delete_selection_row
from app.db.selections import get_selection, lock_selection, readers_of_selection
from app.errors import HeadMapNotFound, SelectionNotFound
from app.result_errors import HeadMapInUse, SelectionInUse


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
        delete_artifact(conn, head_map.artifact_id)
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
    delete_artifact(conn, selection.artifact_id)
    return [selection.sha256]
