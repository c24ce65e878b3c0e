"""When a step of a job takes the outputs of an earlier job's step, and what those had cost. Bytes are workers' business.

Outputs lie in the store under their hashes, so using them again is registering them again (`lifecycle.finish_step`). Which
steps, and what makes two of them equal, is `p2d.step_fingerprints`' business; docs/decisions/0015 says why so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from app.core.lifecycle import StepFacts
from app.db.artifacts import NewArtifact, list_artifacts
from app.db.engine import Connection, Json
from app.db.head_maps import get_head_map
from app.db.jobs import Job
from app.db.selections import get_selection
from app.db.steps import Step, find_step, list_steps, set_fingerprints
from p2d.config import config_from_json
from p2d.step_fingerprints import REUSABLE, step_fingerprint


@dataclass(frozen=True, kw_only=True, slots=True)
class Earlier:
    """What an equal step has made."""

    files: list[NewArtifact]
    facts: StepFacts


class Unit(Protocol):
    """A step or one shard of it, be it a row or a lease."""

    @property
    def step(self) -> str:
        """Its name."""

    @property
    def shard(self) -> int:
        """0-based."""

    @property
    def shards(self) -> int:
        """How many there are."""


def fingerprint_of(job: Job, unit: Unit, files: Mapping[str, str], *, device: str, engine: str) -> str | None:
    """The fingerprint of a step that reads these files (`name -> sha256`); None where it has none."""
    if unit.step not in REUSABLE or job.resolved is None:
        return None
    return step_fingerprint(
        unit.step,
        shard=unit.shard,
        shards=unit.shards,
        config=config_from_json(job.resolved["config"]),
        files=files,
        model=(job.base_model, job.model_digest),
        device=device,
        engine=engine,
    )


def wanted_fingerprint(job: Job, unit: Unit, files: Mapping[str, str], *, engine: str) -> str | None:
    """The fingerprint under which an earlier step would serve this one; None where none may.

    On the device that the job was planned for: what was computed on another kind of device has other numbers.
    """
    device = (job.resolved or {}).get("device")
    if device is None or job.config.get("reuse") == "never":
        return None
    return fingerprint_of(job, unit, files, device=device, engine=engine)


def note_fingerprints(conn: Connection, job: Job, *, engine: str) -> None:
    """Note on a planned job's steps what they are going to compute: of equal ones a project has one claimed at a time."""
    files = {artifact.name: artifact.sha256 for artifact in list_artifacts(conn, job.id)}
    wanted = {
        step.id: wanted_fingerprint(job, step, files, engine=engine)
        for step in list_steps(conn, job.id)
        if step.status != "done"
    }
    set_fingerprints(conn, {step_id: known for step_id, known in wanted.items() if known is not None})


def find_earlier(conn: Connection, project_id: str, fingerprint: str) -> Earlier | None:
    """The newest finished step of this fingerprint, of any job of the project that is still there.

    Never of another project: even that a thing was computed before would tell what others do.
    """
    step = find_step(conn, project_id, fingerprint)
    if step is None:
        return None
    made = [one for one in list_artifacts(conn, step.job_id) if one.step_id == step.id]
    if any(one.expired for one in made):
        return None
    files = [
        NewArtifact(name=one.name, media_type=one.media_type, sha256=one.sha256, size_bytes=one.size_bytes)
        for one in made
    ]
    facts = StepFacts(accounting=step.facts or {}, fingerprint=fingerprint, reused=_origin(step))
    return Earlier(files=files, facts=facts) if files else None


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierCosts:
    """What the parts of a job that it did not compute itself had cost."""

    files: dict[str, str]
    """`accounting-*.json` of earlier jobs, name -> sha256; those of reused steps are the job's own files."""
    reused: list[Json]
    """Entries of `steps.json`, see `p2d.accounting.Reused`."""


def earlier_costs(conn: Connection, job: Job) -> EarlierCosts:
    """Of reused steps, and of the steps that a head map or selection named by its id stands for."""
    costs = EarlierCosts(files={}, reused=[_entry(step) for step in list_steps(conn, job.id) if step.reused])
    head_map, selection = job.config["heads"]["head_map"], job.config["data"]["selection"]
    if head_map is not None and (found := get_head_map(conn, head_map)) and found.job_id:
        _add(conn, costs, found.job_id, {"heads"})  # an imported one comes without
    if selection is not None and (chosen := get_selection(conn, selection)):
        _add(conn, costs, chosen.job_id, {"respond", "select"})
    return costs


def _add(conn: Connection, costs: EarlierCosts, job_id: str, names: Collection[str]) -> None:
    made = {step.id: step for step in list_steps(conn, job_id) if step.step in names}
    for artifact in list_artifacts(conn, job_id):
        if artifact.step_id in made and artifact.name.startswith("accounting-") and not artifact.expired:
            costs.files[artifact.name] = artifact.sha256
            costs.reused.append(_entry(made[artifact.step_id]))


def _entry(step: Step) -> Json:
    return {"step": step.step, "shard": step.shard, **_origin(step)}


def _origin(step: Step) -> Json:
    """Whoever computed it: a step that was itself taken from an earlier job passes that on."""
    return step.reused or {"job_id": step.job_id, "seconds": step.seconds or 0.0}
