"""Settings of stage 2 that contradict each other are refused when a job is sent, each with a pointer to the field."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from p2d import adapt
from p2d.config import (
    DATA_SCORERS,
    WITHOUT_RESPONSES,
    DataConfig,
    HeadsConfig,
    JobConfig,
    Limits,
    Mode,
    TrainingConfig,
    pool_count,
)
from p2d.config_checks import check, check_given_heads
from p2d.errors import ConfigError
from p2d.resolution import resolve


def refused(config: JobConfig) -> Iterator[tuple[str, str | None]]:
    with pytest.raises(ConfigError) as caught:
        check(config)
    for error in caught.value.errors:
        yield error.code, error.pointer or ""


@pytest.mark.parametrize("metric", ["token_accuracy", "exact_match", "rouge_l"])
def test_a_metric_wants_a_scorer_that_judges_answers(metric: str) -> None:
    for scorer in set(DATA_SCORERS) - {"icl"}:
        wrong = JobConfig(data=DataConfig(scorer=scorer, metric=metric))  # type: ignore[arg-type]
        assert list(refused(wrong)) == [("config.metric", "/data/metric")]
    check(JobConfig(data=DataConfig(scorer="icl", metric=metric)))  # type: ignore[arg-type]


def test_the_recipes_own_scorer_counts_where_none_is_named() -> None:
    check(JobConfig(recipe="paper", data=DataConfig(metric="rouge_l")))

    assert list(refused(JobConfig(recipe="default", data=DataConfig(metric="rouge_l")))) == [
        ("config.metric", "/data/metric")
    ]


def test_controls_are_named_once_and_beside_an_adapter() -> None:
    check(JobConfig(controls=("lora", "random_data")))
    twice = JobConfig(controls=("lora", "lora"))
    alone = JobConfig(kind="select_data", controls=("lora",))
    for wrong in (twice, alone):
        assert list(refused(wrong)) == [("config.controls", "/controls")]


def test_fast_mode_is_refused_for_all_but_the_combination_that_was_measured() -> None:
    def fast(scorer: str = "auto", **other: Any) -> JobConfig:
        return JobConfig(data=DataConfig(scorer=scorer, mode="fast"), **other)

    wrong = [fast(scorer) for scorer in set(DATA_SCORERS) - {"alignment_likelihood"}]
    wrong += [fast(recipe="paper"), fast("alignment_likelihood", recipe="paper")]
    wrong += [fast(heads=HeadsConfig(scorer="pad")), fast(training=TrainingConfig(slices=("v",)))]
    for config in wrong:
        assert list(refused(config)) == [("config.mode", "/data/mode")]
        if config.data.scorer not in WITHOUT_RESPONSES:
            resolve(config, rows=1000, context_length=64, head_dim=64)  # a benchmark may

    with pytest.raises(ConfigError, match="1 field") as caught:
        check(fast("information"))
    assert (
        "'attribution', the data scorer 'alignment_likelihood' and the slices v, o alone"
        in caught.value.errors[0].message
    )
    check(fast())
    check(fast("alignment_likelihood", heads=HeadsConfig(scorer="attribution")))
    named = TrainingConfig(slices=("o", "v"))
    check(fast("alignment_likelihood", recipe="paper", heads=HeadsConfig(scorer="attribution"), training=named))


def test_a_head_map_that_is_given_decides_the_head_scorer_and_so_whether_fast_mode_may_be() -> None:
    given = JobConfig(heads=HeadsConfig(head_map="map"), data=DataConfig(mode="fast"))
    check(given)  # nobody has looked into the map yet
    check_given_heads(given, "attribution")
    check_given_heads(JobConfig(heads=HeadsConfig(head_map="map")), "pad")  # faithful, by itself

    with pytest.raises(ConfigError) as caught:
        check_given_heads(given, "pad")
    (fault,) = caught.value.errors
    assert (fault.code, fault.pointer) == ("config.mode", "/data/mode")
    assert "as good for the head scorer 'pad'" in fault.message
    assert "heads.head_map" in fault.message

    resolution = resolve(given, rows=1000, context_length=64, head_dim=64, map_scorer="pad")
    assert resolution.config.heads.scorer == "pad"
    assert "head map that is given" in resolution.reasons["/heads/scorer"]


def test_a_faithful_job_scores_every_row() -> None:
    assert pool_count(DataConfig(ratio=0.1, mode="faithful"), 1000) == 1000


def test_a_fast_job_scores_a_pool() -> None:
    fast = DataConfig(ratio=0.1, mode="fast")

    assert 100 < pool_count(fast, 1000) <= 300
    assert pool_count(DataConfig(ratio=0.9, mode="fast"), 1000) == 1000


@pytest.mark.parametrize(
    ("recipe", "mode", "scorer"),
    [
        ("default", "faithful", "alignment_likelihood"),
        ("default", "fast", "alignment_likelihood"),
        ("paper", "faithful", "icl"),
        ("paper", "fast", "icl"),
    ],
)
def test_each_mode_has_the_recipes_scorer_and_obeys_a_named_one(recipe: str, mode: Mode, scorer: str) -> None:
    def resolved(data: DataConfig) -> str:
        return resolve(
            JobConfig(recipe=recipe, data=data), rows=1000, context_length=64, head_dim=64
        ).config.data.scorer

    assert resolved(DataConfig(mode=mode)) == scorer
    assert resolved(DataConfig(mode=mode, scorer="information")) == "information"


def test_a_word_that_no_field_knows_is_refused_from_python_too_with_all_the_others() -> None:
    wrong: Any = JobConfig(
        kind="adopt",  # type: ignore[arg-type]
        controls=("random_rows",),  # type: ignore[arg-type]
        data=DataConfig(mode="quick", scorer="icl", metric="bleu"),  # type: ignore[arg-type]
        training=TrainingConfig(precision="fp8", slices=("v", "z")),  # type: ignore[arg-type]
    )

    assert [pointer for code, pointer in refused(wrong) if code == "config.unknown_word"] == [
        "/kind",
        "/controls",
        "/data/mode",
        "/data/metric",
        "/training/precision",
        "/training/slices",
    ]


def test_a_deadline_is_one_moment_everywhere() -> None:
    for wrong in ("x", "2026-11-24", "2026-11-24T12:00:00"):
        assert list(refused(JobConfig(limits=Limits(deadline=wrong)))) == [("config.deadline", "/limits/deadline")]
    for right in ("2026-11-24T12:00:00Z", "2026-11-24T12:00:00+01:00", None):
        check(JobConfig(limits=Limits(deadline=right)))


def test_every_field_of_a_wrong_type_is_named_before_any_value_is_judged() -> None:
    heads: Any = HeadsConfig(scorer=3, ratio="all", proxy_rows=True)  # type: ignore[arg-type]
    data: Any = DataConfig(ratio="0.1", n_demos=5.0, mode="quick")  # type: ignore[arg-type]
    training: Any = TrainingConfig(
        slices="vo",  # type: ignore[arg-type]
        epochs=2.5,  # type: ignore[arg-type]
        learning_rate="1e-3",  # type: ignore[arg-type]
        batch_size=None,  # type: ignore[arg-type]
        seed=-1,
    )
    limits: Any = {"max_seconds": 60}
    wrong = JobConfig(heads=heads, data=data, training=training, controls="random_data", limits=limits)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        check(wrong)

    assert {error.code for error in caught.value.errors} == {"config.wrong_type"}
    assert {str(error.pointer): error.message for error in caught.value.errors} == {
        "/heads/scorer": "Expected text, got int 3.",
        "/heads/ratio": "Expected a number or 'auto', got str 'all'.",
        "/heads/proxy_rows": "Expected a whole number or 'auto', got bool True.",
        "/data/ratio": "Expected a number or 'auto', got str '0.1'.",
        "/data/n_demos": "Expected a whole number, got float 5.0.",
        "/training/slices": "Expected a tuple of 'q' or 'k' or 'v' or 'o' or 'auto', got str 'vo'.",
        "/training/epochs": "Expected a whole number or 'auto', got float 2.5.",
        "/training/learning_rate": "Expected a number or 'auto', got str '1e-3'.",
        "/training/batch_size": "Expected a whole number, got NoneType.",
        "/controls": "Expected a tuple of 'random_heads' or 'random_data' or 'lora', got str 'random_data'.",
        "/limits": "Expected Limits, got dict.",
    }
    check(JobConfig(data=DataConfig(ratio=1), training=TrainingConfig(learning_rate=1)))  # a whole number is a number


def test_a_job_that_is_no_config_at_all_is_refused_by_its_type() -> None:
    with pytest.raises(ConfigError) as caught:
        adapt(model="none", data="none", out="none", config={"kind": "adapt"})  # type: ignore[arg-type]

    assert [error.message for error in caught.value.errors] == ["Expected JobConfig, got dict."]
