"""In-context scoring: groups are fair, the shared demonstrations change no number, and the slot bias is gone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from p2d.batches import answer_nll, collate
from p2d.config import DataConfig, JobConfig
from p2d.models import BaseModel
from p2d.probe import probe_attention
from p2d.rendering import RenderedRow
from p2d.responses import ResponseInput
from p2d.responses.icl import Group, _Collected, assign_folds, form_groups, query_pool, read_group
from tests.factories import some_rows

ROWS = some_rows(20)


def given(base: BaseModel, span: range = range(20)) -> ResponseInput:
    config = JobConfig(data=DataConfig(n_demos=3, n_queries=2))
    return ResponseInput(base=base, rows=ROWS, guide=[], span=span, slices=("v",), config=config)


def groups_of(
    base: BaseModel, span: range = range(20)
) -> tuple[list[Group], np.ndarray[tuple[int, ...], np.dtype[np.int64]]]:
    rendered = {index: base.renderer.render(row) for index, row in enumerate(ROWS)}
    fold_R = assign_folds(len(ROWS), seed=0)
    return list(
        form_groups(given(base, span), fold_R, [query_pool(fold_R, 0), query_pool(fold_R, 1)], rendered)
    ), fold_R


def test_every_row_of_the_span_is_shown_and_queries_come_from_the_other_fold(tiny: BaseModel) -> None:
    groups, fold_R = groups_of(tiny, range(4, 15))

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

    groups, _ = groups_of(small)

    for group in groups:
        query = max(tiny.renderer.length(tiny.renderer.render(ROWS[row])) for row in group.queries)
        shown = sum(
            tiny.renderer.length(tiny.renderer.render(ROWS[row])) - len(tiny.renderer.prefix_ids) for row in group.demos
        )
        assert query + shown + len(group.demos) * len(tiny.renderer.separator_ids) <= context
    assert {row for group in groups for row in group.demos} == set(range(20))


def test_the_likelihood_after_shared_demos_is_that_of_one_long_sequence(tiny: BaseModel) -> None:
    rendered = {index: tiny.renderer.render(row) for index, row in enumerate(ROWS)}
    group = Group(demos=(0, 3), queries=(5, 6))
    with torch.no_grad(), probe_attention(tiny.info.n_layers) as probe:
        _, nll_B = read_group(tiny, probe, group, rendered)

    shown = [
        t
        for demo in group.demos
        for t in (*rendered[demo].prompt_ids, *rendered[demo].answer_ids, *tiny.renderer.separator_ids)
    ]
    for query, nll in zip(group.queries, nll_B, strict=True):
        long = RenderedRow([*shown, *rendered[query].prompt_ids], rendered[query].answer_ids)
        with torch.no_grad():
            expected_B, tokens_B = answer_nll(tiny, collate(tiny.renderer, [long], [0]))
        assert nll == pytest.approx(float(expected_B / tokens_B), rel=1e-4)


def test_the_mass_of_a_slot_is_taken_out() -> None:
    rng = np.random.default_rng(0)
    worth = rng.uniform(1, 2, size=(40, 1))
    collected = _Collected(40, 1)
    for start in range(0, 40, 4):
        demos = tuple(range(start, start + 4))
        sink = np.array([[20.0], [1.0], [1.0], [1.0]])  # the first slot draws twenty times the mass
        collected.add(Group(demos, (0,)), worth[list(demos)] * sink, gain=0.0, start=0)

    response_RN, quality_R = collected.finish()

    assert np.corrcoef(response_RN[:, 0], worth[:, 0])[0, 1] > 0.9
    assert (quality_R == 1).all()
