"""What a step says it spent agrees with PyTorch's own counter: proxies, training and its search, in both recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from p2d import flops
from p2d.config import HeadsConfig, JobConfig, TrainingConfig
from p2d.identify import identify_heads
from p2d.models import BaseModel
from p2d.pipeline import no_progress
from p2d.rendering import RenderedRow
from p2d.resolution import resolve
from p2d.rows import Row
from p2d.sequences import MadeSequence
from p2d.step_flops import proxy_flops, training_flops, work_of_rendered
from p2d.training import train

ROWS = [Row(prompt=f"What is {n} plus 1?", answer=f"It is {n + 1}.", line=n) for n in range(20, 40)]
"""All of one length: nothing is padded."""

TOLERANCE = 0.02

T = TypeVar("T")


@pytest.fixture(autouse=True)
def _squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form counts what the counter sees: every token meets every other."""
    monkeypatch.setattr(flops, "causal_pairs", lambda tokens, past=0: tokens * (past + tokens))


def counted(work: Callable[[], T]) -> tuple[T, int]:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = work()
    return result, counter.get_total_flops()


def a_config(recipe: str) -> JobConfig:
    config = JobConfig(
        recipe=recipe,
        heads=HeadsConfig(proxy_rows=8),
        training=TrainingConfig(epochs=2, batch_size=4, learning_rate="auto"),
    )
    return resolve(config, rows=len(ROWS), context_length=512, head_dim=64).config


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_proxies_and_looks(recipe: str, tiny: BaseModel) -> None:
    config = a_config(recipe)

    head_map, found = counted(lambda: identify_heads(tiny, ROWS, ROWS[:6], config, no_progress))

    assert proxy_flops(tiny, ROWS, ROWS[:6], config, head_map) == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_training_with_its_search_and_its_looks(recipe: str, tiny: BaseModel) -> None:
    config, heads = a_config(recipe), [(1, 0), (2, 3)]
    rows, guide = [tiny.renderer.render(row) for row in ROWS[:12]], [tiny.renderer.render(row) for row in ROWS[12:]]

    result, found = counted(lambda: train(tiny, rows, guide, heads, config, no_progress))

    assert training_flops(tiny, rows, guide, heads, config, result)[0] == pytest.approx(found, rel=TOLERANCE)


def test_what_the_search_for_a_rate_took_is_what_a_given_rate_spares(tiny: BaseModel) -> None:
    heads = [(0, 0), (2, 3)]  # nothing below them is remembered, which both would share
    rows, guide = [tiny.renderer.render(row) for row in ROWS[:12]], [tiny.renderer.render(row) for row in ROWS[12:]]
    searching = a_config("paper")
    searched, found = counted(lambda: train(tiny, rows, guide, heads, searching, no_progress))
    given = replace(searching, training=replace(searching.training, learning_rate=searched.learning_rate))
    trained, alone = counted(lambda: train(tiny, rows, guide, heads, given, no_progress))

    search = training_flops(tiny, rows, guide, heads, searching, searched)[1]

    assert search == pytest.approx(found - alone, rel=TOLERANCE)
    assert training_flops(tiny, rows, guide, heads, given, trained)[1] == 0


def test_each_row_is_looked_at_once_where_layers_are_remembered(tiny: BaseModel) -> None:
    rows, guide = [tiny.renderer.render(row) for row in ROWS[:12]], [tiny.renderer.render(row) for row in ROWS[12:]]
    config = JobConfig(training=TrainingConfig(slices=("v", "o"), rank=None, epochs=2, learning_rate=1e-3))
    result, seen = train(tiny, rows, guide, [(1, 0)], config, no_progress), Seen(rows)

    training_flops(tiny, seen, guide, [(1, 0)], config, result)

    assert result.remembered_below == 1
    assert seen.places == list(range(12))
    together = work_of_rendered(tiny, [*rows, *guide])  # bit for bit what is counted apart
    assert together == work_of_rendered(tiny, rows) + work_of_rendered(tiny, guide)


class Seen(MadeSequence[RenderedRow]):
    """Notes which rows are looked at."""

    def __init__(self, rows: list[RenderedRow]) -> None:
        self._rows = rows
        self.places: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, place: int) -> RenderedRow:
        self.places.append(place)
        return self._rows[place]
