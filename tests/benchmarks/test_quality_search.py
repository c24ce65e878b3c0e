"""The search for an arm's rate, and which of its cells are measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality.arms import Arm, Weights
from benchmarks.quality.cells import Cells, Laboratory
from benchmarks.quality.measures import Measured, Measures, passages
from benchmarks.quality.pools import PoolSpec, build
from benchmarks.quality.tables import Found
from p2d.errors import Diverged
from p2d.learning_rates import MARGIN
from p2d.models import BaseModel
from tests.benchmarks.test_quality import OTHER, TASK, laboratory


def test_the_best_rate_has_a_worse_one_on_either_side_or_lies_at_the_border(tiny: BaseModel, tmp_path: Path) -> None:
    pool = build(PoolSpec("gsm8k", 8), TASK, OTHER)
    made = laboratory(tiny, pool, tmp_path / "quality.json")
    arm = Arm(name="one", weights=Weights(kind="lora", rank=2), epochs=1)

    best, again = made.best(arm, seeds=2)

    assert (best.seed, again.seed) == (0, 1)
    assert best.rate == again.rate
    rates = arm.weights.rates
    place = rates.index(best.rate)
    for neighbour in (place - 1, place + 1):
        if 0 <= neighbour < len(rates):
            other = made.cell(arm, 0, rates[neighbour])
            assert other is not None
            margin = MARGIN if neighbour > place else 0
            assert (other.validation or 9e9) >= (best.validation or 9e9) * (1 - margin)
            assert other.diverged or other.measured is None or rates[neighbour] == arm.weights.first_rate
    assert Found(arm, [best]).at_border == (place in (0, len(rates) - 1))


@pytest.mark.parametrize(
    ("validation", "chosen"),
    [
        ({2e-3: 1.0, 4e-3: 0.997, 1e-3: 1.1}, 2e-3),  # higher, but hardly better
        ({2e-3: 1.0, 4e-3: 0.98, 8e-3: 0.99}, 4e-3),
        ({2e-3: 1.0, 4e-3: 1.2, 1e-3: 0.999, 5e-4: 1.0}, 1e-3),
    ],
)
def test_a_higher_rate_must_be_clearly_better(
    validation: dict[float, float],
    chosen: float,
    tiny: BaseModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = laboratory(tiny, build(PoolSpec("gsm8k", 8), TASK, OTHER), tmp_path / "quality.json")
    cell = made.cell(Arm(name="one", weights=Weights(kind="lora", rank=1), epochs=1), 0, 1e-3)
    assert cell is not None
    monkeypatch.setattr(
        Laboratory, "cell", lambda _, arm, seed, rate, **__: replace(cell, rate=rate, validation=validation[rate])
    )

    found = made.best(Arm(name="two", weights=Weights(kind="lora", rank=8)), seeds=1)

    assert [one.rate for one in found] == [chosen]


def test_a_stored_cell_is_computed_again_only_where_it_is_final_and_lacks_what_is_asked_for(
    tiny: BaseModel, tmp_path: Path
) -> None:
    pool = build(PoolSpec("gsm8k", 8), TASK, OTHER)
    arm = Arm(name="one", weights=Weights(kind="lora", rank=2), epochs=1)
    path, text = tmp_path / "quality.json", tmp_path / "text.txt"
    text.write_text("Once there was a text of no use to any task. " * 300, encoding="utf-8")
    plain = laboratory(tiny, pool, path).cell(arm, 0, 1e-3)
    measures = Measures(TASK.held_out, OTHER.held_out, passages(tiny, text), "exact_match")
    measures.prepare(tiny)
    more = replace(laboratory(tiny, pool, path), measures=measures)
    late = replace(more, ends=0.0)

    assert more.cell(arm, 0, 1e-3) == plain
    assert late.cell(arm, 0, 1e-3, final=True) == plain  # there is no time, and it serves
    final = more.cell(arm, 0, 1e-3, final=True)

    assert plain is not None
    assert final is not None
    assert plain.measured is not None
    assert final.measured is not None
    assert (plain.measured.metric, plain.measured.text_loss) == (None, None)
    assert final.measured.metric is not None
    assert final.measured.text_loss is not None
    assert final.measured.nll == plain.measured.nll
    assert late.cell(arm, 0, 1e-3, final=True) == final
    assert replace(late, cells=Cells(path)).cell(arm, 0, 1e-3, final=True) == final  # as it was written down


def test_a_rate_at_which_only_the_held_out_loss_is_none_does_not_win_the_search(
    tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = laboratory(tiny, build(PoolSpec("gsm8k", 8), TASK, OTHER), tmp_path / "quality.json")
    arm = Arm(name="one", weights=Weights(kind="lora", rank=8), epochs=1)
    losses = iter([3.0, 2.0, 4.0])  # the second would be the best
    monkeypatch.setattr(Measures, "loss", lambda *_: next(losses, 3.0))
    measure = Measures.all

    def broken(measures: Measures, base: BaseModel, *, final: bool = True) -> Measured:
        if len(made.cells.of("gsm8k, 8 rows, clean")) == 1:
            raise Diverged("not finite", step=1, rows=[])
        return measure(measures, base, final=final)

    monkeypatch.setattr(Measures, "all", broken)

    (best,) = made.best(arm, seeds=1)

    assert best.rate == arm.weights.first_rate
    assert [(one.rate, one.diverged) for one in made.cells.of("gsm8k, 8 rows, clean")][:2] == [
        (2e-3, False),
        (4e-3, True),
    ]
    assert [one.rate for one in made.diverged] == [4e-3]


def test_a_rate_that_lost_the_search_is_measured_only_when_it_is_wanted_after_all(
    tiny: BaseModel, tmp_path: Path
) -> None:
    pool = build(PoolSpec("gsm8k", 8), TASK, OTHER)
    arm = Arm(name="one", weights=Weights(kind="lora", rank=2), epochs=1)
    said: list[str] = []
    made = replace(laboratory(tiny, pool, tmp_path / "quality.json"), say=said.append)
    late = replace(made, ends=0.0, skipped=[])

    lost = made.cell(arm, 0, 1e-3, limit=0.0)

    assert lost is not None
    assert lost.validation is not None
    assert (lost.diverged, lost.measured) == (False, None)
    assert f"rate 0.001: validation loss {lost.validation:.4f}" in said[0]
    assert made.cell(arm, 0, 1e-3) == lost
    assert late.cell(arm, 0, 1e-3, final=True) is None
    assert len(late.skipped) == 1
    wanted = made.cell(arm, 0, 1e-3, final=True)
    assert wanted is not None
    assert wanted.validation == lost.validation
    assert wanted.measured is not None
