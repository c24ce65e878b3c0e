"""A fingerprint has everything that its step reads of the job, and nothing that it does not: watched on the real steps."""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from p2d import steps
from p2d.config import (
    DATA_SCORERS,
    HEAD_SCORERS,
    RATING_SCORERS,
    WITHOUT_RESPONSES,
    Auto,
    DataConfig,
    HeadsConfig,
    JobConfig,
    Kind,
    TrainingConfig,
    pool_count,
)
from p2d.pipeline import ModelCache, StepCall, run_step
from p2d.plans import Plan, load_plan
from p2d.rows import write_rows
from p2d.step_fingerprints import fields_read, step_fingerprint
from tests.factories import some_rows

CONFIG = JobConfig(
    heads=HeadsConfig(proxy_rows=8),
    data=DataConfig(ratio=0.5, n_demos=3, n_queries=2),
    training=TrainingConfig(epochs=1, learning_rate=1e-3),
)


class Watched:
    """A config that notes which of its fields are looked at."""

    def __init__(self, value: Any, seen: set[str], prefix: str = "") -> None:
        self._value, self._seen, self._prefix = value, seen, prefix

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._value, name)
        if is_dataclass(value):
            return Watched(value, self._seen, f"{self._prefix}{name}.")
        self._seen.add(f"{self._prefix}{name}")
        return value


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The fields of the plan's config that steps have looked at."""
    seen: set[str] = set()

    def watched_plan(path: Path) -> Plan:
        plan = load_plan(path)
        return replace(plan, config=Watched(plan.config, seen))  # type: ignore[arg-type]

    monkeypatch.setattr(steps, "load_plan", watched_plan)
    return seen


def run(step: str, config: JobConfig, tiny_dir: Path, folder: Path) -> JobConfig:
    """Run a step behind `validate`; the resolved config."""
    write_rows(folder / "dataset.jsonl", some_rows(30))
    models = ModelCache()
    for name in ("validate", step):
        call = StepCall(step=name, config=config, model_dir=tiny_dir, inputs=folder, out=folder, device="cpu")
        run_step(call, models=models)
    return load_plan(folder / "plan.json").config


@pytest.mark.parametrize("scorer", sorted(HEAD_SCORERS))
def test_heads_reads_the_fields_of_its_fingerprint(scorer: str, tiny_dir: Path, tmp_path: Path, seen: set[str]) -> None:
    recipe = "paper" if scorer in ("pad", "kl", "cosine") else "default"
    config = replace(CONFIG, recipe=recipe, heads=replace(CONFIG.heads, scorer=scorer))

    resolved = run("heads", config, tiny_dir, tmp_path)

    named = set(fields_read("heads", resolved))
    assert seen == named


@pytest.mark.parametrize("mode", ["faithful", "fast"])
@pytest.mark.parametrize("scorer", sorted(DATA_SCORERS))
def test_respond_reads_the_fields_of_its_fingerprint(
    scorer: str, mode: Any, tiny_dir: Path, tmp_path: Path, seen: set[str]
) -> None:
    if scorer in WITHOUT_RESPONSES and mode == "fast":
        pytest.skip("there is no such mode")
    config = replace(CONFIG, data=replace(CONFIG.data, scorer=scorer, mode=mode, ratio=0.3))

    resolved = run("respond", config, tiny_dir, tmp_path)

    named = set(fields_read("respond", resolved))
    # Whether the ratio is left open is asked, and its number then not used.
    assert seen - named <= ({"data.ratio", "kind"} if scorer in RATING_SCORERS else set())
    assert named - seen <= {"training.seed", "data.metric"}  # read where rows are drawn, and where answers are judged


FACTS: dict[str, Any] = {
    "shard": 0,
    "shards": 2,
    "config": replace(CONFIG, data=replace(CONFIG.data, scorer="alignment")),
    "files": {"rows.jsonl": "r", "guide.jsonl": "g", "plan.json": "p"},
    "model": ("tiny", "d"),
    "device": "cuda:0",
    "engine": "p2d.pipeline:run_step",
}


@pytest.mark.parametrize("step", ["heads", "respond"])
def test_every_fact_but_the_plans_other_words_is_in_the_fingerprint(step: str) -> None:
    same = step_fingerprint(step, **FACTS)

    assert same == step_fingerprint(step, **FACTS | {"device": "cuda:1", "files": FACTS["files"] | {"plan.json": "q"}})
    for other in (
        {"shard": 1},
        {"shards": 3},
        {"files": FACTS["files"] | {"rows.jsonl": "s"}},
        {"files": FACTS["files"] | {"guide.jsonl": "s"}},
        {"model": ("tiny", "e")},
        {"device": "cpu"},
        {"engine": "tests.stub_engine:run_step"},
    ):
        assert step_fingerprint(step, **FACTS | other) != same, other


def test_a_ratio_or_a_training_setting_costs_no_pass_over_the_model_and_a_seed_does() -> None:
    def changed(**groups: Any) -> set[str]:
        config = replace(FACTS["config"], **groups)
        before = {step: step_fingerprint(step, **FACTS) for step in ("heads", "respond")}
        return {step for step in before if step_fingerprint(step, **FACTS | {"config": config}) != before[step]}

    config: JobConfig = FACTS["config"]
    assert changed(heads=replace(config.heads, ratio=0.4)) == set()
    assert changed(data=replace(config.data, ratio=0.2)) == set()
    assert (
        changed(training=replace(config.training, epochs=9, learning_rate=1.0, rank=2), controls=("random_data",))
        == set()
    )
    assert changed(training=replace(config.training, seed=1)) == {"heads", "respond"}
    assert changed(training=replace(config.training, batch_size=2)) == {"heads"}
    assert changed(data=replace(config.data, scorer="icl")) == {"respond"}
    assert changed(data=replace(config.data, mode="fast", ratio=0.2)) == {"respond"}
    assert changed(data=replace(config.data, ratio="auto")) == set()


def test_a_ratio_that_is_left_open_is_another_pass_where_a_sample_may_be_all_that_is_scored() -> None:
    def of(kind: Kind, ratio: float | Auto) -> str:
        config = replace(FACTS["config"], kind=kind, data=DataConfig(scorer="alignment_likelihood", ratio=ratio))
        return step_fingerprint("respond", **FACTS | {"config": config})

    assert of("adapt", "auto") != of("adapt", 0.5) == of("select_data", "auto")


def test_where_fast_mode_leaves_no_row_unscored_another_ratio_costs_no_pass() -> None:
    def scored(ratio: float) -> tuple[str, list[int]]:
        data = DataConfig(scorer="alignment_likelihood", mode="fast", ratio=ratio)
        config = replace(FACTS["config"], data=data)
        return step_fingerprint("respond", **FACTS | {"config": config}), [pool_count(data, n) for n in range(1, 3000)]

    assert scored(0.4) == scored(0.5) == scored(1.0) == (scored(0.4)[0], list(range(1, 3000)))
    assert scored(0.39) != scored(0.4)
    assert scored(0.3)[0] != scored(0.2)[0]


def test_the_code_and_the_packages_are_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = step_fingerprint("heads", **FACTS)

    monkeypatch.setattr("p2d.versions.code_digest", lambda: "other")
    assert (other := step_fingerprint("heads", **FACTS)) != before
    monkeypatch.setattr("p2d.versions.versions", lambda: {"torch": "9"})
    assert step_fingerprint("heads", **FACTS) not in (before, other)
