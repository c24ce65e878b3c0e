"""One cell of the matrix: an arm on a pool with a seed and a rate; computed once, then read from where it was written.

A cell's name is a hash of all that decides it, so a new arm, pool or seed costs itself alone, and a run that was cut goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.arms import Arm
from benchmarks.quality.graphs import GraphedTrainer
from benchmarks.quality.measures import Measured, Measures
from benchmarks.quality.pools import Pool, Task
from benchmarks.quality.stages import StageCost, Stages, choosing_code
from benchmarks.quality.weights import installed
from p2d import flops
from p2d.activation_cache import remember_below
from p2d.errors import Diverged
from p2d.learning_rates import MARGIN
from p2d.model_info import ModelInfo
from p2d.models import BaseModel
from p2d.optimization import Schedule, SliceTrainer, Trainable, steps_per_epoch
from p2d.rendering import RenderedRow
from p2d.slices import Head

FORMAT = 2
"""Of a cell: raised when the way of computing one changes, so that old ones are computed anew."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What came out."""

    pool: str
    arm: str
    seed: int
    rate: float
    diverged: bool
    validation: float | None
    """Loss on the validation rows, by which rates are chosen; None if it diverged."""
    rows: int
    bad: float
    """Share of the chosen rows that are known to be bad."""
    heads: int
    parameters: int
    train_s: float
    """Seconds of the processor (of the wall on a GPU)."""
    train_flops: float
    stages: list[StageCost]
    measured: Measured | None
    """None if it diverged, or lost the search for the rate: then nobody asks."""
    load: float
    """Programs that wanted a processor when the cell was done, this one among them: where they outnumber the processors, seconds
    mislead."""
    workers: int
    """Processes that shared the device: where there are several, seconds mislead."""

    @property
    def seconds(self) -> float:
        """Choosing and training."""
        return self.train_s + sum(stage.seconds for stage in self.stages)

    @property
    def flops(self) -> float:
        """The same in operations."""
        return self.train_flops + sum(stage.flops for stage in self.stages)


class Cells:
    """The cells that are there, in one JSON file, a line each, written after each."""

    def __init__(self, path: Path) -> None:
        """Read what is there. Raises ValueError if that are no cells."""
        self._path = path
        try:
            stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            self._cells = {key: _cell(value) for key, value in stored.get("cells", {}).items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} does not hold cells of an earlier run: {error!r}. Move it away, or name another folder by --out."
            ) from error
        self.facts: dict[str, Any] = stored.get("facts", {})
        """What a reader needs to know about the run: model, machine, commands."""

    def get(self, key: str) -> Cell | None:
        """A cell by its name."""
        return self._cells.get(key)

    def of(self, pool: str) -> list[Cell]:
        """All that were ever computed of a pool, by whatever code and options."""
        return [cell for cell in self._cells.values() if cell.pool == pool]

    def add(self, key: str, cell: Cell) -> None:
        """Know it, in this process alone."""
        self._cells[key] = cell

    def put(self, key: str, cell: Cell) -> None:
        """Write it down."""
        self.add(key, cell)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{json.dumps(key)}: {json.dumps(asdict(cell))}" for key, cell in self._cells.items()]
        text = f'{{"facts": {json.dumps(self.facts)}, "cells": {{\n' + ",\n".join(lines) + "\n}}"
        part = self._path.with_suffix(".part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(self._path)


def _cell(value: dict[str, Any]) -> Cell:
    stages = [StageCost(**stage) for stage in value.pop("stages")]
    measured = value.pop("measured")
    return Cell(**value, stages=stages, measured=None if measured is None else Measured(**measured))


@dataclass(frozen=True, slots=True)
class Missing:
    """A cell that is none: there was no time for it, or it diverged."""

    pool: str
    arm: str
    seed: int
    rate: float

    def __str__(self) -> str:
        return f"{self.arm}, {self.pool}, seed {self.seed}, rate {self.rate:g}"


@dataclass(slots=True)
class Laboratory:
    """Everything that computes a cell: model, pool, validation rows, measures."""

    base: BaseModel
    pool: Pool
    task: Task
    stages: Stages
    measures: Measures
    cells: Cells
    say: Callable[[str], None]
    batch_size: int = 4
    """Rows of an optimizer step, of every arm."""
    workers: int = 1
    """Processes that compute cells on this device, this one among them."""
    ends: float = math.inf
    """No cell is begun after this time (`time.monotonic`)."""
    skipped: list[Missing] = field(default_factory=list)
    """There was no time for these."""
    diverged: list[Missing] = field(default_factory=list)

    def key(self, arm: Arm, seed: int, rate: float) -> str:
        """Hash of all that decides a cell. An arm's name and tables do not, nor does a guide that it leaves to the run."""
        decides = {name: value for name, value in asdict(arm).items() if name not in ("name", "groups", "draws")}
        if arm.guide is None:
            del decides["guide"]
        facts = [FORMAT, self.base.info.digest, str(self.base.dtype), asdict(self.pool.spec), _rows(self.pool), decides]
        facts += [seed, rate, self.batch_size, self.measures.identity, self.stages.identity, *choosing_code(arm)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]

    def best(self, arm: Arm, seeds: int) -> list[Cell]:
        """The arm at its best rate, one cell for each seed; fewer where time ran out or some diverged (`skipped`, `diverged`).

        From the first rate it walks up, and if that is no better down, while validation loss falls; seed 0 alone. Upwards it
        must fall by the share that the product's own search asks for (MARGIN): with another seed the higher rate may be the
        one that breaks. So the best rate has no clearly better neighbour, or lies at the border of `Weights.rates`. Where
        training diverges it walks down until it does not.
        """
        rates = list(arm.weights.rates)
        place = rates.index(arm.weights.first_rate)
        best = self.cell(arm, 0, rates[place])
        for way in (1, -1):
            moved = False
            while best is not None and 0 <= place + way < len(rates) and not (best.diverged and way > 0):
                limit = _loss(best) * (1 - MARGIN if way > 0 else 1)
                other = self.cell(arm, 0, rates[place + way], limit=limit)
                if other is None or (not best.diverged and _loss(other) >= limit):
                    break
                best, place, moved = other, place + way, True
            if moved:
                break
        if best is None or best.diverged:
            return []
        cells = [self.cell(arm, seed, rates[place], final=True) for seed in range(max(seeds, arm.draws))]
        return [cell for cell in cells if cell is not None and not cell.diverged]

    def cell(self, arm: Arm, seed: int, rate: float, *, final: bool = False, limit: float = math.inf) -> Cell | None:
        """Read or compute one cell, and note it if it diverged; None if there is no time to begin it.

        Args:   final: whether all that was asked for must be measured. One that lacks some of it is then computed anew, and
                serves as it is where there is no time. limit: one whose validation loss is not below it is not measured.
        """
        cell = self._cell(arm, seed, rate, final=final, limit=limit)
        where = Missing(self.pool.spec.name, arm.name, seed, rate)
        if cell is None:
            self.skipped.append(where)
        elif cell.diverged and where not in self.diverged:
            self.diverged.append(where)
        return cell

    def _cell(self, arm: Arm, seed: int, rate: float, *, final: bool, limit: float) -> Cell | None:
        key = self.key(arm, seed, rate)
        known = self.cells.get(key)
        if known is not None and not (final and not known.diverged and self.measures.lacking(known.measured)):
            return known
        if time.monotonic() > self.ends:
            return known if known is not None and known.measured else None
        cell = self._compute(arm, seed, rate, final=final, limit=limit)
        self.cells.put(key, cell)
        self.say(
            f"{self.pool.spec.name} | {arm.name} | seed {seed}, rate {rate:g}: {_shown(cell)}, {cell.seconds:.0f} s"
        )
        return cell

    def _compute(self, arm: Arm, seed: int, rate: float, *, final: bool, limit: float) -> Cell:
        heads, costs = self.stages.heads(arm, seed)
        # To choose rows for other heads costs finding those, too, but that is a control and no recipe.
        wanted = self.stages.heads(replace(arm, heads=arm.rows_for), seed)[0] if arm.rows_for else heads
        chosen, more = self.stages.rows(arm, wanted, seed)
        rendered = [self.base.renderer.render(self.pool.rows[index]) for index in chosen]
        steps = steps_per_epoch(len(rendered), self.batch_size) * arm.epochs
        below = min(heads)[0] if arm.weights.kind == "slices" and arm.epochs > 1 else 0
        measured: Measured | None = None
        validation: float | None = None
        with installed(self.base, arm.weights, heads, seed=seed) as trained:
            parameters = sum(parameter.numel() for parameter in trained.parameters())
            started = clock(self.base)
            try:
                self._train(trained, rendered, Schedule(rate, steps), seed=seed, below=below)
                seconds = clock(self.base) - started
                validation = self.measures.loss(self.base, self.task.validation)
                if final or validation < limit:
                    measured = self.measures.all(self.base, final=final)
            except Diverged:
                seconds, validation = clock(self.base) - started, None  # nothing that a search could prefer
        return Cell(
            pool=self.pool.spec.name,
            arm=arm.name,
            seed=seed,
            rate=rate,
            diverged=validation is None,
            validation=validation,
            rows=len(chosen),
            bad=len(self.pool.bad.intersection(chosen)) / len(chosen),
            heads=len(heads),
            parameters=parameters,
            train_s=seconds,
            train_flops=training_flops(
                self.base.info,
                arm,
                [(self.base.renderer.length(row), len(row.answer_ids)) for row in rendered],
                heads,
            ),
            stages=[*costs, *more],
            measured=measured,
            load=round(os.getloadavg()[0], 1),
            workers=self.workers,
        )

    def _train(
        self, trained: Trainable, rows: Sequence[RenderedRow], schedule: Schedule, *, seed: int, below: int
    ) -> None:
        on_gpu = self.base.device.type == "cuda"
        make = GraphedTrainer if on_gpu else SliceTrainer
        trainer = None
        try:
            with remember_below(self.base, 0 if on_gpu else below):
                trainer = make(self.base, trained, rows, batch_size=self.batch_size, seed=str(seed))
                for _ in range(schedule.steps):
                    trainer.advance(schedule)
        finally:
            if on_gpu:
                del trainer  # with its recording, whose memory other processes want
                torch.cuda.empty_cache()


def training_flops(info: ModelInfo, arm: Arm, rows: Sequence[tuple[int, int]], heads: Sequence[Head]) -> float:
    """Operations of all epochs, the search for the rate left out on every side. rows: (tokens, answer tokens) of each."""
    work, weights = flops.work_of(rows), arm.weights
    if weights.kind == "full":
        return arm.epochs * flops.full_fine_tuning(info, work)
    if weights.kind == "lora":
        assert weights.rank is not None
        return arm.epochs * flops.lora_training(info, work, rank=weights.rank, projections=weights.slices or None)
    first = flops.slice_training(info, work, heads=heads, projections=weights.slices)
    later = flops.slice_training(info, work, heads=heads, projections=weights.slices, cached=True)
    return first + (arm.epochs - 1) * later


def clock(base: BaseModel) -> float:
    """Seconds of this process, which other programs lengthen little; of the wall on a GPU."""
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)
        return time.perf_counter()
    return time.process_time()


def _shown(cell: Cell) -> str:
    if cell.measured is not None:
        return f"held-out loss {cell.measured.loss:.4f}"
    return "diverged" if cell.diverged else f"validation loss {cell.validation:.4f}"


def _loss(cell: Cell) -> float:
    return math.inf if cell.validation is None else cell.validation


def _rows(pool: Pool) -> str:
    digest = hashlib.sha256()
    for row in pool.rows:
        digest.update(f"{row.prompt}\0{row.answer}\0".encode())
    return digest.hexdigest()[:16]
