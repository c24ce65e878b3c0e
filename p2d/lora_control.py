"""LoRA on all linear layers and all training rows, trained in truth: what a user would do without P2D, as a control of a job.

By the same optimizer, schedule, batches and epochs as the job's own training, at the best rate that the same search finds.
`p2d.baselines` only times a few of its steps; this is the adapter itself, and costs what it costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from p2d.baselines import lora_layers
from p2d.config import JobConfig, epochs_of
from p2d.flops import LORA_RANK
from p2d.learning_rates import find_learning_rate, search_steps, watched_rows
from p2d.masters import Masters
from p2d.models import BaseModel
from p2d.optimization import Schedule, SliceTrainer, steps_per_epoch
from p2d.rendering import RenderedRow
from p2d.training import Run, watch_epoch

FIRST_RATE = 2e-3
"""Where the search begins: of 5e-4 to 8e-3 the best was 1e-3 on 160 GSM8K rows, 4e-3 to 8e-3 on fewer (docs/LOG.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraControl:
    """What was trained, and what it took."""

    learning_rate: float
    trained_parameters: int
    seconds: float
    """Search included."""


@contextmanager
def lora_control(
    base: BaseModel,
    rows: Sequence[RenderedRow],
    guide: Sequence[RenderedRow],
    config: JobConfig,
    at: Callable[[float], None],
) -> Iterator[LoraControl]:
    """Train LoRA; within the block the model is what came out, after it the base, bit for bit.

    Args:   rows: all training rows. guide: held-out rows for the search, and for choosing among epochs, as for the job itself.
            at: told which share of the steps is done.
    Raises: Diverged, OutOfMemory, whatever `at` raises.
    """
    started, settings = time.perf_counter(), config.training
    per_epoch = steps_per_epoch(len(rows), settings.batch_size)
    steps = per_epoch * epochs_of(settings)
    total = search_steps(steps) + steps
    watch = list(guide)[: watched_rows(len(rows), len(guide))]
    lora = lora_layers(base, settings.seed, r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear")
    with lora as adapters, Masters(adapters).trained() as masters:
        found = find_learning_rate(
            *(base, masters, rows, guide, config, steps, lambda done, _, __: at(done / total)), first=FIRST_RATE
        )
        trainer = SliceTrainer(
            *(base, masters, rows),
            batch_size=settings.batch_size,
            seed=str(settings.seed),
            token_budget=found.token_budget,
        )
        schedule, run = Schedule(found.learning_rate, steps), Run(found.learning_rate, found.trials, found.tokens)
        while trainer.step < steps:
            log = trainer.advance(schedule)
            if trainer.step % per_epoch == 0:
                watch_epoch(base, trainer, watch, run, epoch=log.epoch)
            at((search_steps(steps) + trainer.step) / total)
        masters.load_masters(run.kept)
        yield LoraControl(
            learning_rate=found.learning_rate,
            trained_parameters=sum(parameter.numel() for parameter in masters.parameters()),
            seconds=time.perf_counter() - started,
        )
