"""One suite over every data scorer: a shard is a pure function of its range and leaves the model alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from p2d.config import DATA_SCORERS, WITHOUT_RESPONSES, DataConfig, JobConfig
from p2d.errors import Cancelled
from p2d.models import BaseModel
from p2d.pipeline import Progress, no_progress
from p2d.registry import load
from p2d.responses import DataScorer, ResponseInput
from tests.factories import some_rows

every_scorer = pytest.mark.parametrize("name", sorted(DATA_SCORERS))
ROWS = some_rows(14)


def scorer(name: str) -> DataScorer:
    found: DataScorer = load(DATA_SCORERS, name, what="data scorer", pointer="/data/scorer")
    return found


def given(base: BaseModel, span: range, progress: Progress = no_progress) -> ResponseInput:
    return ResponseInput(
        base=base,
        rows=ROWS,
        guide=some_rows(4, first=50),
        span=span,
        slices=("v", "o"),
        config=JobConfig(data=DataConfig(mode="faithful", n_demos=3, n_queries=2)),
        progress=progress,
    )


@every_scorer
def test_a_shard_is_a_pure_function_of_its_range(tiny: BaseModel, name: str) -> None:
    first = scorer(name)(given(tiny, range(3, 9))).shard
    scorer(name)(given(tiny, range(5)))  # another shard in between leaves no trace
    again = scorer(name)(given(tiny, range(3, 9))).shard

    assert first.span == range(3, 9)
    assert first.response_RN.tobytes() == again.response_RN.tobytes()
    assert (first.quality_R is None) == (again.quality_R is None)
    if first.quality_R is not None and again.quality_R is not None:
        assert first.quality_R.tobytes() == again.quality_R.tobytes()


@every_scorer
def test_every_row_and_scored_head_gets_a_finite_response(tiny: BaseModel, name: str) -> None:
    shard = scorer(name)(given(tiny, range(len(ROWS)))).shard

    assert shard.row_R.tolist() == list(range(len(ROWS)))
    assert shard.response_RN.shape == (len(ROWS), len(shard.layers) * tiny.info.n_heads)
    assert np.isfinite(shard.response_RN).all()
    assert shard.combine in ("quality", "pass") or len(np.unique(shard.response_RN[:, 0])) > 1
    assert (shard.combine == "response") == (shard.quality_R is None)
    if shard.quality_R is not None:
        assert shard.quality_R.shape == (len(ROWS),)
        assert np.isfinite(shard.quality_R).all()
        assert (shard.quality_R >= 0).all() or shard.combine != "product"


@every_scorer
def test_a_single_row_can_be_a_shard(tiny: BaseModel, name: str) -> None:
    shard = scorer(name)(given(tiny, range(5, 6))).shard

    assert shard.response_RN.shape[0] == 1


@every_scorer
def test_scoring_leaves_the_model_as_it_was(tiny: BaseModel, name: str) -> None:
    before = {key: value.clone() for key, value in tiny.module.state_dict().items()}

    scorer(name)(given(tiny, range(4)))

    assert all(torch.equal(value, before[key]) for key, value in tiny.module.state_dict().items())
    assert is_clean(tiny)


@pytest.mark.parametrize("name", sorted(set(DATA_SCORERS) - WITHOUT_RESPONSES))
def test_a_cancelled_scorer_leaves_the_model_clean(tiny: BaseModel, name: str) -> None:
    def cancel(done: int, total: int, metrics: Mapping[str, float], /) -> None:
        raise Cancelled("asked to stop")

    with pytest.raises(Cancelled):
        scorer(name)(given(tiny, range(4), cancel))

    assert is_clean(tiny)


def is_clean(base: BaseModel) -> bool:
    hooks = [module for module in base.module.modules() if module._forward_hooks]
    grads = [p for p in base.module.parameters() if p.requires_grad or p.grad is not None]
    return not hooks and not grads
