"""Before and after are measured on the same rows, with their uncertainty, and the base model survives every part."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from p2d.adapters import load_adapter
from p2d.config import JobConfig, TrainingConfig
from p2d.estimate import evaluation_cost
from p2d.evaluation import Judge, RowLosses, paired_bootstrap, random_heads, row_losses
from p2d.generation import generate
from p2d.models import BaseModel
from p2d.plans import RowCounts
from p2d.rendering import RenderedRow
from p2d.resolution import resolve
from p2d.slices import Head, HeadSlices, all_heads
from tests.factories import some_rows
from tests.p2d.test_adapters import trained_adapter


def losses(nll: list[float], tokens: list[float]) -> RowLosses:
    return RowLosses(np.array(nll), np.array(tokens))


def test_the_mean_loss_weighs_tokens_not_rows() -> None:
    assert losses([10.0, 2.0], [9.0, 1.0]).mean == pytest.approx(1.2)


def test_a_rows_loss_does_not_depend_on_its_neighbours(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    together = row_losses(tiny, rendered)
    alone = [row_losses(tiny, [row]).nll_R[0] for row in rendered]

    np.testing.assert_allclose(together.nll_R, alone, rtol=1e-4)


def test_the_interval_holds_the_difference_and_shrinks_when_rows_agree() -> None:
    rng = np.random.default_rng(0)
    before = losses(list(rng.uniform(5, 15, 50)), [10.0] * 50)
    same_shift = losses(list(before.nll_R - 1.0), [10.0] * 50)
    mixed = losses(list(before.nll_R - 1.0 + rng.normal(0, 2, 50)), [10.0] * 50)

    sure, unsure = paired_bootstrap(before, same_shift, seed=0), paired_bootstrap(before, mixed, seed=0)

    assert sure.difference == pytest.approx(-0.1)
    assert sure.high - sure.low < 1e-9  # pairing takes the spread between rows out
    assert unsure.low < unsure.difference < unsure.high
    assert unsure == paired_bootstrap(before, mixed, seed=0)


def test_an_interval_drawn_piece_by_piece_is_the_interval_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    before = losses(list(rng.uniform(5, 15, 7)), [10.0] * 7)
    after = losses(list(rng.uniform(5, 15, 7)), [10.0] * 7)
    at_once = paired_bootstrap(before, after, seed=1)
    monkeypatch.setattr("p2d.evaluation.DRAWN_AT_ONCE", 100)

    assert paired_bootstrap(before, after, seed=1) == at_once


def test_random_heads_match_the_number_of_trained_parameters(tiny: BaseModel) -> None:
    config = JobConfig(training=TrainingConfig(slices=("v", "o")))
    wanted = HeadSlices(tiny, [(0, 0), (0, 1), (1, 2), (2, 3)], ("v", "o")).n_parameters

    for seed in range(5):
        heads = random_heads(tiny, config, wanted, random.Random(seed))
        size = HeadSlices(tiny, heads, ("v", "o")).n_parameters
        assert abs(size - wanted) <= HeadSlices(tiny, [(0, 0)], ("v", "o")).n_parameters


def test_random_heads_are_those_that_slices_would_count_and_no_slice_is_made(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = JobConfig(training=TrainingConfig(slices=("q", "v")))

    def counted_by_slices(parameters: int, rng: random.Random) -> list[Head]:
        order = all_heads(tiny)
        rng.shuffle(order)
        sizes = [HeadSlices(tiny, order[: n + 1], ("q", "v")).n_parameters for n in range(len(order))]
        return order[: min(range(len(order)), key=lambda n: abs(sizes[n] - parameters)) + 1]

    expected = [counted_by_slices(wanted, random.Random(wanted)) for wanted in range(0, 40_000, 5_000)]
    monkeypatch.setattr("p2d.slices.HeadSlices.__init__", None)  # 100 s of copies where a model has 270 heads

    assert [random_heads(tiny, config, wanted, random.Random(wanted)) for wanted in range(0, 40_000, 5_000)] == expected


def test_an_evaluation_renders_rows_as_it_looks_at_them_and_finds_the_same(
    tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_adapter(tiny, tmp_path)
    asked = JobConfig(training=TrainingConfig(epochs=1, batch_size=4, learning_rate=1e-3, slices=("v", "o")))
    config = resolve(asked, rows=8, context_length=tiny.info.context_length, head_dim=tiny.info.head_dim).config
    rows, counts = some_rows(20), RowCounts(rows=8, tokens=400, answer_tokens=80, longest=60)
    cost = evaluation_cost(tiny.info, config, train=counts, evaluation=counts)
    held = [rendered_rows_held()]

    def counting(base: BaseModel, rendered: Sequence[RenderedRow], at: Callable[[float], None]) -> RowLosses:
        held.append(rendered_rows_held())
        return row_losses(base, rendered, at=at)

    monkeypatch.setattr("p2d.rendering.KEPT_RENDERED", 1)
    monkeypatch.setattr("p2d.evaluation.row_losses", counting)
    judge = Judge(
        base=tiny,
        rows=rows[8:],
        train=rows[:8],
        guide=rows[:2],
        kept=rows[:4],
        heads=[(0, 0)],
        config=config,
        cost=cost,
    )

    found = judge.evaluate(load_adapter(tmp_path))

    assert len(held) == 3
    assert max(held) - held[0] <= 1
    listed = row_losses(tiny, [tiny.renderer.render(row) for row in rows[8:]])
    assert found.loss_before == listed.mean
    assert judge.losses["before"].nll_R.tobytes() == listed.nll_R.tobytes()


def rendered_rows_held() -> int:
    gc.collect()
    return sum(type(thing) is RenderedRow for thing in gc.get_objects())


# --- generation ------------------------------------------------------------------------------------------------------


def greedy_without_cache(base: BaseModel, asked_ids: list[int], limit: int) -> list[int]:
    """The plain definition: the whole sequence again for every token."""
    sequence, answer = list(asked_ids), list[int]()
    while len(answer) < limit:
        with torch.no_grad():
            token = int(base.logits(base.hidden(torch.tensor([sequence]))[:, -1]).argmax())
        if token in base.renderer.stop_ids:
            break
        answer.append(token)
        sequence.append(token)
    return answer


def test_a_batch_of_answers_is_what_each_prompt_gives_alone(tiny: BaseModel) -> None:
    prompts = [tiny.renderer.asked(tiny.renderer.render(row)) for row in some_rows(5, first=97)]
    assert len({len(ids) for ids in prompts}) > 1

    answers = generate(tiny, prompts, limit=12, on_token=lambda: None)

    assert answers == [greedy_without_cache(tiny, ids, 12) for ids in prompts]


def test_an_answer_is_as_long_as_alone_beside_a_prompt_that_fills_the_context(tiny: BaseModel) -> None:
    short = tiny.renderer.asked(tiny.renderer.render(some_rows(1)[0]))
    nearly, full = ([short[place % len(short)] for place in range(length)] for length in (509, 512))
    (alone,) = generate(tiny, [short], limit=12)
    (cut,) = generate(tiny, [nearly], limit=12)
    assert (len(alone), len(cut)) == (12, 3)

    assert generate(tiny, [nearly, short, full], limit=12) == [cut, alone, []]
    assert generate(tiny, [full], limit=12) == [[]]


def test_an_answer_ends_at_its_stop_token_while_others_go_on(tiny: BaseModel) -> None:
    prompts = [tiny.renderer.asked(tiny.renderer.render(row)) for row in some_rows(6)]
    free = generate(tiny, prompts, limit=8, on_token=lambda: None)
    stop = free[0][2]  # from now on this token ends an answer
    object.__setattr__(tiny, "renderer", _Stopping(tiny.renderer, stop))

    answers = generate(tiny, prompts, limit=8, on_token=lambda: None)

    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert answers == expected
    assert len(answers[0]) <= 2


class _Stopping:
    """A renderer with another stop token."""

    def __init__(self, renderer: object, stop: int) -> None:
        self._renderer, self.stop_ids = renderer, frozenset({stop})

    def __getattr__(self, name: str) -> object:
        return getattr(self._renderer, name)
