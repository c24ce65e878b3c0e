"""Two jobs that need the same output at the same time: one computes it, the other waits for it without keeping a worker."""

from __future__ import annotations

import itertools
import os
import signal

import pytest

from app.core import lifecycle
from app.core.lifecycle import StepFacts
from app.db.leases import claim, ready_by_queue
from app.db.projects import DEFAULT_PROJECT, open_project
from app.db.steps import Step
from p2d.config import DataConfig, HeadsConfig, JobConfig, TrainingConfig
from p2d.errors import Diverged
from tests.app.db.test_leases import begin, take
from tests.rig import Rig, wait_for

_seeds = itertools.count(5000)
"""A seed of its own for each test: the module's ledger is one, and what an earlier test computed would be used."""


@pytest.fixture
def config() -> JobConfig:
    """A job that nobody has computed."""
    training = TrainingConfig(seed=next(_seeds))
    return JobConfig(heads=HeadsConfig(proxy_rows=8), data=DataConfig(ratio=0.2), training=training)


def heads_of(rig: Rig, job_id: str) -> Step:
    return next(step for step in rig.steps(job_id) if step.step == "heads")


def outcomes(rig: Rig, job_id: str, step: str = "heads") -> list[str]:
    """How each attempt at the step ended."""
    return [attempt.outcome for attempt in rig.attempts(job_id) if attempt.step == step]


def computed(rig: Rig, step: str = "heads 0") -> int:
    """How often a child has begun the step."""
    return sum(line.startswith(f"{step} ") for line in rig.runs())


def done_but_heads(rig: Rig, job_id: str) -> bool:
    """Whether all has happened to the job that can without a head map."""
    return {step.step for step in rig.steps(job_id) if step.status == "done"} == {"validate", "respond"} and all(
        step.status == "done" for step in rig.steps(job_id) if step.step == "respond"
    )


def two_that_meet(rig: Rig, config: JobConfig) -> tuple[str, str]:
    """Two equal jobs, one of which computes the heads and is held there: that one first, the one that waits second."""
    both = [rig.submit(config=config) for _ in range(2)]
    wait_for(lambda: any(heads_of(rig, job_id).status == "running" for job_id in both), "the heads to be computed")
    rig.reached("heads")
    first, second = sorted(both, key=lambda job_id: heads_of(rig, job_id).status != "running")
    wait_for(lambda: done_but_heads(rig, second), "everything else of the job that waits")
    assert heads_of(rig, second).status == "ready"
    assert outcomes(rig, second) == []
    return first, second


def test_two_jobs_compute_an_equal_step_once_and_keep_one_worker_with_it(rig: Rig, config: JobConfig) -> None:
    with rig.in_process(2):
        earlier = rig.submit(kind="identify_heads", rows=50)
        assert rig.ended(earlier).status == "succeeded"
        with rig.db.begin() as conn:
            head_map = conn.exec_driver_sql("select id from head_maps where job_id = %s", (earlier,)).scalar_one()
        before = computed(rig)
        rig.steer("hold", "heads")
        first, second = two_that_meet(rig, config)

        other = rig.submit(rows=40, head_map=head_map)
        assert rig.ended(other).status == "succeeded", "the other worker is free"
        with rig.db.begin() as conn:
            assert ready_by_queue(conn) == {}, "nobody is woken for a step that waits"
        rig.let_go("heads")

        for job_id in (first, second):
            assert rig.ended(job_id).status == "succeeded"
            rig.check(job_id, like=first)
            assert outcomes(rig, job_id) == ["done"]
    assert computed(rig) == before + 1
    assert heads_of(rig, second).reused == {"job_id": first, "seconds": heads_of(rig, first).seconds}


def test_shards_of_two_jobs_are_each_computed_once(rig: Rig, config: JobConfig) -> None:
    with rig.in_process(2):
        both = [rig.submit(config=config) for _ in range(2)]
        for job_id in both:
            assert rig.ended(job_id).status == "succeeded"

    rig.check(both[0], like=both[1])
    assert [computed(rig, f"respond {shard}") for shard in range(3)] == [1, 1, 1]
    assert computed(rig) == 1


def test_the_one_that_waits_computes_when_the_other_is_cancelled(rig: Rig, config: JobConfig) -> None:
    rig.steer("hold", "heads")
    with rig.in_process(2):
        first, second = two_that_meet(rig, config)
        rig.cancel(first)
        assert rig.ended(first).status == "cancelled"
        wait_for(lambda: heads_of(rig, second).status == "running", "the other to compute")
        rig.let_go("heads")
        assert rig.ended(second).status == "succeeded"

    rig.check(first)
    rig.check(second)
    assert heads_of(rig, second).reused is None


def test_the_one_that_waits_goes_on_when_the_worker_of_the_other_is_killed(rig: Rig, config: JobConfig) -> None:
    rig.steer("hold", "heads")
    doomed = rig.worker()
    first = rig.submit(config=config)
    child = rig.reached("heads")
    with rig.in_process(1):
        second = rig.submit(config=config)
        wait_for(lambda: done_but_heads(rig, second), "everything else of the job that waits")
        os.kill(doomed.pid, signal.SIGKILL)
        doomed.wait()
        os.kill(child, signal.SIGKILL)
        rig.let_go("heads")
        for job_id in (first, second):
            assert rig.ended(job_id).status == "succeeded"

    rig.check(first)
    rig.check(second, like=first)
    assert outcomes(rig, first) == ["lost", "done"]
    assert outcomes(rig, second) == ["done"]
    assert computed(rig) == 2, "once in vain, once more, and then taken over"


def ready_twins(rig: Rig, *projects: str) -> list[str]:
    """Jobs with one step each to claim, whose outputs are the same."""
    found = [rig.submit(kind="identify_heads", project=project) for project in projects]
    with rig.db.begin() as conn:
        conn.exec_driver_sql(
            "update steps set status = case step when 'heads' then 'ready' when 'validate' then 'done' else 'blocked' end, "
            "fingerprint = case step when 'heads' then %s end where job_id = any(%s)",
            (f"same {next(_seeds)}", found),
        )
    return found


def test_two_claims_in_the_same_moment_do_not_take_equal_steps(rig: Rig) -> None:
    ready_twins(rig, DEFAULT_PROJECT, DEFAULT_PROJECT)
    with rig.db.begin() as slow:
        first = claim(slow, queue=rig.settings.worker_queue, worker="w", lease_s=60)
        second = take(rig)  # does not see the first, nor wait for it

    assert first is not None
    assert second is None
    assert take(rig) is None


@pytest.mark.parametrize("how", ["finish", "fail", "lose", "release", "cancel", "pause"])
def test_however_the_first_ends_the_next_is_claimed(rig: Rig, how: str) -> None:
    jobs = ready_twins(rig, DEFAULT_PROJECT, DEFAULT_PROJECT)
    lease = begin(rig)
    assert take(rig) is None

    if how in ("cancel", "pause"):
        getattr(rig, how)(lease.job_id)
        assert take(rig) is None, "it still computes"
    with rig.db.begin() as conn:
        if how == "finish":
            lifecycle.finish_step(conn, lease, [], StepFacts())
        elif how == "fail":
            lifecycle.fail_step(conn, lease, Diverged("no"))
        elif how == "lose":
            lifecycle.lose_step(conn, lease, max_crashes=1)
        else:
            lifecycle.release_step(conn, lease)

    if how == "release":  # the older one's turn again
        rig.cancel(lease.job_id)
    left = {begun.job_id for begun in iter(lambda: take(rig), None) if begun.step == "heads"}
    assert left == set(jobs) - {lease.job_id}


def test_an_equal_step_of_another_project_is_no_reason_to_wait(rig: Rig) -> None:
    with rig.db.begin() as conn:
        other = open_project(conn, "others")
    ready_twins(rig, DEFAULT_PROJECT, other)

    assert take(rig) is not None
    assert take(rig) is not None
