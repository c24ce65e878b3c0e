"""Stage 3: train head slices: find the rate, loop over epochs, watch held-out rows, resume bit-exactly from a checkpoint.

One optimizer step is `p2d.optimization`, the search for the rate `p2d.learning_rates`; which heads and rows are trained is
decided elsewhere. No random state exists: a run follows from its inputs and the seed alone.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from p2d.activation_cache import remember_below
from p2d.batches import TOKEN_BUDGET, mean_answer_nll
from p2d.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from p2d.config import JobConfig, epochs_of, rank_of
from p2d.errors import Diverged
from p2d.learning_rates import Found, Searched, Trial, find_learning_rate, search_steps, watched_rows
from p2d.memory_guard import memory_guard
from p2d.models import BaseModel
from p2d.optimization import Schedule, SliceTrainer, StepLog, steps_per_epoch
from p2d.pipeline import Progress
from p2d.rendering import RenderedRow
from p2d.slices import Head, HeadSlices

CHECKPOINT_FORMAT = 2
"""Of what a checkpoint holds; one of another format is not resumed."""

CHECKPOINT_S = 60.0
"""Seconds between checkpoints; the end of an epoch writes one too. Never changes the result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """What training made and what it cost."""

    state: dict[str, Tensor]
    """Trained slices as they stand in the weights, `layers.{l}.{projection}`, of the kept epoch."""
    log: list[StepLog]
    learning_rate: float
    trials: list[Trial]
    """Empty if the rate was given."""
    watched: list[float]
    """Held-out loss after each epoch, on `watched_rows` rows; empty without held-out rows."""
    watched_rows: int
    kept_epoch: int
    """0-based epoch whose slices were kept: the last, unless an earlier one had the lower held-out loss."""
    steps: int
    tokens: int
    """Of all optimizer steps, trials included, without padding."""
    n_parameters: int
    """Trained numbers: weights, or with a rank factors."""
    remembered_below: int
    """Layers below this one ran once for each row, not once for each pass; 0 = none are below, or no row was seen twice."""
    rank: int | None
    token_budget: int
    """Tokens of a micro-batch at the end: less than at the start if memory ran out. Loss and gradient are the same."""
    warnings: list[str]
    """What a user should know of the run."""
    seconds: float
    """Of this attempt, search included."""
    search_seconds: float
    resumed_step: int
    """Step that this attempt began at; 0 = from the start."""


@dataclass(slots=True)
class Run:
    """Where a training run stands; all of it goes into every checkpoint."""

    learning_rate: float
    trials: list[Trial]
    tokens: int
    warnings: list[str] = field(default_factory=list)
    log: list[StepLog] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    kept_epoch: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)

    def add(self, log: StepLog) -> None:
        """Note one more step."""
        self.log.append(log)
        self.tokens += log.tokens


def train(
    base: BaseModel,
    rows: Sequence[RenderedRow],
    guide: Sequence[RenderedRow],
    heads: Sequence[Head],
    config: JobConfig,
    progress: Progress,
    *,
    checkpoint_dir: Path | None = None,
    resume_from: Path | None = None,
    on_checkpoint: Callable[[Path], None] = lambda directory: None,
) -> TrainingResult:
    """Train the slices of `heads` on `rows`; the base model is back, bit for bit, when this returns or raises.

    Args:    guide: held-out rows for the rate search and for watching epochs; may be empty if the rate is given.
             resume_from: a checkpoint of the same run; one of another run, or a broken one, is not used.
             on_checkpoint: told of each checkpoint written under `checkpoint_dir`.
    Raises:  Diverged, OutOfMemory, whatever `progress` raises.
    """
    started = time.perf_counter()
    settings = config.training
    assert settings.slices != "auto", "resolve the config first"
    per_epoch = steps_per_epoch(len(rows), settings.batch_size)
    steps = per_epoch * epochs_of(settings)
    searching = search_steps(steps) if settings.learning_rate == "auto" else 0
    watch = list(guide)[: watched_rows(len(rows), len(guide))]
    identity = run_identity(base, rows, guide, heads, config)
    # Layers below the shallowest chosen one are worth remembering as soon as a row is seen twice.
    below = min(heads)[0] if epochs_of(settings) > 1 or searching else 0
    with (
        HeadSlices(base, heads, settings.slices, rank_of(settings), seed=settings.seed) as slices,
        remember_below(base, below, checkpoint_dir),
    ):
        trainer = SliceTrainer(base, slices, rows, batch_size=settings.batch_size, seed=str(settings.seed))
        run = _resumed(resume_from, identity, trainer)
        if not isinstance(run, Run):
            if settings.learning_rate == "auto":
                found = find_learning_rate(
                    *(base, slices, rows, guide, config, steps, _shifted(progress, 0, steps + searching)),
                    known=run,
                    on_trial=partial(_save_search, checkpoint_dir, on_checkpoint, identity),
                )
                run = _begun(found, trainer)
            else:
                run = Run(settings.learning_rate, [], 0)
            _save(checkpoint_dir, on_checkpoint, identity, trainer, run)
        resumed_step, searched_s = trainer.step, time.perf_counter() - started
        schedule = Schedule(run.learning_rate, steps)
        saved = time.monotonic()
        while trainer.step < steps:
            log = trainer.advance(schedule)
            run.add(log)
            epoch_ends = trainer.step % per_epoch == 0
            if epoch_ends:
                watch_epoch(base, trainer, watch, run, epoch=log.epoch)
            if trainer.step < steps and (epoch_ends or time.monotonic() - saved > CHECKPOINT_S):
                _save(checkpoint_dir, on_checkpoint, identity, trainer, run)
                saved = time.monotonic()
            progress(searching + trainer.step, searching + steps, _metrics(log, run))
        slices.load_masters(run.kept)
        state, n_parameters = slices.state(), slices.n_parameters
    return TrainingResult(
        state=state,
        log=run.log,
        learning_rate=run.learning_rate,
        trials=run.trials,
        watched=run.watched,
        watched_rows=len(watch),
        kept_epoch=run.kept_epoch,
        steps=steps,
        tokens=run.tokens,
        n_parameters=n_parameters,
        remembered_below=below,
        rank=rank_of(settings),
        token_budget=trainer.token_budget,
        warnings=run.warnings + _memory_warning(trainer.token_budget),
        seconds=time.perf_counter() - started,
        search_seconds=searched_s if run.trials and not resumed_step else 0.0,
        resumed_step=resumed_step,
    )


def run_identity(
    base: BaseModel, rows: Sequence[RenderedRow], guide: Sequence[RenderedRow], heads: Sequence[Head], config: JobConfig
) -> str:
    """Sha256 over everything that decides a training run; a checkpoint of another run is not resumed."""
    model = (base.info.digest, str(base.dtype), base.renderer.prefix_ids)
    facts = (CHECKPOINT_FORMAT, *model, sorted(heads), asdict(config.training))
    digest = hashlib.sha256(repr(facts).encode())
    for row in (*rows, *guide):
        digest.update(repr((row.prompt_ids, row.answer_ids)).encode())
    return digest.hexdigest()


def _begun(found: Found, trainer: SliceTrainer) -> Run:
    """The run at the rate that was found, with what of the memory's budget the search has left."""
    trainer.token_budget = found.token_budget
    return Run(found.learning_rate, found.trials, found.tokens, _border_warning(found))


def _border_warning(found: Found) -> list[str]:
    if not found.at_border:
        return []
    end = "lowest" if found.learning_rate == min(trial.learning_rate for trial in found.trials) else "highest"
    return [
        f"The best learning rate, {found.learning_rate:.3g}, is the {end} that was tried: a better one may lie beyond."
    ]


def _memory_warning(token_budget: int) -> list[str]:
    if token_budget == TOKEN_BUDGET:
        return []
    return [
        f"Memory ran out: rows were computed in micro-batches of at most {token_budget} tokens, to the same gradient."
    ]


def watch_epoch(base: BaseModel, trainer: SliceTrainer, watch: Sequence[RenderedRow], run: Run, *, epoch: int) -> None:
    """Look at held-out rows after an epoch and keep its slices unless an earlier epoch did better.

    Raises: Diverged if their loss is not finite: the epoch's last update, which no step looks at, can be what breaks it.
    """
    if watch:
        with memory_guard("looking at held-out rows"):
            loss = mean_answer_nll(base, watch, token_budget=trainer.token_budget)
        if not math.isfinite(loss):
            raise Diverged(f"The loss of held-out rows was not finite after epoch {epoch + 1}.", step=trainer.step)
        run.watched.append(loss)
    if not watch or run.watched[-1] <= min(run.watched):
        run.kept_epoch, run.kept = epoch, trainer.slices.masters()


def _metrics(log: StepLog, run: Run) -> dict[str, float]:
    metrics = {
        "loss": log.loss,
        "learning_rate": log.learning_rate,
        "grad_norm": log.grad_norm,
        "tokens": float(run.tokens),
    }
    return metrics | ({"guide_loss": run.watched[-1]} if run.watched else {})


def _shifted(progress: Progress, offset: int, total: int) -> Progress:
    return lambda done, _, metrics: progress(offset + done, total, metrics)


def _save(
    parent: Path | None, announce: Callable[[Path], None], identity: str, trainer: SliceTrainer, run: Run
) -> None:
    if parent is None:
        return
    tensors = trainer.state() | {f"kept.{key}": value for key, value in run.kept.items()}
    facts = {
        "identity": identity,
        "learning_rate": run.learning_rate,
        "trials": [asdict(trial) for trial in run.trials],
        "tokens": run.tokens,
        "token_budget": trainer.token_budget,
        "warnings": run.warnings,
        "log": [asdict(log) for log in run.log],
        "watched": run.watched,
        "kept_epoch": run.kept_epoch,
    }
    announce(save_checkpoint(parent, Checkpoint(trainer.step, tensors, facts)))


def _save_search(parent: Path | None, announce: Callable[[Path], None], identity: str, searched: Searched) -> None:
    if parent is not None:
        facts = {"identity": identity, "learning_rate": None, **asdict(searched)}
        announce(save_checkpoint(parent, Checkpoint(0, {}, facts)))


def _resumed(directory: Path | None, identity: str, trainer: SliceTrainer) -> Run | Searched | None:
    """Where an earlier attempt of this very run stood, loaded into the trainer, or how far its search; None = start over."""
    checkpoint = load_checkpoint(directory) if directory is not None else None
    if checkpoint is None or checkpoint.facts["identity"] != identity:
        return None
    facts = checkpoint.facts
    trials = [Trial(**trial) for trial in facts["trials"]]
    if facts["learning_rate"] is None:
        return Searched(trials, facts["tokens"], facts["token_budget"])
    trainer.load_state(checkpoint.step, checkpoint.tensors)
    trainer.token_budget = facts["token_budget"]  # other micro-batches would sum in another order
    return Run(
        learning_rate=facts["learning_rate"],
        trials=trials,
        tokens=facts["tokens"],
        warnings=list(facts["warnings"]),
        log=[StepLog(**log) for log in facts["log"]],
        watched=list(facts["watched"]),
        kept_epoch=facts["kept_epoch"],
        kept={key.removeprefix("kept."): value for key, value in checkpoint.tensors.items() if key.startswith("kept.")},
    )
