"""Progress is the share of the time that is over, where parts take what they were expected to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from p2d.adapters import load_adapter
from p2d.baselines import MEASURED_STEPS
from p2d.config import Control, DataConfig, JobConfig, TrainingConfig
from p2d.course import SCALE, Course
from p2d.estimate import evaluation_cost
from p2d.evaluation import Judge
from p2d.models import BaseModel
from p2d.plans import RowCounts
from p2d.resolution import resolve
from p2d.rows import Row
from tests.factories import some_rows
from tests.p2d.test_adapters import trained_adapter


@dataclass
class Clock:
    """Whole seconds pass by command, and every word about progress is kept with its second."""

    now: float = 0.0
    said: list[tuple[float, float]] = field(default_factory=list)

    def hear(self, done: int, total: int, metrics: object, /) -> None:
        self.said.append((self.now, done / total))

    def work(self, course: Course, cost: float, *, ticks: int, took: float) -> None:
        with course.part(cost) as at:
            for tick in range(ticks):
                self.now += took / ticks
                at((tick + 1) / ticks)


def test_many_short_ticks_count_as_much_as_the_time_they_take() -> None:
    clock = Clock()
    course = Course(clock.hear, total=192)

    clock.work(course, 104, ticks=312, took=104)  # a token each
    clock.work(course, 88, ticks=8, took=88)  # an optimizer step each
    course.end()

    assert all(share == pytest.approx(now / 192, abs=2 / SCALE) for now, share in clock.said)


def test_a_part_that_ends_early_counts_whole_and_one_with_more_ticks_than_foreseen_counts_once() -> None:
    clock = Clock()
    course = Course(clock.hear, total=100)

    with course.part(60) as at:
        at(0.1)
    with course.part(30) as at:
        at(0.5)
        at(7.0)
        at(0.4)

    assert [share for _, share in clock.said] == [0.06, 0.6, 0.75, 0.9, 0.9, 0.9]


def test_the_end_is_told_only_by_the_end() -> None:
    clock = Clock()
    course = Course(clock.hear, total=10)

    clock.work(course, 11, ticks=2, took=2)
    assert max(share for _, share in clock.said) < 1
    course.end()

    assert clock.said[-1] == (2, 1)


@pytest.mark.parametrize("controls", [(), ("random_heads", "random_data"), ("lora",)])
def test_an_evaluation_gives_its_timed_steps_and_its_controls_the_part_of_progress_that_they_cost(
    tiny: BaseModel, tmp_path: Path, controls: tuple[Control, ...]
) -> None:
    trained_adapter(tiny, tmp_path)
    training = TrainingConfig(epochs=1, batch_size=4, learning_rate=1e-3, slices=("v", "o"))
    asked = JobConfig(controls=controls, training=training, data=DataConfig(ratio=0.5))
    config = resolve(asked, rows=24, context_length=tiny.info.context_length, head_dim=tiny.info.head_dim).config
    rows = some_rows(40)
    counts = [counted(tiny, some) for some in (rows[:24], rows[24:30])]
    cost = evaluation_cost(tiny.info, config, train=counts[0], evaluation=counts[1])
    told: list[tuple[int, int]] = []
    judge = Judge(
        base=tiny, rows=rows[24:30], train=rows[:24], guide=rows[30:], kept=rows[:12], heads=[(0, 0), (1, 2)],
        config=config, cost=cost, progress=lambda done, total, metrics: told.append((done, total)),
    )  # fmt: skip

    judge.evaluate(load_adapter(tmp_path))

    shares = [done / total for done, total in told]
    assert shares == sorted(shares)
    assert [share for share in shares if share == 1] == [1.0]
    timed = MEASURED_STEPS * (cost.full_step + cost.lora_step)
    judged = 2 * (cost.loss + cost.generation)
    assert any(share == pytest.approx(judged / cost.total(config), abs=2 / SCALE) for share in shares)
    assert any(share == pytest.approx(1 - timed / cost.total(config), abs=2 / SCALE) for share in shares)
    assert sum(share > 1 - timed / cost.total(config) for share in shares) >= 2 * MEASURED_STEPS


def counted(base: BaseModel, rows: Sequence[Row]) -> RowCounts:
    rendered = [base.renderer.render(row) for row in rows]
    lengths = [base.renderer.length(row) for row in rendered]
    answers = sum(len(row.answer_ids) for row in rendered)
    return RowCounts(rows=len(rows), tokens=sum(lengths), answer_tokens=answers, longest=max(lengths))
