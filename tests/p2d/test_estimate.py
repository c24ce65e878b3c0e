"""An estimate grows with the work it foresees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from p2d import estimate
from p2d.config import DATA_SCORERS, WITHOUT_RESPONSES, DataConfig, HeadsConfig, JobConfig
from p2d.estimate import Speed, estimate_flops, estimate_seconds
from p2d.model_info import ModelInfo
from p2d.pipeline import ModelCache, StepCall, run_step
from p2d.plans import RowCounts
from p2d.resolution import resolve
from p2d.rows import write_rows
from tests.factories import some_rows

SMOLLM2 = ModelInfo(
    name="m", digest="d", model_type="llama", n_layers=30, n_heads=9, n_kv_groups=3, head_dim=64, hidden_size=576,
    intermediate_size=1536, vocab_size=49152, context_length=8192, parameters=134_515_008, dtype="bf16",
)  # fmt: skip


def rows(count: int) -> RowCounts:
    return RowCounts(rows=count, tokens=200 * count, answer_tokens=100 * count, longest=400)


def seconds(recipe: str = "default", count: int = 300, flop_per_s: float = 1e11) -> dict[str, float]:
    config = resolve(JobConfig(recipe=recipe), rows=count, context_length=8192, head_dim=64, validation_guide=24).config
    return estimate_seconds(SMOLLM2, config, Speed(flop_per_s), train=rows(count), guide=rows(24), evaluation=rows(36))


def test_every_step_has_an_estimate() -> None:
    assert set(seconds()) == {"heads", "respond", "select", "train", "evaluate", "package"}
    assert all(value > 0 for value in seconds().values())


def test_responses_grow_with_the_rows_and_the_proxy_does_not() -> None:
    small, large = (seconds("paper", count=count) for count in (1000, 10_000))

    assert 8 < large["respond"] / small["respond"] < 11
    assert large["heads"] < 1.1 * small["heads"]


def test_a_job_that_trains_all_heads_pays_nothing_for_choosing_them() -> None:
    def flops(**asked: HeadsConfig) -> dict[str, float]:
        config = resolve(JobConfig(**asked), rows=2000, context_length=8192, head_dim=64).config  # type: ignore[arg-type]
        return estimate_flops(SMOLLM2, config, train=rows(2000), guide=rows(24))

    assert flops()["heads"] == 0
    assert flops(heads=HeadsConfig(ratio=1.0))["heads"] == 0
    assert flops(heads=HeadsConfig(scorer="random"))["heads"] == 0
    assert flops(heads=HeadsConfig(ratio=0.1))["heads"] > 0
    assert seconds()["heads"] < 10 < seconds("paper")["heads"]  # what loading takes


def test_a_faster_device_needs_less() -> None:
    assert seconds(flop_per_s=1e12)["train"] * 9 < seconds(flop_per_s=1e11)["train"]


@pytest.mark.parametrize("data", [DataConfig(scorer="uniform"), DataConfig(scorer="random")])
def test_a_scorer_that_looks_at_no_row_costs_next_to_nothing(data: DataConfig) -> None:
    config = resolve(JobConfig(data=data), rows=300, context_length=8192, head_dim=64).config

    found = estimate_seconds(SMOLLM2, config, Speed(1e11), train=rows(300), guide=rows(24), evaluation=rows(36))

    assert (found["respond"], found["select"]) == (0, 0.5)


def test_words_cost_seconds_and_no_operation() -> None:
    config = resolve(JobConfig(), rows=2000, context_length=8192, head_dim=64).config

    found = estimate_seconds(SMOLLM2, config, Speed(1e11), train=rows(2000), guide=rows(24), evaluation=rows(36))

    assert config.data.scorer == "lexical"
    assert 0.5 < found["respond"] < 5
    assert found["select"] > 0.5  # rows that repeat others are looked for
    assert estimate_flops(SMOLLM2, config, train=rows(2000), guide=rows(24))["respond"] == 0


def test_where_the_guide_decides_a_sample_is_foreseen_and_all_rows_trained_but_for_a_job_that_asks_for_scores() -> None:
    def flops(**asked: Any) -> dict[str, float]:
        config = resolve(JobConfig(**asked), rows=2000, context_length=8192, head_dim=64, validation_guide=24).config
        return estimate_flops(SMOLLM2, config, train=rows(2000), guide=rows(24))

    left, half = flops(), flops(data=DataConfig(ratio=0.5))
    assert left["train"] > 1.7 * half["train"]  # the search for a rate is the same
    assert left["respond"] < 0.15 * half["respond"]
    assert flops(kind="select_data")["respond"] == half["respond"]


def test_every_shard_is_foreseen_to_pass_over_the_guide() -> None:
    def respond(count: int, guide: int, **of: int) -> float:
        config = resolve(JobConfig(data=DataConfig(ratio=0.5)), rows=count, context_length=8192, head_dim=64).config
        return estimate_flops(SMOLLM2, config, train=rows(count), guide=rows(guide), **of)["respond"]

    guide_of_one = respond(2000, 64) - respond(2000, 32)
    assert respond(2000, 64, shard_rows=500) - respond(2000, 64) == pytest.approx(3 * 2 * guide_of_one)
    assert respond(4000, 64) == pytest.approx(2 * respond(2000, 64))
    assert respond(4000, 64) - respond(4000, 32) == pytest.approx(2 * (respond(2000, 64) - respond(2000, 32)))


def test_a_fast_job_foresees_less_scoring() -> None:
    def found(**data: object) -> dict[str, float]:
        config = resolve(JobConfig(data=DataConfig(**data)), rows=5000, context_length=8192, head_dim=64).config  # type: ignore[arg-type]
        return estimate_seconds(SMOLLM2, config, Speed(1e11), train=rows(5000), guide=rows(24), evaluation=rows(36))

    for scorer in sorted(set(DATA_SCORERS) - WITHOUT_RESPONSES):
        faithful, fast = (found(scorer=scorer, ratio=0.1, mode=mode) for mode in ("faithful", "fast"))
        assert fast["respond"] < 0.35 * faithful["respond"], scorer
    assert found(scorer="icl", ratio=0.1, metric="rouge_l")["respond"] > found(scorer="icl", ratio=0.1)["respond"]


def test_a_job_is_planned_for_as_many_shards_as_it_has(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []

    def foresee(*given: Any, shard_rows: int, **more: Any) -> dict[str, float]:
        heard.append(shard_rows)
        return estimate_seconds(*given, shard_rows=shard_rows, **more)

    monkeypatch.setattr(estimate, "estimate_seconds", foresee)
    write_rows(tmp_path / "dataset.jsonl", some_rows(40))
    call = StepCall(
        step="validate",
        config=JobConfig(heads=HeadsConfig(proxy_rows=8)),
        model_dir=tiny_dir,
        inputs=tmp_path,
        out=tmp_path / "out",
        device="cpu",
        shard_rows=7,
    )

    run_step(call, models=ModelCache())

    assert heard == [7]
