"""The bill leaves nothing out of the numerator and puts nothing foreign into it."""

from __future__ import annotations

import pytest

from p2d.accounting import Alternatives, Attempt, Bill, Reused, StepCost, attempts_of, bill


def cost(
    step: str,
    work_s: float,
    *,
    load_s: float = 0.0,
    shard: int = 0,
    parts: dict[str, float] | None = None,
    flops: int = 0,
    part_flops: dict[str, int] | None = None,
) -> StepCost:
    return StepCost(
        step=step,
        shard=shard,
        load_s=load_s,
        work_s=work_s,
        parts=parts or {},
        tokens=1,
        rows=1,
        flops=flops,
        part_flops=part_flops or {},
        peak_memory_bytes=1,
        device="cpu",
    )


COSTS = [
    cost("validate", 1),
    cost("heads", 10, load_s=2),
    cost("respond", 20, load_s=3),
    cost("respond", 30, shard=1),
    cost("select", 1),
    cost("train", 40, parts={"learning-rate search": 15}),
    cost("evaluate", 500, load_s=7),
    cost("package", 1),
]


def seconds(total: Bill, name: str) -> float:
    return next(line.seconds for line in total.lines if line.name == name)


def test_evaluation_is_shown_but_not_counted() -> None:
    total = bill(COSTS, [], Alternatives(full_s=216.0, lora_s=54.0))

    assert total.counted_s == 1 + 12 + 53 + 1 + 40 + 1
    assert seconds(total, "evaluate") == 507
    assert total.aer == pytest.approx(0.5)
    assert total.aer_lora == pytest.approx(2.0)


def test_the_lines_that_count_add_up_to_the_numerator() -> None:
    total = bill(COSTS, [Attempt(step="heads", status="done", seconds=14)], Alternatives())

    assert sum(line.seconds for line in total.lines if line.counted) == pytest.approx(total.counted_s)
    assert total.aer is None


def test_the_search_is_a_line_of_its_own_and_part_of_training() -> None:
    total = bill(COSTS, [], Alternatives())

    assert (seconds(total, "train: learning-rate search"), seconds(total, "train")) == (15, 25)


def test_failed_attempts_and_process_starts_count() -> None:
    attempts = [
        Attempt(step="heads", attempt=1, status="failed", seconds=9),
        Attempt(step="heads", attempt=2, status="done", seconds=12.5),  # 12 of them measured by the step itself
        Attempt(step="train", attempt=1, status="lost", seconds=4),
        Attempt(step="evaluate", attempt=1, status="failed", seconds=1000),
    ]
    total = bill(COSTS, attempts, Alternatives())

    assert seconds(total, "attempts that failed") == 13
    assert seconds(total, "start processes, move files") == 0.5
    assert total.counted_s == 108 + 13 + 0.5


def test_attempts_stopped_by_a_pause_count_but_are_no_failures() -> None:
    attempts = [
        Attempt(step="train", attempt=1, status="released", seconds=30),
        Attempt(step="train", attempt=2, status="lost", seconds=4),
        Attempt(step="train", attempt=3, status="done", seconds=40),
        Attempt(step="evaluate", attempt=1, status="released", seconds=1000),
    ]
    total = bill(COSTS, attempts, Alternatives())

    assert seconds(total, "attempts that were stopped") == 30
    assert seconds(total, "attempts that failed") == 4
    assert total.counted_s == 108 + 34


def test_what_an_earlier_job_computed_counts_on_lines_of_its_own_as_if_it_had_run() -> None:
    reused = [
        Reused(step="heads", seconds=14, job_id="job_1"),  # 12 of them measured by the step itself
        Reused(step="respond", shard=1, seconds=30.5, job_id="job_1"),
    ]
    looked_up = [
        Attempt(step="heads", status="done", seconds=0.25),
        Attempt(step="respond", shard=1, status="done", seconds=0.25),
    ]
    anew, total = bill(COSTS, [], Alternatives()), bill(COSTS, looked_up, Alternatives(full_s=1000.0), reused)

    assert seconds(total, "heads: proxies and scores (reused)") == 10
    assert seconds(total, "load the model (reused)") == 2
    assert seconds(total, "rows: responses (reused)") == 30
    assert seconds(total, "start processes, move files (reused)") == 2.5
    assert seconds(total, "rows: responses") == 20
    assert seconds(total, "start processes, move files") == 0.5
    assert total.counted_s == anew.counted_s + 2.5 + 0.5
    assert total.spent_s == total.counted_s - (10 + 2 + 30 + 2.5)
    assert total.aer == pytest.approx(total.counted_s / 1000)
    assert sum(line.seconds for line in total.lines if line.counted) == pytest.approx(total.counted_s)
    assert anew.spent_s == anew.counted_s
    assert not any(line.reused for line in anew.lines)


def test_operations_are_billed_beside_the_seconds_and_evaluation_is_not() -> None:
    costs = [
        cost("respond", 20, flops=30),
        cost("respond", 30, shard=1, flops=20),
        cost("train", 40, parts={"learning-rate search": 15}, flops=50, part_flops={"learning-rate search": 20}),
        cost("evaluate", 500, flops=10_000),
    ]

    total = bill(costs, [], Alternatives(full_flops=400, lora_flops=200))

    assert (total.counted_flops, total.aer_flop, total.aer_lora_flop) == (100, 0.25, 0.5)
    assert {line.name: line.flops for line in total.lines if line.flops and line.counted} == {
        "rows: responses": 50,
        "train: learning-rate search": 20,
        "train": 30,
    }


def test_attempts_come_as_whoever_ran_the_steps_wrote_them() -> None:
    entry = {"step": "heads", "shard": 0, "attempt": 2, "status": "done", "seconds": 1.5}

    assert attempts_of({"steps": [entry]}) == [Attempt(step="heads", shard=0, attempt=2, status="done", seconds=1.5)]
    assert attempts_of(None) == []
