"""Run the matrix: pools of each task, arms of the table, seeds; then the page from all cells that are there."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.quality.arms import ARMS
from benchmarks.quality.cells import Cells, Laboratory, clock
from benchmarks.quality.measures import Measures
from benchmarks.quality.pools import READERS, PoolSpec, Task, build
from benchmarks.quality.stages import Stages
from benchmarks.quality.tables import Found, page
from benchmarks.workbench import machine
from p2d.models import BaseModel, load_base_model
from p2d.rows import Row

OTHER_ROWS = 12
"""Rows of the other task that tell what was forgotten."""


def run(options: argparse.Namespace, say: Callable[[str], None]) -> str:
    """Compute the cells that are missing, write quality.md, return it. Raises ValueError for tasks that do not serve."""
    torch.set_num_threads(options.threads)
    ends = time.monotonic() + 60 * options.minutes
    base = load_base_model(options.model, precision=options.precision, device=options.device)
    tasks = _tasks(options, base)
    cells = Cells(options.out / "quality.json")
    cells.facts = {
        "Model": f"{base.info.name}, {base.dtype}".replace("torch.", ""),
        "Machine": f"{machine()}, {options.threads} threads, {base.device}",
    }
    arms = [replace(arm, epochs=options.epochs) for arm in ARMS if options.arm in arm.name]
    pools: dict[str, list[Found]] = {}
    before: dict[str, float] = {}
    skipped: list[str] = []
    notes: list[str] = []
    for spec in (spec for spec in _specs(options, tasks) if options.pool in spec.name):
        task, other = tasks[spec.task], next((t for name, t in tasks.items() if name != spec.task), None)
        pool = build(spec, task, other)
        measures = Measures(task.held_out, () if other is None else other.held_out[:OTHER_ROWS], options.metric)
        measures.prepare(base)
        laboratory = Laboratory(
            base=base,
            pool=pool,
            task=task,
            stages=Stages(base, pool, task.validation, lambda: clock(base)),
            measures=measures,
            cells=cells,
            say=say,
            ends=ends,
        )
        before[spec.name] = measures.loss(base, task.held_out)
        say(f"{spec.name}: held-out loss before training {before[spec.name]:.4f}")
        found = [Found(arm, laboratory.best(arm, options.seeds)) for arm in arms]
        pools[spec.name] = [one for one in found if one.cells]
        skipped += laboratory.skipped
        notes += [
            f"{one.arm.name} diverged on {spec.name} at every rate that was tried."
            for one in _diverged(found, laboratory)
        ]
        text = page(
            pools, base=before, facts=cells.facts, notes=[*_notes(options), *_busy(pools), *notes, *_missing(skipped)]
        )
        (options.out / "quality.md").write_text(text, encoding="utf-8")
    return text


def _diverged(found: list[Found], laboratory: Laboratory) -> list[Found]:
    skipped = laboratory.skipped
    return [one for one in found if not one.cells and not any(line.startswith(one.arm.name) for line in skipped)]


def _notes(options: argparse.Namespace) -> list[str]:
    return [
        f"{options.epochs} epochs, {options.held_out} held-out rows, rates chosen on {options.validation} others with seed 0; that "
        "search is left out of the cost of every arm. Seconds are the processor's, or on a GPU the wall's.",
        "Rows and heads are chosen by the product's own stages, whose cost is in the ratios. A seed draws anew the order of rows, "
        "proxies, first factors and all random choices; intervals are over held-out rows alone, at the mean of the seeds.",
    ]


def _busy(pools: dict[str, list[Found]]) -> list[str]:
    load = max((cell.load for found in pools.values() for one in found for cell in one.cells), default=0.0)
    processors = os.cpu_count() or 1
    if load < processors + 0.5:
        return []
    return [
        f"The machine did other work: up to {load:.0f} programs on {processors} processors. Trust operations, not seconds."
    ]


def _missing(skipped: list[str]) -> list[str]:
    return [f"No time was left for {len(skipped)} cells; the first: {skipped[0]}."] if skipped else []


def _tasks(options: argparse.Namespace, base: BaseModel) -> dict[str, Task]:
    tasks = {}
    for given in options.task:
        name, equals, folder = given.partition("=")
        if not equals or name not in READERS:
            raise ValueError(f"--task {given}: expected NAME=DIR with one of {', '.join(READERS)}")
        read = READERS[name](Path(folder), validation=options.validation, held_out=options.held_out)
        short = tuple(row for row in read.train if _length(base, row) <= options.max_tokens)
        tasks[name] = replace(read, train=short)
    return tasks


def _length(base: BaseModel, row: Row) -> int:
    return base.renderer.length(base.renderer.render(row))


def _specs(options: argparse.Namespace, tasks: dict[str, Task]) -> list[PoolSpec]:
    """Pools with bad rows first: that is what users have, and time may run out."""
    sizes = {name: min(options.rows, len(task.train)) for name, task in tasks.items()}
    bad = [PoolSpec(name, rows, options.junk, options.share) for name, rows in sizes.items() if options.share]
    return bad + [PoolSpec(name, rows) for name, rows in sizes.items()]
