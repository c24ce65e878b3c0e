"""Receipts: what is answered when a thing was deleted, and the entry of the audit log that goes with it."""

from __future__ import annotations

from collections.abc import Iterable

from app.api.context import Services
from app.db.audit import Action
from app.db.engine import Connection, Json
from app.key_schemas import Deleted, DerivedView, ReceiptView

_ACTIONS: dict[Deleted, Action] = {
    "job": "job.delete",
    "dataset": "dataset.delete",
    "report": "report.delete",
    "upload": "upload.delete",
    "head_map": "head_map.delete",
    "selection": "selection.delete",
    "artifact": "artifact.delete",
}


def receipt(
    services: Services,
    conn: Connection,
    what: Deleted,
    id: str,
    hashes: Iterable[str],
    derived: DerivedView | None = None,
) -> ReceiptView:
    """The receipt for a thing that was deleted in this transaction, and had files of these sha256.

    Args: derived: of a dataset, what jobs have made of it.
    """
    sha256 = sorted(set(hashes))
    facts: Json = {"sha256": sha256}
    if derived is not None:
        facts["derived"] = {**derived.model_dump(exclude={"listed"}), "job_ids": [job.job_id for job in derived.listed]}
    entry = services.note(conn, _ACTIONS[what], id, facts)
    return ReceiptView(id=id, what=what, deleted_at=entry.created_at, sha256=sha256, audit_id=entry.id, derived=derived)
