"""How long a job waits: its project's own work before it, a fair share of the others', and who works there."""

from __future__ import annotations

from typing import Any

import pytest

from app.core.outlook import wait_of
from app.db.estimates import Error
from app.db.waiting import Line
from tests.app.conftest import Api, a_job

SURE = {"train": Error(p10=1.0, p50=1.0, p90=1.0, runs=9)}


def seconds(
    *, own: float = 0, others: tuple[float, ...] = (), running: tuple[float, ...] = (), workers: int = 1
) -> float:
    """The middle of the wait, where estimates are always right."""
    line = Line(
        own={"train": own},
        others=tuple({"train": s} for s in others),
        running=tuple(("train", s) for s in running),
        workers=workers,
    )
    return wait_of(line, SURE).p50


def test_nobody_waits_for_an_idle_service() -> None:
    assert seconds() == 0
    assert seconds(workers=0) == 0
    assert seconds(running=(100.0,), workers=2) == 0


def test_busy_workers_are_waited_for_until_the_first_is_free() -> None:
    assert seconds(running=(100.0, 30.0), workers=2) == 30


def test_ones_own_work_comes_first_and_is_shared_by_the_workers() -> None:
    assert seconds(own=80) == 80
    assert seconds(own=80, workers=4) == 20


def test_another_project_delays_by_as_much_as_ones_own_work_at_most() -> None:
    assert seconds(own=10, others=(1000.0,)) == 20
    assert seconds(own=10, others=(4.0, 1000.0)) == 24
    assert seconds(own=0, others=(1000.0,)) == 0


def test_the_interval_is_as_wide_as_past_errors() -> None:
    line = Line(own={"train": 10.0}, others=(), running=(), workers=1)

    wait = wait_of(line, {"train": Error(p10=0.5, p50=1.1, p90=3.0, runs=9)})

    assert (wait.p10, wait.p50, wait.p90) == (5.0, 11.0, 30.0)


def test_a_job_waits_for_those_before_it_unless_its_priority_is_higher(api: Api) -> None:
    dataset = api.dataset()

    def wait(**fields: Any) -> dict[str, float]:
        found = api.http.post("/estimates", json=a_job(dataset=dataset, **fields)).json()
        assert "worker" in found["basis"]["wait"]
        return dict(found["wait"])

    alone = wait()
    first = api.post(a_job(dataset=dataset)).json()["id"]
    behind, ahead = wait(), wait(priority=5)
    paused = api.http.post(f"/jobs/{first}/pause").json()["status"]

    assert alone == ahead == {"p10": 0.0, "p50": 0.0, "p90": 0.0}
    assert 0 < behind["p10"] < behind["p50"] < behind["p90"]
    assert paused == "paused"
    assert wait()["p50"] == 0
    api.http.post(f"/jobs/{first}/cancel")


def test_a_job_that_has_no_plan_is_taken_to_last_as_such_jobs_did(api: Api) -> None:
    dataset = api.dataset(70)
    api.finish(api.post(a_job(dataset=dataset, reuse="never")).json()["id"])
    last = api.post(a_job(dataset=dataset, reuse="never")).json()["id"]

    found = api.http.post("/estimates", json=a_job(dataset=dataset)).json()

    assert "1 worker seen" in found["basis"]["wait"]
    assert 0 < found["wait"]["p50"] < 60  # the stub's steps take moments; those without a record are guessed at 278 s
    api.http.post(f"/jobs/{last}/cancel")


@pytest.mark.parametrize("priority", [0, 3])
def test_running_and_waiting_steps_of_the_queue_alone_count(api: Api, priority: int) -> None:
    dataset = api.dataset()
    job = api.post(a_job(dataset=dataset)).json()["id"]
    with api.engine.begin() as conn:
        conn.exec_driver_sql("update steps set queue = 'elsewhere' where job_id = %s", (job,))

    found = api.http.post("/estimates", json=a_job(dataset=dataset, priority=priority)).json()

    assert found["wait"]["p50"] == 0
    api.http.post(f"/jobs/{job}/cancel")
