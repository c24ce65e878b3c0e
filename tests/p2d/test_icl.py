"""In-context scoring: groups are fair, the shared demonstrations change no number, and the slot bias is gone."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from p2d.batches import answer_nll, collate
from p2d.config import (
    DATA_SCORERS,
    FAST_DEMOS,
    POOL_FACTOR,
    DataConfig,
    JobConfig,
    Metric,
    Mode,
    icl_demos,
)
from p2d.generation import generate
from p2d.metrics import rouge_l
from p2d.models import BaseModel
from p2d.probe import probe_attention
from p2d.registry import load
from p2d.rendering import RenderedRow
from p2d.responses import ResponseInput, Responses
from p2d.responses.icl import (
    METRICS,
    Group,
    Scene,
    _Collected,
    assign_folds,
    form_groups,
    icl,
    read_masses,
    set_scene,
    share_means,
)
from tests.factories import some_rows

ROWS = some_rows(20)


def given(base: BaseModel, span: range = range(20), data: DataConfig | None = None) -> ResponseInput:
    config = JobConfig(data=data or DataConfig(mode="faithful", n_demos=3, n_queries=2))
    return ResponseInput(base=base, rows=ROWS, guide=[], span=span, slices=("v",), config=config)


def groups_of(base: BaseModel, span: range = range(20), data: DataConfig | None = None) -> list[Group]:
    return list(form_groups(given(base, span, data), lambda row: base.renderer.render(ROWS[row])))


def a_scene(base: BaseModel) -> Scene:
    rendered = [base.renderer.render(row) for row in ROWS]
    return set_scene(base, [rendered[0], rendered[3]], [rendered[5], rendered[6]])


def judged(base: BaseModel, metric: Metric) -> float:
    scene = a_scene(base)
    with torch.no_grad(), probe_attention() as probe:
        _, h_TD = read_masses(base, probe, scene, range(base.info.n_layers))
        return METRICS[metric](base)(scene, [ROWS[5], ROWS[6]], h_TD).quality


def as_long_rows(base: BaseModel) -> list[RenderedRow]:
    """Each query of the scene as one row whose prompt shows the demonstrations."""
    scene = a_scene(base)
    shown = scene.trunk_ids[len(base.renderer.prefix_ids) :]
    return [RenderedRow([*shown, *query.prompt_ids], query.answer_ids) for query in scene.queries]


def test_every_row_of_the_span_is_shown_and_queries_come_from_the_other_fold(tiny: BaseModel) -> None:
    groups, fold_R = groups_of(tiny, range(4, 15)), assign_folds(len(ROWS), seed=0)

    assert {row for group in groups for row in group.demos} == set(range(4, 15))
    for group in groups:
        assert len({fold_R[row] for row in group.demos}) == 1
        assert all(fold_R[query] != fold_R[group.demos[0]] for query in group.queries)


def test_folds_are_of_equal_size() -> None:
    assert np.bincount(assign_folds(20, seed=3)).tolist() == [10, 10]


def test_a_group_never_outgrows_the_context(tiny: BaseModel) -> None:
    longest = max(tiny.renderer.length(tiny.renderer.render(row)) for row in ROWS)
    context = 3 * longest
    small = replace(tiny, info=replace(tiny.info, context_length=context))

    groups = groups_of(small)

    for group in groups:
        query = max(tiny.renderer.length(tiny.renderer.render(ROWS[row])) for row in group.queries)
        shown = sum(
            tiny.renderer.length(tiny.renderer.render(ROWS[row])) - len(tiny.renderer.prefix_ids) for row in group.demos
        )
        assert query + shown + len(group.demos) * len(tiny.renderer.separator_ids) <= context
    assert {row for group in groups for row in group.demos} == set(range(20))


def test_a_row_that_leaves_room_for_no_query_is_not_scored_and_no_other_group_outgrows_the_context(
    tiny: BaseModel,
) -> None:
    length = {row: tiny.renderer.length(tiny.renderer.render(ROWS[row])) for row in range(20)}
    shown = {row: length[row] - len(tiny.renderer.prefix_ids) + len(tiny.renderer.separator_ids) for row in length}
    context = max(shown.values()) + min(length.values()) - 1  # the longest row fits before no query
    small = replace(tiny, info=replace(tiny.info, context_length=context))

    groups = groups_of(small)
    shard = icl(given(small)).shard

    assert groups
    for group in groups:
        assert sum(shown[row] for row in group.demos) + max(length[row] for row in group.queries) <= context
    seen = {row for group in groups for row in group.demos}
    assert seen < set(range(20))
    assert set(shard.row_R.tolist()) == seen
    assert np.isfinite(shard.response_RN).all()


@pytest.mark.parametrize("scorer", sorted(DATA_SCORERS))
def test_a_shard_without_a_row_of_the_pool_is_empty(tiny: BaseModel, scorer: str) -> None:
    config = JobConfig(data=DataConfig(mode="fast", ratio=0.05, scorer=scorer))
    shards = [replace(given(tiny, range(row, row + 1)), config=config, guide=ROWS[:4]) for row in range(20)]
    empty = next(shard for shard in shards if not len(shard.wanted()))
    score = load(DATA_SCORERS, scorer, what="data scorer", pointer="/data/scorer")

    found: Responses = score(empty)

    assert len(found.shard.row_R) == 0
    assert len(found.shard.response_RN) == 0


def test_the_likelihood_after_shared_demos_is_that_of_one_long_sequence(tiny: BaseModel) -> None:
    gains = []
    with torch.no_grad():
        for long, query in zip(as_long_rows(tiny), a_scene(tiny).queries, strict=True):
            after_B, tokens_B = answer_nll(tiny, collate(tiny.renderer, [long], [0]))
            alone_B, _ = answer_nll(tiny, collate(tiny.renderer, [query], [0]))
            gains.append(float((alone_B - after_B) / tokens_B))

    assert judged(tiny, "log_likelihood") == pytest.approx(np.exp(np.mean(gains)), rel=1e-4)


def test_token_accuracy_is_the_share_of_first_choices(tiny: BaseModel) -> None:
    hits = []
    for long in as_long_rows(tiny):
        ids_1T = torch.tensor([[*tiny.renderer.prefix_ids, *long.prompt_ids, *long.answer_ids]])
        with torch.no_grad():
            choice_T = tiny.logits(tiny.hidden(ids_1T)[0]).argmax(-1)
        answer = len(long.answer_ids)
        hits += (choice_T[-answer - 1 : -1] == ids_1T[0, -answer:]).tolist()

    assert judged(tiny, "token_accuracy") == pytest.approx(np.mean(hits))


def test_written_answers_after_shared_demos_are_those_of_one_long_prompt(tiny: BaseModel) -> None:
    scene, limit = a_scene(tiny), 12
    written = generate(tiny, [query.prompt_ids for query in scene.queries], limit=limit, after=scene.trunk_ids)

    assert written == [generate(tiny, [tiny.renderer.asked(long)], limit=limit)[0] for long in as_long_rows(tiny)]


def test_written_answers_are_judged_by_the_text_metric(tiny: BaseModel) -> None:
    longest = max(len(query.answer_ids) for query in a_scene(tiny).queries)
    asked = map(tiny.renderer.asked, as_long_rows(tiny))
    texts = [tiny.renderer.decode(generate(tiny, [ids], limit=longest)[0]) for ids in asked]

    expected = np.mean([rouge_l(text, row.answer) for text, row in zip(texts, [ROWS[5], ROWS[6]], strict=True)])
    assert judged(tiny, "rouge_l") == pytest.approx(expected)
    assert judged(tiny, "exact_match") == 0.0


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_every_metric_is_the_quality_of_the_rows_shown(tiny: BaseModel, metric: Metric) -> None:
    shard = icl(given(tiny, range(6), DataConfig(mode="faithful", n_demos=3, n_queries=2, metric=metric))).shard

    assert shard.combine == "product"
    assert shard.quality_R is not None
    assert (shard.quality_R >= 0).all()


MODES: tuple[Mode, ...] = ("faithful", "fast")
FAST = DataConfig(mode="fast", ratio=0.2, n_demos=3, n_queries=2)


def test_fast_mode_reads_the_masses_of_every_head_that_may_be_chosen(tiny: BaseModel) -> None:
    whole, fast = (icl(given(tiny, range(20), replace(FAST, mode=mode, ratio=1.0))).shard for mode in MODES)

    assert fast.layers == range(tiny.info.n_layers)
    np.testing.assert_array_equal(fast.response_RN, whole.response_RN)


def test_fast_mode_judges_no_answer_and_scores_the_pool_alone(tiny: BaseModel) -> None:
    shard = icl(given(tiny, range(20), FAST)).shard

    assert (shard.combine, shard.quality_R) == ("response", None)
    assert len(shard.row_R) == math.ceil(POOL_FACTOR * 4)


def test_fast_mode_shows_more_rows_to_a_query_only_where_each_slot_still_has_rows_enough() -> None:
    assert [icl_demos(FAST, rows) for rows in (8, 16 * 4, 16 * 7, 16 * 400)] == [3, 4, 7, FAST_DEMOS]
    assert icl_demos(replace(FAST, mode="faithful"), 16 * 400) == 3


def test_the_mass_of_a_slot_is_taken_out() -> None:
    rng = np.random.default_rng(0)
    worth = rng.uniform(1, 2, size=(40, 1))
    collected = _Collected(np.arange(40), 1)
    for start in range(0, 40, 4):
        demos = tuple(range(start, start + 4))
        sink = np.array([[20.0], [1.0], [1.0], [1.0]])  # the first slot draws twenty times the mass
        collected.add(Group(demos, (0,)), worth[list(demos)] * sink, quality=1.0)

    row_R, response_RN, quality_R = collected.finish()

    assert row_R.tolist() == list(range(40))
    assert np.corrcoef(response_RN[:, 0], worth[:, 0])[0, 1] > 0.9
    assert (quality_R == 1).all()


def test_rare_slots_share_a_mean_and_the_first_shares_none() -> None:
    assert share_means([9, 9, 9]) == [[0], [2], [1]]
    assert share_means([30, 30, 20, 5, 2]) == [[0], [4, 3, 2], [1]]
    assert share_means([3, 3, 3, 2, 2]) == [[0], [4, 3, 2, 1]]
    assert share_means([1]) == [[0]]
    assert share_means([20, 3]) == [[0], [1]]
    assert share_means([20, 3, 9]) == [[0], [2, 1]]
