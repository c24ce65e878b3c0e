"""Every part runs from end to end on a tiny model and finds numbers: what the engine changes must not break the benchmark."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from benchmarks.cost import cost
from benchmarks.findings import Findings
from benchmarks.heads import heads
from benchmarks.respond import respond
from benchmarks.train import train
from benchmarks.workbench import Workbench
from tests.factories import some_rows, tiny_model_dir


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """One round on a tiny model whose context holds Data Whisperer's prompt, a token for every letter."""
    folder = tmp_path_factory.mktemp("bench")
    model_dir = tiny_model_dir(folder / "long", context_length=4096)
    return Workbench(model_dir=model_dir, rows=some_rows(40), scored=10, rounds=1, device="cpu", scratch=folder)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about peft
@pytest.mark.parametrize("part", [respond, heads, train, cost])
def test_a_part_finds_numbers(part: Callable[[Workbench], Findings], bench: Workbench) -> None:
    found = part(bench)

    assert found.ratios
    assert all(math.isfinite(value) and value > 0 for ratio in found.ratios for value in ratio.rounds)
