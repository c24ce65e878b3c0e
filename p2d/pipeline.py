"""A job as steps: the file to read first. Plans the steps of a job and runs one of them. No torch until a step needs it.

    validate ──> heads ────> select ──> train ──> evaluate ──> package
           └──> respond ×n ──┘

A step is a pure function of files: it reads fixed names from `inputs/` and writes fixed names to `out/` (see STEPS).
That is the whole seam between the engine and the service: the worker's child calls `run_step` with files fetched from
the store, `p2d.jobs` calls it with folders on this machine, and both make the same files. What a step does inside is in
`p2d.steps`; this file knows no leases, no HTTP and no database.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from p2d.config import JobConfig, Precision
from p2d.memory_guard import memory_guard
from p2d.model_info import read_model_info
from p2d.registry import load

if TYPE_CHECKING:
    from p2d.models import BaseModel


SHARD_ROWS = 2000
"""Most rows of one `respond` step. Part of the result, by groups and batches that never cross a shard: the service's setting
takes it as its default, so that a job has the same bytes with and without the service. What a kill costs at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSpec:
    """What one step reads and writes; a name with `*` is a pattern over the shards of an earlier step."""

    stage: str
    """Stage of the job while this step runs, as clients see it."""
    reads: tuple[str, ...]
    optional_reads: tuple[str, ...] = ()
    writes: tuple[str, ...]
    optional_writes: tuple[str, ...] = ()
    needs_model: bool
    """Whether the step loads the base weights (and so prefers a worker that has them warm)."""
    needs_tokenizer: bool = False
    """Whether the step opens the model's directory at all."""


STEPS: Mapping[str, StepSpec] = {
    "validate": StepSpec(
        stage="validating",
        reads=("dataset.jsonl",),
        optional_reads=("validation.jsonl", "head_map.json"),  # the latter where it is given
        writes=("rows.jsonl", "guide.jsonl", "evaluation.jsonl", "plan.json", "accounting-validate.json"),
        optional_writes=("rows.index",),
        needs_model=False,
        needs_tokenizer=True,
    ),
    "heads": StepSpec(
        stage="identifying_heads",
        reads=("rows.jsonl", "guide.jsonl", "plan.json"),
        optional_reads=("rows.index",),
        writes=("head_map.json", "accounting-heads.json"),
        needs_model=True,
        needs_tokenizer=True,
    ),
    "respond": StepSpec(
        stage="selecting_data",
        reads=("rows.jsonl", "guide.jsonl", "plan.json"),
        optional_reads=("rows.index",),
        writes=("responses-*.safetensors", "accounting-respond-*.json"),
        needs_model=True,
        needs_tokenizer=True,
    ),
    "select": StepSpec(
        stage="selecting_data",
        reads=("rows.jsonl", "plan.json", "head_map.json", "responses-*.safetensors"),
        optional_reads=("rows.index",),
        writes=("selection.jsonl", "selection_summary.json", "accounting-select.json"),
        needs_model=False,
    ),
    "train": StepSpec(
        stage="training",
        reads=("guide.jsonl", "plan.json", "head_map.json", "selection.jsonl"),
        writes=("heads.safetensors", "manifest.json", "training.json", "accounting-train.json"),
        needs_model=True,
        needs_tokenizer=True,
    ),
    "evaluate": StepSpec(
        stage="evaluating",
        reads=(
            "rows.jsonl",
            "guide.jsonl",
            "evaluation.jsonl",
            "plan.json",
            "head_map.json",
            "selection.jsonl",
            "heads.safetensors",
            "manifest.json",
        ),
        optional_reads=("rows.index",),
        writes=("evaluation.json", "row_losses.json", "accounting-evaluate.json"),
        needs_model=True,
        needs_tokenizer=True,
    ),
    "package": StepSpec(
        stage="packaging",
        reads=("plan.json", "accounting-*.json"),
        optional_reads=(
            "head_map.json",
            "selection_summary.json",
            "manifest.json",
            "training.json",
            "evaluation.json",
            "steps.json",
        ),
        writes=("report.json", "accounting-package.json"),
        needs_model=False,
    ),
}
"""Every step by name, in the order of the stages. `steps.json` is not another step's output: whoever runs the steps
writes it (see `p2d.accounting.Attempt`), so that failed attempts count in the cost."""


EXPORTS: Mapping[str, StepSpec] = {
    "merge": StepSpec(
        stage="packaging",
        reads=("heads.safetensors", "manifest.json"),
        writes=("config.json", "tokenizer.json", "*.safetensors", "accounting-merge.json"),
        optional_writes=("*.json", "*.jinja", "*.model", "LICENSE*", "README.md"),
        needs_model=False,
        needs_tokenizer=True,
    ),
    "export_peft": StepSpec(
        stage="packaging",
        reads=("heads.safetensors", "manifest.json"),
        writes=("adapter_config.json", "adapter_model.safetensors", "accounting-export_peft.json"),
        needs_model=False,
        needs_tokenizer=True,
    ),
}
"""Steps that bring a head adapter into another form, whenever somebody asks: no part of the job that trained it."""


def spec_of(step: str) -> StepSpec:
    """What a step of a job, or an export, reads and writes."""
    return STEPS[step] if step in STEPS else EXPORTS[step]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedStep:
    """One step of a job, or one shard of it, and the steps it waits for (all shards of each)."""

    step: str
    shard: int = 0
    shards: int = 1
    after: tuple[str, ...] = ()


def plan_steps(config: JobConfig, rows: int, shard_rows: int) -> list[PlannedStep]:
    """The steps of a job in an order that respects `after`.

    An earlier head map or selection named in the config replaces the steps that would make it: whoever runs the plan
    puts `head_map.json` or `selection.jsonl` among the inputs. `heads` and `respond` do not wait for each other.

    Args:    rows: of the dataset. shard_rows: most rows of one `respond` shard.
    """
    find_heads = config.heads.head_map is None
    select = config.kind != "identify_heads" and config.data.selection is None
    plan = [PlannedStep(step="validate")]
    last: tuple[str, ...] = ("validate",)
    if find_heads:
        plan.append(PlannedStep(step="heads", after=("validate",)))
        last = ("heads",)
    if select:
        shards = shard_count(rows, shard_rows)
        plan += [PlannedStep(step="respond", shard=i, shards=shards, after=("validate",)) for i in range(shards)]
        plan.append(PlannedStep(step="select", after=("heads", "respond") if find_heads else ("respond",)))
        last = ("select",)
    if config.kind == "adapt":
        plan.append(PlannedStep(step="train", after=last))
        plan.append(PlannedStep(step="evaluate", after=("train",)))
        last = ("evaluate",)
    plan.append(PlannedStep(step="package", after=last))
    return plan


def shard_count(rows: int, shard_rows: int) -> int:
    """How many `respond` shards there are of that many rows, at most `shard_rows` each; one of none."""
    return max(1, -(-rows // shard_rows))


def shard_range(rows: int, shard: int, shards: int) -> range:
    """The rows of one shard: contiguous, disjoint, together all of them; sizes differ by at most one."""
    return range(rows * shard // shards, rows * (shard + 1) // shards)


def is_input(step: str, name: str) -> bool:
    """Whether a file of this name belongs into the `inputs/` of a step."""
    spec = spec_of(step)
    return any(fnmatch(name, pattern) for pattern in spec.reads + spec.optional_reads)


class Progress(Protocol):
    """Told after every batch of a step; may raise Cancelled to stop it there."""

    def __call__(self, done: int, total: int, metrics: Mapping[str, float], /) -> None: ...


def no_progress(done: int, total: int, metrics: Mapping[str, float], /) -> None:
    """For callers that do not watch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCall:
    """Everything that a step needs to run."""

    step: str
    shard: int = 0
    shards: int = 1
    config: JobConfig
    """As asked for; later steps use the resolved one that `validate` wrote to plan.json."""
    model_dir: Path
    inputs: Path
    out: Path
    checkpoint: Path | None = None
    """A folder with an earlier checkpoint of this very step: `train` goes on from it."""
    device: str = "auto"
    shard_rows: int = SHARD_ROWS
    """Most rows of one `respond` shard: `validate` foresees as many passes over the guide as there are shards."""


@dataclass(slots=True)
class ModelCache:
    """Keeps the last base model loaded between steps. Every step leaves its weights bit-identical."""

    _key: tuple[str, str, str, str] | None = field(default=None, init=False)
    _base: BaseModel | None = field(default=None, init=False)

    def get(self, model_dir: Path, *, precision: Precision, device: str) -> tuple[BaseModel, float]:
        """The base model and the seconds that loading took: 0.0 when it was warm."""
        # The digest, which costs a look at the files' times: a directory can hold another model by now.
        key = (str(model_dir.resolve()), read_model_info(model_dir).digest, precision, device)
        if self._base is not None and self._key == key:
            return self._base, 0.0
        started = time.perf_counter()
        self.drop()  # first, so that two models are never in memory at once
        # By name, like a registry: an import statement here would tie planning (and so the service) to torch.
        load_base_model = import_module("p2d.models").load_base_model
        self._base = load_base_model(model_dir, precision=precision, device=device)
        assert self._base is not None
        self._key = (key[0], self._base.info.digest, precision, device)
        return self._base, time.perf_counter() - started

    def drop(self) -> None:
        """Forget the model, for example after a step failed half-way with it."""
        self._key = self._base = None


def run_step(
    call: StepCall,
    *,
    progress: Progress = no_progress,
    models: ModelCache,
    on_checkpoint: Callable[[Path], None] | None = None,
) -> None:
    """Run one step: read `call.inputs`, write `call.out`.

    Args:    on_checkpoint: called with each complete checkpoint folder (under `out/checkpoint/`) that `train` writes.
    Raises:  P2DError for everything a user may see, OutOfMemory among it; Cancelled when `progress` raised it.
    """
    body: Callable[[StepCall, Progress, ModelCache, Callable[[Path], None] | None], None]
    body = load(_BODIES, call.step, what="step", pointer="/step")
    call.out.mkdir(parents=True, exist_ok=True)
    finished = False
    try:
        with memory_guard(f"running the stage {spec_of(call.step).stage!r}"):
            body(call, progress, models, on_checkpoint)
        finished = True
    finally:
        if not finished:
            models.drop()  # whatever it was doing to the weights, the next step starts from the files


_BODIES = {step: f"p2d.steps:{step}" for step in (*STEPS, *EXPORTS)}
