"""Run the matrix: pools of each task, arms of the table, seeds; then the page from all cells that are there."""

from __future__ import annotations

import argparse
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path

import torch

from benchmarks.quality.arms import ARMS, Arm
from benchmarks.quality.cells import Cell, Cells, Laboratory, Missing, clock
from benchmarks.quality.measures import Measures, passages
from benchmarks.quality.plots import draw
from benchmarks.quality.pools import READERS, Pool, PoolSpec, Task, build
from benchmarks.quality.stages import Stages
from benchmarks.quality.tables import Before, Found, page
from benchmarks.workbench import machine
from p2d.config import DEFAULT_RATIO, MIN_ROWS, top_count
from p2d.errors import P2DError
from p2d.models import BaseModel, load_base_model
from p2d.rendering import RenderedRow
from p2d.rows import Row
from p2d.wording import counted

OTHER_ROWS = 12
"""Rows of the other task that tell what was forgotten."""

Say = Callable[[str], None]


def run(options: argparse.Namespace, say: Say) -> str:
    """Compute the cells that are missing, write quality.md, return it.

    Raises: ValueError for tasks or names that do not serve, or a folder that cannot be written to, that another run writes to, or
            whose page shows more than this run has.
    """
    ends = time.monotonic() + 60 * options.minutes
    with _taken(options.out):
        return _run(options, say, ends)


def _run(options: argparse.Namespace, say: Say, ends: float) -> str:
    from benchmarks.quality.workers import share_out  # which begins processes that import this module

    cells = Cells(options.out / "quality.json")
    matrix = Matrix(options, cells, say, ends)
    _keep(options.out / "quality.md", matrix)
    cells.facts = joined(cells.facts, matrix.facts)
    notes = []
    if options.workers > 1:
        notes = share_out(options, matrix.orders(), cells, say, ends)
        matrix.ends = 0.0  # what they did not come to is said to be missing, not computed here
    pools: dict[str, list[Found]] = {}
    before: dict[str, Before] = {}
    for spec in matrix.specs:
        laboratory = matrix.laboratory(spec)
        loss = laboratory.measures.loss(matrix.base, laboratory.task.held_out)
        before[spec.name] = Before(loss, laboratory.measures.other_before, laboratory.measures.text_before)
        say(f"{spec.name}: held-out loss before training {loss:.4f}")
        found = [Found(arm, _best(laboratory, arm, options.seeds, notes)) for arm in matrix.arms]
        cut = {one.arm for one in laboratory.skipped if one.seed == 0}
        pools[spec.name] = [replace(one, cut=one.arm.name in cut) for one in found if one.cells]
        notes += _diverged(laboratory.diverged, {one.arm.name for one in pools[spec.name]})
        said = [*_notes(options), *matrix.doubts(), *_crowded(pools), *notes, *_missing(matrix.skipped)]
        stored = {name: cells.of(name) for name in pools}
        text = page(pools, base=before, facts=cells.facts, notes=said, stored=stored)
        (options.out / "quality.md").write_text(text, encoding="utf-8")
        draw(pools, options.out / "quality.svg")
    return text


def _keep(earlier: Path, matrix: Matrix) -> None:
    """Raises ValueError where a page that is there shows a pool or an arm that the run does not have, and so would lose."""
    text = earlier.read_text(encoding="utf-8") if earlier.exists() else ""
    pools, arms = {spec.name for spec in matrix.specs}, {arm.name for arm in matrix.arms}
    lost = {
        repr(name)
        for pool, shown in shown_in(text).items()
        for name in (shown - arms if pool in pools else {pool})
        if shown
    }
    if lost:
        raise ValueError(
            f"{earlier} shows {min(lost)}, which this run does not have"
            f"{f', and {len(lost) - 1} more such' if len(lost) > 1 else ''}: move it away, or name another folder by --out"
        )


def shown_in(page: str) -> dict[str, set[str]]:
    """The pools of a page, and the arms in the main table of each."""
    found: dict[str, set[str]] = {}
    pool = table = ""
    for line in page.splitlines():
        if line.startswith("## "):
            pool, table = line.removeprefix("## "), ""
            found[pool] = set()
        elif line.startswith("### "):
            table = line
        elif table.startswith("### Each arm") and line.startswith("| ") and not line.startswith(("| arm |", "| --- ")):
            found[pool].add(line.split(" | ")[0].removeprefix("| "))
    return found


@contextmanager
def _taken(folder: Path) -> Iterator[None]:
    """Within the block no other run writes into the folder; it is free again when this process ends, however that is.

    Raises ValueError before anything is computed that could not be written down, or that another run would write over.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written to: {error.strerror}") from error
    try:
        with suppress(OSError):  # a file system without locks: then two runs at once are the user's to avoid
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"another run writes into --out {folder}: wait for it, or name another folder"
                ) from None
        yield
    finally:
        os.close(descriptor)


def _best(laboratory: Laboratory, arm: Arm, seeds: int, notes: list[str]) -> list[Cell]:
    """The arm's cells; none, and a note, where it fails: the other arms go on."""
    try:
        return laboratory.best(arm, seeds)
    except P2DError as error:
        notes.append(failure(arm, laboratory.pool.spec, error))
        return []


def failure(arm: Arm, spec: PoolSpec, error: Exception) -> str:
    """What the page says of an arm that could not be computed; our own errors speak for themselves."""
    kind = "" if isinstance(error, P2DError) else f"{type(error).__name__}: "
    return f"{arm.name} on {spec.name} failed: {kind}{error}"


def distinct(arms: Sequence[Arm]) -> list[Arm]:
    """Arms that differ in more than their names: with `--epochs 1` some do not. The first of such stands in the tables of all."""
    found: dict[Arm, Arm] = {}
    for arm in arms:
        nameless = replace(arm, name="", groups=frozenset(), draws=1)
        first = found.get(nameless, arm)
        found[nameless] = replace(first, groups=first.groups | arm.groups, draws=max(first.draws, arm.draws))
    return list(found.values())


def joined(before: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Facts of an earlier run over the same cells and of this one."""
    both = {name: [*before.get(name, "").split("; "), *now.get(name, "").split("; ")] for name in before | now}
    return {name: "; ".join(dict.fromkeys(filter(None, values))) for name, values in both.items()}


@dataclass(slots=True)
class Matrix:
    """Model, tasks and pools of a run, in one process."""

    options: argparse.Namespace
    cells: Cells
    say: Say
    ends: float
    """No cell is begun later (`time.monotonic`)."""
    base: BaseModel = field(init=False)
    arms: list[Arm] = field(init=False)
    specs: list[PoolSpec] = field(init=False)
    _text: Sequence[RenderedRow] = field(init=False)
    _tasks: dict[str, Task] = field(init=False)
    _pools: dict[str, Pool] = field(init=False)
    _laboratories: dict[str, Laboratory] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = self.options
        torch.set_num_threads(options.threads)
        self.base = load_base_model(options.model, precision=options.precision, device=options.device)
        self._text = () if options.text is None else passages(self.base, options.text)
        self._tasks = read_tasks(
            options.task,
            self.base,
            validation=options.validation,
            held_out=options.held_out,
            max_tokens=options.max_tokens,
        )
        words = [word.lower() for word in options.arm] or [""]
        wanted = [arm for arm in ARMS if "core" in arm.groups or not options.core]
        # Of fewer rows than there are, or it would be the arm that has them all.
        wanted = [arm for arm in wanted if arm.guide is None or arm.guide < options.validation]
        names = [arm.name.lower() for arm in wanted]
        if unknown := [word for word in options.arm if not any(word.lower() in name for name in names)]:
            near = sorted((arm.name for arm in wanted), key=lambda name: _alike(unknown[0], name), reverse=True)
            raise ValueError(f"no arm has {unknown[0]!r} in its name; there are, the nearest first: {'; '.join(near)}")
        wanted = [arm for arm, name in zip(wanted, names, strict=True) if any(word in name for word in words)]
        self.arms = distinct([replace(arm, epochs=arm.epochs or options.epochs) for arm in wanted])
        specs = _specs(options, self._tasks)
        self.specs = [spec for spec in specs if options.pool in spec.name]
        if not self.specs:
            raise ValueError(
                f"no pool has {options.pool!r} in its name; there are: {'; '.join(spec.name for spec in specs)}"
            )
        # All at once: what cannot be built is refused before anything is computed.
        self._pools = {spec.name: build(spec, self._tasks[spec.task], self._other(spec)) for spec in self.specs}

    @property
    def facts(self) -> dict[str, str]:
        """What a reader needs to know about the run."""
        options, base = self.options, self.base
        device = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else str(base.device)
        return {
            "Model": f"{base.info.name}, {base.dtype}".replace("torch.", ""),
            "Machine": f"{machine()}, {options.threads} threads, {device}, processes at a time: {options.workers}",
            "Command": f"`{options.command}`",
        }

    def doubts(self) -> list[str]:
        """What is wrong with tasks and pools as they are."""
        leaks = [
            f"Left out of {name}: {counted(task.leaked, 'training row', 'training rows')}. What was kept apart for validation "
            "and to be held out has the same prompt, or nearly the same words."
            for name, task in self._tasks.items()
            if task.leaked
        ]
        long = [
            f"Left out of {name}: {counted(task.long, 'training row', 'training rows')} of more than "
            f"{self.options.max_tokens} tokens (--max-tokens)."
            for name, task in self._tasks.items()
            if task.long
        ]
        twice = [
            f"Left out of {name}: {counted(task.repeated, 'row', 'rows')} kept apart for validation and to be held out, "
            "in nearly the same words as another of these."
            for name, task in self._tasks.items()
            if task.repeated
        ]
        small = [
            f"{spec.name}: 10% of it is {counted(tenth, 'row', 'rows')}. Below about {MIN_ROWS} the number of rows "
            "counts more than which they are, so this pool says little of small ratios."
            for spec in self.specs
            if (tenth := top_count(DEFAULT_RATIO, spec.rows)) < MIN_ROWS
        ]
        return leaks + long + twice + small

    @property
    def skipped(self) -> list[Missing]:
        """What there was no time for."""
        return [one for laboratory in self._laboratories.values() for one in laboratory.skipped]

    def laboratory(self, spec: PoolSpec) -> Laboratory:
        """Where the cells of a pool are computed; made when first asked for."""
        if spec.name not in self._laboratories:
            base, task, other = self.base, self._tasks[spec.task], self._other(spec)
            pool = self._pools[spec.name]
            measures = Measures(
                task.held_out,
                () if other is None else other.held_out[:OTHER_ROWS],
                self._text,
                task.metric if self.options.generate else None,
            )
            measures.prepare(base)
            self._laboratories[spec.name] = Laboratory(
                base=base,
                pool=pool,
                task=task,
                stages=Stages(base, pool, task.validation, lambda: clock(base)),
                measures=measures,
                cells=self.cells,
                say=self.say,
                batch_size=self.options.batch,
                workers=self.options.workers,
            )
        laboratory = self._laboratories[spec.name]
        laboratory.ends = self.ends
        return laboratory

    def _other(self, spec: PoolSpec) -> Task | None:
        """Where off-task rows and what may be forgotten come from."""
        return next((task for name, task in self._tasks.items() if name != spec.task), None)

    def orders(self) -> list[tuple[PoolSpec, Arm]]:
        """Every arm on every pool, arm by arm, the core of the table first, and of it what takes longest: all rows."""
        arms = sorted(self.arms, key=lambda arm: (0 if arm.rows == "all" else 1) if "core" in arm.groups else 2)
        return [(spec, arm) for arm in arms for spec in self.specs]


def _alike(word: str, name: str) -> int:
    """Characters of the longest part that both have."""
    return SequenceMatcher(None, word.lower(), name.lower(), autojunk=False).find_longest_match().size


def _notes(options: argparse.Namespace) -> list[str]:
    return [
        f"{counted(options.epochs, 'epoch', 'epochs')} in steps of {options.batch} rows, {options.held_out} held-out rows, "
        f"rates chosen on {options.validation} others with seed 0; that search is left out of the cost of every arm. "
        "Seconds are the processor's, or on a GPU the wall's.",
        "Rows and heads are chosen by the product's own stages, whose cost is in the ratios. A seed draws anew the order of rows, "
        "proxies, first factors and all random choices; intervals are over held-out rows alone, at the mean of the seeds.",
        "A loss is the mean of an arm's own seeds, a difference that of the seeds which both arms have: where one has more seeds, "
        "it is not the difference of the two losses.",
    ]


def _crowded(pools: dict[str, list[Found]]) -> list[str]:
    """Whether seconds mislead, and why."""
    every = [cell for found in pools.values() for one in found for cell in one.cells]
    workers, load = (max((getattr(cell, name) for cell in every), default=0) for name in ("workers", "load"))
    if workers > 1:
        return [f"Up to {workers} processes shared the device: trust operations, not seconds."]
    processors = os.cpu_count() or 1
    if load < processors + 0.5:
        return []
    return [
        f"The machine did other work: up to {load:.0f} programs on {processors} processors. Trust operations, not seconds."
    ]


def _diverged(cells: Sequence[Missing], shown: Set[str]) -> list[str]:
    """Every arm that diverged, with all seeds and rates at which it did. shown: arms of which something is on the page."""
    at: dict[tuple[str, str], list[str]] = {}
    for one in cells:
        at.setdefault((one.arm, one.pool), []).append(f"seed {one.seed} at {one.rate:g}")
    return [
        f"{arm} diverged on {pool}: {', '.join(which)}. "
        + ("Its figures are those of the others." if arm in shown else "Nothing of it is left to show.")
        for (arm, pool), which in at.items()
    ]


def _missing(skipped: list[Missing]) -> list[str]:
    if not skipped:
        return []
    arms, pools = (len({getattr(one, what) for one in skipped}) for what in ("arm", "pool"))
    return [
        f"No time was left for {counted(len(skipped), 'cell', 'cells')} of {counted(arms, 'arm', 'arms')} "
        f"on {counted(pools, 'pool', 'pools')}, nor for what their searches would have asked for next; "
        f"the first: {skipped[0]}."
    ]


def read_tasks(
    given: Sequence[str], base: BaseModel, *, validation: int, held_out: int, max_tokens: int
) -> dict[str, Task]:
    """Tasks of `NAME=DIR`, their training rows of at most `max_tokens` tokens. Raises ValueError for an unknown name."""
    tasks = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not equals or name not in READERS:
            raise ValueError(f"--task {one}: expected NAME=DIR with one of {', '.join(READERS)}")
        if name in tasks:
            raise ValueError(f"--task {one}: {name} is given twice")
        read = READERS[name](Path(folder), validation=validation, held_out=held_out)
        short = tuple(row for row in read.train if _length(base, row) <= max_tokens)
        if not short:
            raise ValueError(
                f"{name} has no training row of at most {max_tokens} tokens: allow longer ones by --max-tokens"
            )
        tasks[name] = replace(read, train=short, long=len(read.train) - len(short))
    return tasks


def _length(base: BaseModel, row: Row) -> int:
    return base.renderer.length(base.renderer.render(row))


def _specs(options: argparse.Namespace, tasks: dict[str, Task]) -> list[PoolSpec]:
    """Pools with bad rows first: that is what users have, and time may run out."""
    sizes = {name: min(options.rows, len(task.train)) for name, task in tasks.items()}
    bad = [
        PoolSpec(name, rows, junk, options.share)
        for junk in options.junk
        for name, rows in sizes.items()
        if options.share
    ]
    return bad + [PoolSpec(name, rows) for name, rows in sizes.items()]
