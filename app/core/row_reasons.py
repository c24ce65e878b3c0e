"""Why a row of a selection was kept or dropped: gathers from ledger and store what `p2d.selection_reasons` adds up.

What was deleted since is named, not guessed: then the score is told without its parts.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.blobs import BlobStore
from app.db.artifacts import Artifact, list_artifacts
from app.db.engine import Connection
from app.db.head_maps import get_head_map
from app.db.jobs import find_job
from app.db.selections import SelectionRecord
from app.db.steps import list_steps
from p2d.head_maps import HeadMap
from p2d.pipeline import shard_range
from p2d.response_matrix import load_shard
from p2d.rows import Row, stored_row
from p2d.selection_reasons import RowReason, explain
from p2d.selection_table import SelectionTable


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Objects of the job that made a selection, by sha256; None where they are not known any more."""

    head_map: str | None
    ratio: float
    """Share of heads that the job chose."""
    shard: str | None
    """Responses to the rows of the shard that has the row."""
    rows: Artifact | None
    """Every row's text, in the order of the selection."""
    index: str | None
    """The place of each row in `rows`."""
    missing: tuple[str, ...]
    """Names of what is not there."""


def sources_of(conn: Connection, selection: SelectionRecord, row: int) -> Sources:
    """Where the parts of a row's score are."""
    job = find_job(conn, selection.job_id)
    files = {artifact.name: artifact for artifact in list_artifacts(conn, job.id) if not artifact.expired}
    shards = sum(step.step == "respond" for step in list_steps(conn, job.id))
    shard = next(i for i in range(shards) if row in shard_range(selection.rows, i, shards))
    named = job.config["heads"]["head_map"]
    earlier = get_head_map(conn, named) if named else None
    made = files.get("head_map.json")
    head_map = earlier.sha256 if earlier else made.sha256 if made else None
    responses = files.get(f"responses-{shard:05d}.safetensors")
    index = files.get("rows.index")
    there = {"head_map.json": head_map, f"responses-{shard:05d}.safetensors": responses}
    return Sources(
        head_map=head_map,
        ratio=(job.resolved or {}).get("config", job.config)["heads"]["ratio"],
        shard=responses.sha256 if responses else None,
        rows=files.get("rows.jsonl"),
        index=index.sha256 if index else None,
        missing=tuple(name for name, found in there.items() if found is None),
    )


def reason_of(blobs: BlobStore, sources: Sources, row: int) -> RowReason | None:
    """What the row's score is made of; None where it merely was not scored, or a part is gone. Raises BlobMissing."""
    if sources.head_map is None or sources.shard is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        head_map, shard = Path(folder) / "head_map.json", Path(folder) / "responses.safetensors"
        blobs.fetch(sources.head_map, head_map)
        blobs.fetch(sources.shard, shard)
        return explain(load_shard(shard), row, HeadMap.load(head_map).top(sources.ratio))


def text_of(blobs: BlobStore, sources: Sources, row: int) -> Row | None:
    """The row itself, kept or not; None where the rows are gone, or lie without an index."""
    if sources.rows is None or sources.index is None:
        return None
    places = b"".join(blobs.stream(sources.index, 8 * row, 8 * row + 16))
    start = int.from_bytes(places[:8], sys.byteorder)
    end = int.from_bytes(places[8:], sys.byteorder) if len(places) == 16 else sources.rows.size_bytes
    return stored_row(json.loads(b"".join(blobs.stream(sources.rows.sha256, start, end))))


def nearest(table: SelectionTable, row: int, kept: int) -> tuple[int | None, int | None]:
    """The kept and the dropped row that are nearest in rank to a row, itself left out; the better one where two are.

    Rows that were not scored are nobody's neighbours. Args: kept: how many rows are kept.
    """
    rank = int(table.rank_R[row])
    best_kept = _closest(range(kept), rank)
    best_dropped = _closest(range(kept, table.scored), rank)
    return _row(table, best_kept), _row(table, best_dropped)


def _closest(ranks: Sequence[int], rank: int) -> int | None:
    beside = [at for at in (rank - 1, rank + 1) if at in ranks]
    if beside or rank in ranks or not ranks:
        return min(beside, default=None)
    return ranks[0] if rank < ranks[0] else ranks[-1]


def _row(table: SelectionTable, rank: int | None) -> int | None:
    return None if rank is None else int(table.row_by_rank[rank])
