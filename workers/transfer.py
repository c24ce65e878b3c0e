"""Files of one attempt between store and work folder: inputs and checkpoint in, outputs out. Decides nothing.

Objects are put before they are registered, so the ledger never names a file that is not there; what an attempt put and
could not register is unreferenced and harmless.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from app.blobs import BlobStore
from app.core.lifecycle import Ranking, StepFacts
from app.core.reuse import Earlier, earlier_costs
from app.db.artifacts import NewArtifact, get_artifact, list_artifacts
from app.db.attempts import list_attempts
from app.db.datasets import get_dataset
from app.db.engine import Connection
from app.db.head_maps import get_head_map
from app.db.jobs import Job
from app.db.leases import Lease
from app.db.selections import get_selection
from p2d.config import config_json
from p2d.errors import EngineError
from p2d.head_maps import HeadMap
from p2d.pipeline import is_input, spec_of
from p2d.plans import load_plan
from p2d.versions import versions

MEDIA_TYPES = {
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".safetensors": "application/octet-stream",
}


BEST_HEADS = 10
"""Heads that are named of a ranking."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkFolder:
    """The folders of one attempt on this machine."""

    root: Path

    @property
    def inputs(self) -> Path:
        """What the step reads."""
        return self.root / "inputs"

    @property
    def out(self) -> Path:
        """What the step writes."""
        return self.root / "out"

    @property
    def checkpoint(self) -> Path:
        """An earlier attempt's checkpoint."""
        return self.root / "checkpoint"

    def make(self) -> None:
        """Make all folders."""
        for folder in (self.inputs, self.out, self.checkpoint):
            folder.mkdir(parents=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What an attempt must have on disk before it starts: stored files by name, and one that the ledger itself writes."""

    stored: Mapping[str, str]
    attempts: Mapping[str, Any] | None


def inputs_of(conn: Connection, job: Job, lease: Lease) -> Inputs:
    """The files that a step reads (`name -> sha256`): the job's own, its datasets', and those of earlier jobs it names."""
    stored: dict[str, str] = {}
    for name, dataset_id in (("dataset.jsonl", job.dataset_id), ("validation.jsonl", job.validation_dataset_id)):
        dataset = get_dataset(conn, dataset_id) if dataset_id else None
        if dataset is not None:
            stored[name] = dataset.sha256
    earlier = job.config["heads"]["head_map"], job.config["data"]["selection"]
    if earlier[0] and (head_map := get_head_map(conn, earlier[0])):
        stored["head_map.json"] = head_map.sha256
    if earlier[1] and (selection := get_selection(conn, earlier[1])):
        stored["selection.jsonl"] = selection.sha256
    stored |= {artifact.name: artifact.sha256 for artifact in list_artifacts(conn, job.id)}
    if job.adapter_id is not None and (adapter := get_artifact(conn, job.adapter_id)):
        stored |= {one.name: one.sha256 for one in list_artifacts(conn, adapter.job_id)}
    steps_json = None
    if is_input(lease.step, "steps.json"):
        costs = earlier_costs(conn, job)
        stored |= costs.files
        steps_json = {
            "reused": costs.reused,
            "steps": [
                {
                    "step": attempt.step,
                    "shard": attempt.shard,
                    "attempt": attempt.token,
                    "status": attempt.outcome,
                    "seconds": attempt.seconds,
                }
                for attempt in list_attempts(conn, job.id)
                if attempt.seconds is not None
            ],
        }
    return Inputs(
        stored={name: sha256 for name, sha256 in stored.items() if is_input(lease.step, name)}, attempts=steps_json
    )


def fetch_inputs(store: BlobStore, inputs: Inputs, lease: Lease, folder: WorkFolder) -> None:
    """Bring the inputs and the checkpoint of an earlier attempt. Raises BlobMissing, BlobCorrupt, StoreUnavailable."""
    for name, sha256 in inputs.stored.items():
        if not (folder.inputs / name).exists():
            store.fetch(sha256, folder.inputs / name)
    if inputs.attempts is not None:
        (folder.inputs / "steps.json").write_text(json.dumps(inputs.attempts))
    if lease.checkpoint is not None:
        for name, sha256 in lease.checkpoint["files"].items():
            store.fetch(sha256, folder.checkpoint / name)


def all_stored(store: BlobStore, files: Sequence[NewArtifact]) -> bool:
    """Whether the store has every one of them, as long as it should be. Raises StoreUnavailable."""
    return all(store.size(file.sha256) == file.size_bytes for file in files)


def put_checkpoint(store: BlobStore, checkpoint: Path) -> dict[str, str]:
    """Store the files of a checkpoint folder; returns `name -> sha256`."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return {path.relative_to(checkpoint).as_posix(): store.put_file(path).sha256 for path in files}


def put_outputs(store: BlobStore, lease: Lease, out: Path) -> list[NewArtifact]:
    """Store what the step wrote. Raises EngineError when a file that it owes is not there, StoreUnavailable."""
    spec = spec_of(lease.step)
    written = {path.name: path for path in sorted(out.iterdir()) if path.is_file()}
    for pattern in spec.writes:
        if not any(fnmatch(name, pattern) for name in written):
            raise EngineError(f"The step {lease.step!r} wrote no {pattern}.", step=lease.step, missing=pattern)
    return list(_put(store, written, spec.writes + spec.optional_writes))


def read_facts(lease: Lease, out: Path) -> StepFacts:
    """What the ledger keeps of the outputs beside their hashes."""
    accounting = {path.stem: json.loads(path.read_bytes()) for path in sorted(out.glob("accounting-*.json"))}
    if lease.step == "validate":
        plan = load_plan(out / "plan.json")
        return StepFacts(
            accounting=accounting,
            resolved={
                "config": config_json(plan.config),
                "reasons": plan.reasons,
                "warnings": list(plan.warnings),
                "device": plan.device,
                "versions": versions(),  # of the machine that decided; the child runs on the same packages
            },
            estimate_s=plan.estimate_s,
            train=plan.train,
            warnings=tuple(plan.warnings),
        )
    if lease.step == "heads":
        return StepFacts(accounting=accounting, ranking=_ranking(out / "head_map.json"))
    if lease.step == "select":
        summary = json.loads((out / "selection_summary.json").read_bytes())
        return StepFacts(accounting=accounting, rows=summary["rows"], kept=summary["kept"])
    if lease.step == "train":
        training = json.loads((out / "training.json").read_bytes())
        return StepFacts(accounting=accounting, learning_rate=training["learning_rate"])
    return StepFacts(accounting=accounting)


def facts_again(store: BlobStore, earlier: Earlier, folder: WorkFolder) -> StepFacts:
    """The facts of an equal step, with what only its files say. Raises BlobMissing, BlobCorrupt, StoreUnavailable."""
    for file in earlier.files:
        if file.name == "head_map.json":
            store.fetch(file.sha256, folder.root / file.name)
            return replace(earlier.facts, ranking=_ranking(folder.root / file.name))
    return earlier.facts


def _ranking(path: Path) -> Ranking:
    head_map = HeadMap.load(path)
    best = head_map.ranked()[:BEST_HEADS] if head_map.ranks else []
    return Ranking(
        heads=head_map.n_layers * head_map.n_heads,
        best=[(layer, head, head_map.scores[layer][head]) for layer, head in best],
        rank_correlation=head_map.reproducibility.rank_correlation if head_map.ranks else None,
    )


def _put(store: BlobStore, written: Mapping[str, Path], patterns: tuple[str, ...]) -> Iterator[NewArtifact]:
    for name, path in written.items():
        if any(fnmatch(name, pattern) for pattern in patterns):
            blob = store.put_file(path)
            media_type = MEDIA_TYPES.get(path.suffix, "application/octet-stream")
            yield NewArtifact(name=name, media_type=media_type, sha256=blob.sha256, size_bytes=blob.size_bytes)
