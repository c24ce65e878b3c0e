"""Batches: the loss of a row's answer is the same alone, padded, and as transformers computes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2d.batches import MAX_PADDING, answer_nll, collate, mean_answer_nll, token_budget_batches
from p2d.models import BaseModel
from p2d.rendering import RenderedRow


def test_a_batch_marks_exactly_the_answers(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    batch = collate(tiny.renderer, rendered, [3, 0, 4])

    assert batch.rows == [3, 0, 4]
    for place, index in enumerate(batch.rows):
        row, ids = rendered[index], batch.input_ids_BT[place]
        own = int(batch.attention_mask_BT[place].sum())
        assert ids[:own].tolist() == tiny.renderer.prefix_ids + row.prompt_ids + row.answer_ids
        assert ids[batch.answer_mask_BT[place]].tolist() == row.answer_ids
        assert set(ids[own:].tolist()) <= {tiny.renderer.pad_id}
    assert batch.tokens == sum(tiny.renderer.length(rendered[index]) for index in (3, 0, 4))


def test_padding_changes_no_loss_and_transformers_agrees(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    with torch.no_grad():
        together, tokens_B = answer_nll(tiny, collate(tiny.renderer, rendered, range(5)))
        for index in range(5):
            batch = collate(tiny.renderer, rendered, [index])
            alone, _ = answer_nll(tiny, batch)
            labels = batch.input_ids_BT.masked_fill(~batch.answer_mask_BT, -100)
            module: Any = tiny.module
            theirs = module(batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=labels).loss
            assert float(together[index]) == pytest.approx(float(alone[0]), rel=1e-5)
            assert float(alone[0]) == pytest.approx(float(theirs) * int(tokens_B[index]), rel=1e-5)
    assert tokens_B.tolist() == [len(row.answer_ids) for row in rendered[:5]]


def test_the_mean_loss_weighs_tokens_not_rows(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    with torch.no_grad():
        nll_B, tokens_B = answer_nll(tiny, collate(tiny.renderer, rendered, range(len(rendered))))

    for budget in (1, 200, 10_000):
        assert mean_answer_nll(tiny, rendered, token_budget=budget) == pytest.approx(
            float(nll_B.sum() / tokens_B.sum()), rel=1e-5
        )


@given(st.lists(st.integers(1, 300), max_size=40), st.integers(1, 1000))
def test_budget_batches_hold_every_row_once_within_budget_and_padding(lengths: list[int], budget: int) -> None:
    batches = token_budget_batches(lengths, budget)

    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[index] for index in batch]
        assert len(batch) == 1 or max(sizes) * len(batch) <= budget
        assert max(sizes) <= MAX_PADDING * min(sizes)
    assert batches == token_budget_batches(lengths, budget)
