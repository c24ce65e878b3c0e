"""What an earlier job has computed is not computed again, is the same to the bit, and is never missed when it is gone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from app.core import moves
from app.db.projects import open_project
from p2d.config import DataConfig, HeadsConfig, JobConfig, TrainingConfig
from tests.rig import Rig
from workers.loop import Worker

MODEL_PASSES = {"heads 0", "respond 0", "respond 1", "respond 2"}

_seeds = itertools.count()


@pytest.fixture
def config() -> JobConfig:
    """A job that no other test has computed."""
    training = TrainingConfig(seed=next(_seeds))
    heads, data = HeadsConfig(ratio=0.1, proxy_rows=8), DataConfig(ratio=0.2, mode="faithful")
    return JobConfig(heads=heads, data=data, training=training)


@pytest.fixture
def worker(rig: Rig) -> Iterator[Worker]:
    """One worker for the whole test."""
    with rig.in_process() as (worker,):
        yield worker


def run(rig: Rig, worker: Worker, config: JobConfig, **more: Any) -> tuple[str, set[str]]:
    """A finished job and the steps that a child worked on for it."""
    before = len(rig.runs())
    job_id = rig.submit(config=config, **more)
    worker.wake()
    assert rig.ended(job_id).status == "succeeded"
    rig.check(job_id)
    return job_id, {" ".join(line.split()[:2]) for line in rig.runs()[before:]}


def told(rig: Rig, job_id: str, kind: str) -> dict[str, Any]:
    """What the job's one event of a kind says."""
    (data,) = [event.data for event in rig.events(job_id) if event.type == kind]
    return data


def hits(rig: Rig, job_id: str) -> list[dict[str, Any]]:
    return [event.data for event in rig.events(job_id) if event.type == "cache.hit"]


def test_another_ratio_of_heads_or_rows_costs_no_pass_over_the_model(
    rig: Rig, worker: Worker, config: JobConfig
) -> None:
    first, worked = run(rig, worker, config)
    assert worked >= MODEL_PASSES
    assert hits(rig, first) == []

    other = replace(config, heads=replace(config.heads, ratio=0.5), data=replace(config.data, ratio=0.4))
    cloned, worked = run(rig, worker, other)
    fresh, anew = run(rig, worker, replace(other, reuse="never"))

    assert worked == {"validate 0", "select 0", "train 0", "evaluate 0", "package 0"}
    assert anew == worked | MODEL_PASSES
    made = {job_id: rig.artifacts(job_id) for job_id in (first, cloned, fresh)}
    for name in ("head_map.json", "selection.jsonl", "responses-00002.safetensors"):
        assert made[cloned][name].sha256 == made[fresh][name].sha256
    assert rig.job(cloned).progress == 1.0
    steps = {(step.step, step.shard): step for step in rig.steps(first)}
    for hit in hits(rig, cloned):
        step = steps[hit["step"], hit["shard"]]
        assert (hit["job_id"], hit["seconds_saved"], hit["fingerprint"]) == (first, step.seconds, step.fingerprint)
    assert {f"{hit['step']} {hit['shard']}" for hit in hits(rig, cloned)} == MODEL_PASSES
    ranked = [told(rig, job_id, "heads.ranked") for job_id in (first, cloned, fresh)]
    assert [(one["kept"], one["heads"]) for one in ranked] == [(1, 8), (4, 8), (4, 8)]
    assert ranked[0]["best"] == ranked[1]["best"] == ranked[2]["best"]
    assert ranked[0]["best"][0] == {"layer": 1, "head": 3, "score": 10.0}
    assert len({one["head_map"] for one in ranked}) == 3
    scored = told(rig, cloned, "examples.scored")
    assert (scored["rows"], scored["kept"], scored["scorer"]) == (48, 4, "alignment_likelihood")


def test_what_a_reused_step_had_cost_stays_on_the_bill_of_every_later_job(
    rig: Rig, worker: Worker, config: JobConfig
) -> None:
    first, _ = run(rig, worker, config)
    second, _ = run(rig, worker, config)
    third, _ = run(rig, worker, config)

    took = {(step.step, step.shard): step.seconds for step in rig.steps(first)}
    for job_id in (second, third):  # the third takes from the second what that took from the first
        reused = report(rig, job_id)["reused"]
        assert {(one["step"], one["shard"]): one["seconds"] for one in reused} == {
            at: seconds for at, seconds in took.items() if f"{at[0]} {at[1]}" in MODEL_PASSES
        }
        assert {one["job_id"] for one in reused} == {first}
        assert "accounting-respond-00002.json" in report(rig, job_id)["files"]


def report(rig: Rig, job_id: str) -> dict[str, Any]:
    path = rig.settings.work_dir / "report.json"
    rig.store.fetch(rig.artifacts(job_id)["report.json"].sha256, path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_named_head_map_or_selection_counts_as_a_reused_step_does(
    rig: Rig, worker: Worker, config: JobConfig
) -> None:
    first, _ = run(rig, worker, config)
    with rig.db.begin() as conn:
        head_map = conn.exec_driver_sql("select id from head_maps where job_id = %s", (first,)).scalar_one()
        selection = conn.exec_driver_sql("select id from selections where job_id = %s", (first,)).scalar_one()

    named = replace(config, heads=HeadsConfig(head_map=head_map), data=DataConfig(selection=selection))
    second, worked = run(rig, worker, named)

    assert worked == {"validate 0", "train 0", "evaluate 0", "package 0"}
    reused = {f"{one['step']} {one['shard']}" for one in report(rig, second)["reused"]}
    assert reused == MODEL_PASSES | {"select 0"}
    assert "accounting-select.json" in report(rig, second)["files"]


@pytest.mark.parametrize("change", ["seed", "rows", "project", "fast_ratio"])
def test_what_would_come_out_otherwise_is_computed(rig: Rig, worker: Worker, config: JobConfig, change: str) -> None:
    if change == "fast_ratio":
        config = replace(config, data=replace(config.data, mode="fast"))
    run(rig, worker, config)

    if change == "seed":
        _, worked = run(rig, worker, replace(config, training=replace(config.training, seed=1000)))
    elif change == "rows":
        _, worked = run(rig, worker, config, rows=59)
    elif change == "project":  # that somebody else has asked the same is not for others to know
        with rig.db.begin() as conn:
            other = open_project(conn, "others")
        _, worked = run(rig, worker, config, project=other)
    else:  # the pool that is scored depends on the ratio; the proxies do not
        _, worked = run(rig, worker, replace(config, data=replace(config.data, ratio=0.3)))

    assert worked & MODEL_PASSES == MODEL_PASSES - ({"heads 0"} if change == "fast_ratio" else set())


def test_a_shard_that_the_earlier_job_did_not_reach_is_all_that_is_computed(
    rig: Rig, worker: Worker, config: JobConfig
) -> None:
    rig.steer("hold", "respond")
    first = rig.submit(config=config)
    rig.reached("respond")
    rig.cancel(first)
    assert rig.ended(first).status == "cancelled"
    rig.let_go("respond")
    done = {f"{step.step} {step.shard}" for step in rig.steps(first) if step.status == "done"}

    _, worked = run(rig, worker, config)

    assert done & MODEL_PASSES == {"heads 0"}
    assert worked & MODEL_PASSES == MODEL_PASSES - done


def test_outputs_that_are_gone_are_made_again(rig: Rig, worker: Worker, config: JobConfig) -> None:
    first, _ = run(rig, worker, config)
    rig.store.delete(rig.artifacts(first)["responses-00001.safetensors"].sha256)
    second, worked = run(rig, worker, config)
    assert worked & MODEL_PASSES == {"respond 1"}

    with rig.db.begin() as conn:  # condemned, and not yet removed
        gone = rig.artifacts(second)["responses-00002.safetensors"].sha256
        conn.exec_driver_sql(
            "update objects set stored_at = null, generation = generation + 1 where sha256 = %s", (gone,)
        )
    third, worked = run(rig, worker, config)
    assert worked & MODEL_PASSES == {"respond 2"}

    with rig.db.begin() as conn:
        for job_id in (first, second, third):
            moves.delete(conn, job_id)
    last, worked = run(rig, worker, config)

    assert worked >= MODEL_PASSES
    assert hits(rig, last) == []
