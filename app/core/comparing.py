"""What jobs left behind, read from the store for a comparison. The arithmetic is p2d.comparison's; nothing is written."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.blobs import BlobStore
from app.db.artifacts import list_artifacts
from app.db.engine import Connection
from app.db.head_maps import get_head_map
from app.db.jobs import Job, get_job
from app.db.selections import get_selection
from app.errors import BlobCorrupt, BlobMissing
from p2d.comparison import Facts, RowLosses
from p2d.head_maps import HeadMap

FILES = ("head_map.json", "selection.jsonl", "training.json", "evaluation.json", "row_losses.json", "report.json")
"""What a comparison reads of a job."""

_KEPT = re.compile(rb'"kept"\s*:\s*true')
"""The field of a kept row, without parsing the line: inside a row's text the quotes are escaped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """One job of a comparison as the ledger knows it."""

    id: str
    job: Job | None
    """None: deleted since."""
    files: Mapping[str, tuple[str, int]]
    """sha256 and size by name; of an earlier job where it named that job's head map or selection."""


def compared(conn: Connection, job_ids: Sequence[str]) -> list[Compared]:
    """The jobs and where their files are."""
    return [_compared(conn, job_id) for job_id in job_ids]


def _compared(conn: Connection, job_id: str) -> Compared:
    job = get_job(conn, job_id)
    if job is None:
        return Compared(id=job_id, job=None, files={})
    files = {one.name: (one.sha256, one.size_bytes) for one in list_artifacts(conn, job_id) if one.name in FILES}
    # An export has neither heads nor rows of its own.
    named = job.config.get("heads", {}).get("head_map"), job.config.get("data", {}).get("selection")
    if named[0] and (head_map := get_head_map(conn, named[0])):
        files["head_map.json"] = head_map.sha256, head_map.size_bytes
    if named[1] and (selection := get_selection(conn, named[1])):
        files["selection.jsonl"] = selection.sha256, selection.size_bytes
    return Compared(id=job_id, job=job, files=files)


def read_facts(blobs: BlobStore, one: Compared) -> tuple[Facts, list[str]]:
    """What a job left behind, and the names of the files that it does not have. Raises StoreUnavailable."""
    if one.job is None:
        return Facts(id=one.id, name="", config={}), list(FILES)
    job, reader = one.job, _Reader(blobs, one.files)
    config = (job.resolved or {}).get("config") or job.config
    facts = Facts(id=job.id, name=job.name, config={**config, "base_model": job.base_model, "dataset": job.dataset_id})
    head_map = reader.head_map()
    evaluation, training, report = (reader.json(f"{name}.json") or {} for name in ("evaluation", "training", "report"))
    losses = reader.json("row_losses.json")
    return replace(
        facts,
        head_map=head_map,
        heads=head_map.top(config["heads"]["ratio"]) if head_map and "heads" in config else None,
        kept=reader.kept(),
        log=training.get("log"),
        losses=losses and RowLosses(**{name: losses[name] for name in ("rows_hash", "tokens", "before", "after")}),
        evaluation=evaluation,
        training=training,
        cost=report.get("cost") or {},
    ), sorted(reader.missing)


class _Reader:
    """Reads the files of one job, and remembers which are not there."""

    def __init__(self, blobs: BlobStore, files: Mapping[str, tuple[str, int]]) -> None:
        self._blobs, self._files = blobs, files
        self.missing = set(FILES) - files.keys()

    def json(self, name: str) -> Any:
        """A file's value, or None."""
        content = self._bytes(name)
        return None if content is None else json.loads(content)

    def head_map(self) -> HeadMap | None:
        content = self._bytes("head_map.json")
        if content is None:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "head_map.json"
            path.write_bytes(content)
            return HeadMap.load(path)

    def kept(self) -> frozenset[bytes] | None:
        """Keys of the kept rows: by their text, so that other datasets with the same rows count."""
        if "selection.jsonl" not in self._files:
            return None
        try:
            lines = self._blobs.lines(*self._files["selection.jsonl"])
            return frozenset(_key(json.loads(line)) for _, line in lines if _KEPT.search(line))
        except (BlobMissing, BlobCorrupt):
            self.missing.add("selection.jsonl")
            return None

    def _bytes(self, name: str) -> bytes | None:
        if name not in self._files:
            return None
        try:
            return b"".join(self._blobs.checked(self._files[name][0]))
        except (BlobMissing, BlobCorrupt):
            self.missing.add(name)
            return None


def _key(row: Mapping[str, Any]) -> bytes:
    text = json.dumps([row.get("prompt"), row.get("answer")]).encode()
    return hashlib.blake2b(text, digest_size=16).digest()
