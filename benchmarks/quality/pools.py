"""Tasks from files, and pools of training rows of which some are known to be bad. Nothing here looks at a model.

Held-out rows, validation rows and the pool share no row: which rows are clean is known, and is used to judge alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from p2d.columns import mapped
from p2d.near_duplicates import repetitions
from p2d.rows import Row, read_rows
from p2d.wording import counted

Junk = str
"""A kind of bad row: one of MAKERS."""

NUMBER = re.compile(r"(?<![A-Za-z\d])\d+")
"""No name such as DialogSum's `#Person1#`."""


@dataclass(frozen=True, slots=True)
class Task:
    """Rows of one task, shuffled once and for all."""

    name: str
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    """What scorers are guided by and rates are chosen on."""
    held_out: tuple[Row, ...]
    """What arms are judged on, and nothing else."""
    metric: str = "exact_match"
    """What a written answer is worth (`p2d.metrics`)."""
    leaked: int = 0
    """Training rows that were left out: their prompt stands among the rows, too, that the two others are taken from, or they nearly
    repeat one of those."""
    repeated: int = 0
    """Of the rows that the two others are taken from, those left out because they nearly repeat another of them."""
    long: int = 0
    """Training rows that were left out because they have more tokens than a run allows."""


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Which pool, by name."""

    task: str
    rows: int
    junk: tuple[Junk, ...] = ()
    """Kinds of bad rows, in equal parts."""
    share: float = 0.0
    """Of bad rows."""

    @property
    def name(self) -> str:
        """As tables call it."""
        kinds = "+".join(self.junk)
        return f"{self.task}, {self.rows} rows, " + (f"{self.share:.0%} {kinds}" if self.junk else "clean")


@dataclass(frozen=True, slots=True)
class Pool:
    """Training rows to choose from."""

    spec: PoolSpec
    rows: tuple[Row, ...]
    bad_by_kind: Mapping[Junk, frozenset[int]]
    """Indices of the rows that are known to be bad, and how."""

    @property
    def bad(self) -> frozenset[int]:
        """All of them."""
        return frozenset().union(*self.bad_by_kind.values())

    @property
    def clean(self) -> list[int]:
        """Indices of the others."""
        bad = self.bad
        return [index for index in range(len(self.rows)) if index not in bad]


def gsm8k(folder: Path, *, validation: int, held_out: int) -> Task:
    """GSM8K as `train.json` and `test.json`, or as the `.jsonl` files of the example."""
    train, test = (_read(folder, name, {}) for name in ("train", "test"))
    return _task("gsm8k", train, test, "test rows", validation, held_out, "exact_match")


def dialogsum(folder: Path, *, validation: int, held_out: int) -> Task:
    """DialogSum as `validation.json`: its last rows are held out."""
    rows = _read(folder, "validation", {"prompt": "dialogue", "completion": "summary"})
    apart = validation + held_out
    last = "rows at the end of its file to set apart"
    return _task("dialogsum", rows[:-apart], rows[-apart:], last, validation, held_out, "rouge_l")


READERS: dict[str, Callable[..., Task]] = {"gsm8k": gsm8k, "dialogsum": dialogsum}


def build(spec: PoolSpec, task: Task, other: Task | None) -> Pool:
    """The pool of a spec: always the same rows, the same of them bad.

    Raises: ValueError if the task has too few rows, or an off-task row is wanted without another task.
    """
    if len(task.train) < spec.rows:
        raise ValueError(f"{task.name} has {len(task.train)} training rows; the pool wants {spec.rows}")
    rng = random.Random(spec.name)  # noqa: S311 - not a secret
    rows = list(task.train[: spec.rows])
    bad = rng.sample(range(spec.rows), round(spec.share * spec.rows)) if spec.junk else []
    for place, index in enumerate(bad):
        kind = spec.junk[place % len(spec.junk)]
        rows[index] = MAKERS[kind](rows, index, task, other, rng)
    kinds = {kind: frozenset(bad[place :: len(spec.junk)]) for place, kind in enumerate(spec.junk)}
    return Pool(spec, tuple(rows), kinds)


def _another_answer(rows: Sequence[Row], index: int, task: Task, _: Task | None, rng: random.Random) -> Row:
    unused = task.train[len(rows) :] or task.train
    return Row(rows[index].prompt, rng.choice(unused).answer, rows[index].line)


def _off_task(rows: Sequence[Row], index: int, _: Task, other: Task | None, rng: random.Random) -> Row:
    if other is None:
        raise ValueError("off-task rows come from another task: give a second --task")
    row = rng.choice(other.train)
    return Row(row.prompt, row.answer, rows[index].line)


def _echo(rows: Sequence[Row], index: int, *_: object) -> Row:
    return Row(rows[index].prompt, rows[index].prompt, rows[index].line)


def _near_duplicate(rows: Sequence[Row], index: int, task: Task, _: Task | None, rng: random.Random) -> Row:
    # One of few rows over and over, its answer's last word dropped: right, and soon worth nothing more.
    row = task.train[rng.randrange(max(1, len(rows) // 50))]
    return Row(row.prompt, row.answer.rsplit(" ", 1)[0], rows[index].line)


def _wrong_number(rows: Sequence[Row], index: int, task: Task, _: Task | None, rng: random.Random) -> Row:
    row = rows[index]
    numbers = list(NUMBER.finditer(row.answer))
    if not numbers:
        raise ValueError(
            f"line {row.line} of {task.name} has no number that could be made wrong: give tasks with numbers alone to a run "
            "with such rows"
        )
    last = numbers[-1]
    other = int(last.group()) + rng.randrange(1, 20)
    return Row(row.prompt, f"{row.answer[: last.start()]}{other}{row.answer[last.end() :]}", row.line)


def _shuffled_words(rows: Sequence[Row], index: int, _: Task, __: Task | None, rng: random.Random) -> Row:
    row = rows[index]
    words = row.answer.split()
    order = iter(rng.sample(words, len(words)))
    return Row(row.prompt, re.sub(r"\S+", lambda _: next(order), row.answer), row.line)


MAKERS: dict[Junk, Callable[..., Row]] = {
    "another's answer": _another_answer,
    "off task": _off_task,
    "echo": _echo,
    "near duplicate": _near_duplicate,
    "wrong number": _wrong_number,
    "shuffled words": _shuffled_words,
}


def _task(
    name: str, train: list[Row], test: list[Row], test_is: str, validation: int, held_out: int, metric: str
) -> Task:
    random.Random(f"{name}:train").shuffle(train)  # noqa: S311 - not a secret
    every = [*test, *train]
    repeats = repetitions(every, np.arange(len(every)))  # the first of rows that are alike stands for them
    seen = {(row.before, row.prompt) for row in test}  # with another answer it leaks as well
    unseen = tuple(
        row
        for row, first in zip(train, repeats[len(test) :], strict=True)
        if (row.before, row.prompt) not in seen and not 0 <= first < len(test)
    )
    different = tuple(row for row, first in zip(test, repeats, strict=False) if first < 0)
    apart, repeated = validation + held_out, len(test) - len(different)
    if len(different) < apart:
        without = (
            f", without {counted(repeated, 'that nearly repeats', 'that nearly repeat')} another" if repeated else ""
        )
        raise ValueError(
            f"{name} has {len(different)} {test_is}{without}; {apart} are wanted (--validation and --held-out together)"
        )
    return Task(
        name,
        unseen,
        different[:validation],
        different[validation:apart],
        metric,
        leaked=len(train) - len(unseen),
        repeated=repeated,
    )


def _read(folder: Path, name: str, mapping: Mapping[str, str]) -> list[Row]:
    path = next((path for path in (folder / f"{name}.json", folder / f"{name}.jsonl") if path.is_file()), None)
    if path is None:
        raise ValueError(f"there is no {name}.json or {name}.jsonl in {str(folder)!r}")
    rows = list(read_rows(path, "json" if path.suffix == ".json" else "jsonl", columns=mapped(mapping)))
    for row in rows:
        if not isinstance(row, Row):
            raise ValueError(f"{path.name}, line {row.line}: {row.message}")
    return [row for row in rows if isinstance(row, Row)]
