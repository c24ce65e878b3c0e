"""Jobs that ended long ago go by themselves where the operator wants it, and only those that nobody needs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.core import lifecycle, moves
from app.core.garbage import clear, sweep_garbage
from app.core.lifecycle import StepFacts
from app.core.retention import drop_jobs, old_jobs
from app.core.submit import find_inputs
from app.db.artifacts import NewArtifact
from app.db.audit import list_entries
from app.db.datasets import get_dataset
from app.db.jobs import get_job
from app.db.projects import DEFAULT_PROJECT, open_project
from app.errors import HeadMapNotFound, JobInUse
from app.settings import Settings
from p2d.errors import Diverged
from tests.app.core.test_moves import somebody_waits
from tests.app.db.test_leases import begin, take
from tests.app.test_cli import p2d
from tests.rig import Rig, make_rig, wait_for


@pytest.fixture
def rig(settings: Settings, tmp_path: Path) -> Iterator[Rig]:
    """A ledger without workers: these tests play them."""
    rig = make_rig(settings, tmp_path)
    yield rig
    with rig.db.begin() as conn:  # the module's ledger is one, and old jobs of another test would go too
        conn.exec_driver_sql("delete from jobs")
    rig.stop()


def work_off(rig: Rig) -> None:
    """Finish all that can be claimed; `heads` gives a head map."""
    while (lease := take(rig)) is not None:
        path = rig.settings.work_dir / "file"
        path.write_text(f"{lease.job_id} {lease.step}")
        blob = rig.store.put_file(path)
        name = "head_map.json" if lease.step == "heads" else f"{lease.step}-{lease.shard}.json"
        file = NewArtifact(name=name, media_type="application/json", sha256=blob.sha256, size_bytes=blob.size_bytes)
        with rig.db.begin() as conn:
            lifecycle.begin_step(conn, lease)
            lifecycle.finish_step(conn, lease, [file], StepFacts())


def a_done_job(rig: Rig, project: str = DEFAULT_PROJECT) -> str:
    job_id = rig.submit(kind="identify_heads", project=project)
    work_off(rig)
    assert rig.job(job_id).status == "succeeded"
    return job_id


def age(rig: Rig, *job_ids: str, days: float = 31) -> None:
    """Let these jobs have ended that long ago."""
    with rig.db.begin() as conn:
        past = f"update jobs set finished_at = finished_at - interval '{days} days' where id = any(%s)"
        conn.exec_driver_sql(past, (list(job_ids),))


def left(rig: Rig) -> set[str]:
    with rig.db.begin() as conn:
        return set(conn.exec_driver_sql("select id from jobs").scalars())


def head_map_of(rig: Rig, job_id: str) -> str:
    with rig.db.begin() as conn:
        return str(conn.exec_driver_sql("select id from head_maps where job_id = %s", (job_id,)).scalar_one())


def test_a_job_that_ended_long_ago_goes_as_if_its_user_had_deleted_it(rig: Rig) -> None:
    with rig.db.begin() as conn:
        project = open_project(conn, "lab")
    old, new, failed = a_done_job(rig, project=project), a_done_job(rig), rig.submit()
    lease = begin(rig)
    with rig.db.begin() as conn:
        assert lifecycle.fail_step(conn, lease, Diverged("no")).id == failed
    running = rig.submit()
    begin(rig)
    dataset, hashes = rig.job(old).dataset_id, {file.sha256 for file in rig.artifacts(old).values()}
    age(rig, old, failed, running)
    age(rig, new, days=29)

    sweep_garbage(rig.db, rig.store, rig.settings.model_copy(update={"jobs_kept_d": 30.0}))

    assert left(rig) == {new, running}
    with rig.db.begin() as conn:
        assert get_dataset(conn, dataset) is not None
        for table in ("steps", "attempts", "events", "artifacts", "head_maps"):
            query = f"select count(*) from {table} where job_id = any(%s)"
            assert conn.exec_driver_sql(query, ([old, failed],)).scalar_one() == 0, table
        (entry,) = list_entries(conn, limit=10, object_id=old)
    assert (entry.actor, entry.action, entry.project_id) == ("service", "job.delete", project)
    assert entry.facts == {"sha256": sorted(hashes), "kept_d": 30.0}
    assert all(rig.store.exists(sha256) for sha256 in hashes), "they have their hours as all deleted files"
    with rig.db.begin() as conn:
        conn.exec_driver_sql("update objects set used_at = used_at - interval '25 hours'")
    sweep_garbage(rig.db, rig.store, rig.settings)
    assert not any(rig.store.exists(sha256) for sha256 in hashes)


def test_jobs_stay_for_ever_unless_the_operator_says_otherwise(rig: Rig) -> None:
    old = a_done_job(rig)
    age(rig, old, days=10_000)

    assert clear(rig.db, rig.store, rig.settings)[0] == 0

    assert left(rig) == {old}


@pytest.mark.parametrize("status", ["queued", "running", "paused", "failed", "cancelled"])
def test_a_job_whose_head_map_another_may_still_read_stays(rig: Rig, status: str) -> None:
    maker = a_done_job(rig)
    reader = rig.submit(kind="select_data", head_map=head_map_of(rig, maker))
    if status in ("running", "failed"):
        lease = begin(rig)
        if status == "failed":
            with rig.db.begin() as conn:
                lifecycle.fail_step(conn, lease, Diverged("no"))
    elif status != "queued":
        (rig.pause if status == "paused" else rig.cancel)(reader)
    assert rig.job(reader).status == status
    age(rig, maker)

    assert drop_jobs(rig.db, kept_d=30) == 0

    if status in ("failed", "cancelled"):  # both old: the reader goes first, its maker then
        age(rig, reader)
        assert drop_jobs(rig.db, kept_d=30) == 1
        assert left(rig) == {maker}
        assert drop_jobs(rig.db, kept_d=30) == 1


def test_a_job_whose_reader_has_succeeded_goes(rig: Rig) -> None:
    maker = a_done_job(rig)
    reader = rig.submit(kind="select_data", head_map=head_map_of(rig, maker))
    work_off(rig)
    age(rig, maker)

    assert drop_jobs(rig.db, kept_d=30) == 1

    assert left(rig) == {reader}


def test_a_job_that_is_retried_in_that_moment_stays(rig: Rig) -> None:
    job_id = rig.submit()
    rig.cancel(job_id)
    age(rig, job_id)
    with ThreadPoolExecutor(1) as pool:
        with rig.db.begin() as conn:
            moves.request_retry(conn, job_id)
            dropping = pool.submit(drop_jobs, rig.db, kept_d=30)
            wait_for(lambda: somebody_waits(rig), "the sweep to wait for the retry")
        assert dropping.result(30) == 0

    assert rig.job(job_id).status == "queued"


def test_a_job_that_is_about_to_be_read_stays_and_one_that_is_about_to_go_is_not_read(rig: Rig) -> None:
    maker = a_done_job(rig)
    reader = rig.submit(kind="select_data", head_map=head_map_of(rig, maker))
    rig.cancel(reader)
    job = rig.job(reader)

    with ThreadPoolExecutor(1) as pool:
        with rig.db.begin() as conn:  # as a retry, or a new job, that has not been committed yet
            find_inputs(conn, job)
            conn.exec_driver_sql("update jobs set status = 'queued', finished_at = null where id = %s", (reader,))
            deleting = pool.submit(try_to_delete, rig, maker)
            wait_for(lambda: somebody_waits(rig), "the deletion to wait for the reader")
        assert deleting.result(30) == "in use"
    rig.cancel(reader)
    with ThreadPoolExecutor(1) as pool:
        with rig.db.begin() as conn:
            moves.delete(conn, maker)
            reading = pool.submit(rig.retry, reader)
            wait_for(lambda: somebody_waits(rig), "the reader to wait for the deletion")
        with pytest.raises(HeadMapNotFound):
            reading.result(30)

    with rig.db.begin() as conn:
        assert get_job(conn, maker) is None


def try_to_delete(rig: Rig, job_id: str) -> str:
    try:
        with rig.db.begin() as conn:
            moves.delete(conn, job_id)
    except JobInUse:
        return "in use"
    return "deleted"


def test_the_command_says_how_many_jobs_would_go(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    age(rig, a_done_job(rig), a_done_job(rig))
    for name in ("database_url", "store_url"):
        monkeypatch.setenv(f"P2D_{name.upper()}", rig.settings.url(name))
    monkeypatch.setenv("P2D_JOBS_KEPT_D", "30")

    code, said = p2d(capsys, monkeypatch, "gc", "--dry-run")
    assert (code, said.split(",")[0]) == (0, "2 jobs")
    assert len(old_jobs(rig.db, kept_d=30)) == 2
    code, said = p2d(capsys, monkeypatch, "gc")
    assert (code, said.split(",")[0]) == (0, "Removed 2 jobs")
    assert left(rig) == set()
