"""What nothing refers to leaves the store, and nothing else does: not under races, not while it waits to be registered."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import delete, text, update

from app.blobs import Blob, BlobStore
from app.core.garbage import Collected, ObjectBook, collect, drop_checkpoints, foresee, sweep_garbage
from app.core.moves import delete as delete_job
from app.db.artifacts import NewArtifact, insert_artifacts
from app.db.datasets import delete_dataset
from app.db.engine import Engine
from app.db.objects import condemn_objects, lock_condemned
from app.db.tables import artifacts, jobs, metadata, objects
from app.errors import ObjectCollected
from app.settings import Settings
from tests.app.test_cli import p2d
from tests.rig import Rig, make_rig, wait_for

KEPT_H = 24.0


@pytest.fixture
def rig(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """A rig whose store holds what this test puts there, and whose objects all seem old."""
    own = tmp_path / "store"
    rig = make_rig(settings.model_copy(update={"store_url": type(settings.store_url)(own.as_uri())}), tmp_path)  # type: ignore[misc]
    monkeypatch.setenv("STUB_DIR", str(rig.stub))
    with rig.db.begin() as conn:  # the database is the module's, the store this test's
        conn.execute(delete(objects))
    yield rig
    rig.stop()


def stored(rig: Rig) -> set[str]:
    """Hashes of all objects in the store."""
    root = Path(rig.settings.url("store_url").removeprefix("file://"))
    return {path.name for path in root.rglob("*") if path.is_file()}


def age(rig: Rig, hours: float = 2 * KEPT_H) -> None:
    """Let all objects have been used so long ago."""
    with rig.db.begin() as conn:
        conn.execute(update(objects).values(used_at=text(f"now() - interval '{hours} hours'")))


def put(store: BlobStore, folder: Path, content: str) -> Blob:
    """Put a small object."""
    path = folder / content
    path.write_text(content)
    return store.put_file(path)


def test_a_deleted_job_leaves_the_store_and_what_others_share_stays(rig: Rig) -> None:
    with rig.in_process():
        first, second = rig.submit(), rig.submit()
        assert {rig.ended(first).status, rig.ended(second).status} == {"succeeded"}
    mine, other = ({one.sha256 for one in rig.artifacts(job).values()} for job in (first, second))
    assert mine & other, "equal jobs share their equal files"
    assert mine - other, "their accounting differs"
    age(rig)
    assert collect(rig.db, rig.store, kept_h=KEPT_H).objects > 0  # old checkpoints
    before = stored(rig)
    assert mine | other <= before

    with rig.db.begin() as conn:
        delete_job(conn, first)
    foreseen = foresee(rig.db, kept_h=KEPT_H)
    done = collect(rig.db, rig.store, kept_h=KEPT_H)

    assert done == foreseen
    assert done.objects == len(mine - other)
    assert before - stored(rig) == mine - other
    rig.check(second)


def test_what_waits_to_be_registered_is_kept_for_a_day_and_may_come_back(rig: Rig, tmp_path: Path) -> None:
    blob = put(rig.store, tmp_path, "waiting")
    assert collect(rig.db, rig.store, kept_h=KEPT_H) == Collected(objects=0, size_bytes=0)

    age(rig)
    assert collect(rig.db, rig.store, kept_h=KEPT_H) == Collected(objects=1, size_bytes=7)
    assert stored(rig) == set()

    assert put(rig.store, tmp_path, "waiting") == blob
    assert collect(rig.db, rig.store, kept_h=KEPT_H).objects == 0
    assert stored(rig) == {blob.sha256}


def test_bytes_that_are_put_again_are_as_young_as_new_ones(rig: Rig, tmp_path: Path) -> None:
    blob = put(rig.store, tmp_path, "again")
    age(rig)
    put(rig.store, tmp_path, "again")  # writes nothing: the object is there

    collect(rig.db, rig.store, kept_h=KEPT_H)

    assert stored(rig) == {blob.sha256}


def test_registering_what_was_collected_meanwhile_is_refused(rig: Rig, tmp_path: Path) -> None:
    job_id = rig.submit()
    step_id = rig.steps(job_id)[0].id
    blob = put(rig.store, tmp_path, "late")
    collect(rig.db, rig.store, kept_h=0)
    new = NewArtifact(name="late", media_type="text/plain", sha256=blob.sha256, size_bytes=blob.size_bytes)

    with pytest.raises(ObjectCollected), rig.db.begin() as conn:
        insert_artifacts(conn, job_id, step_id, [new])

    put(rig.store, tmp_path, "late")
    with rig.db.begin() as conn:
        insert_artifacts(conn, job_id, step_id, [new])
    assert blob.sha256 in stored(rig)


def test_a_dataset_goes_with_its_deletion_but_not_while_a_job_reads_it(rig: Rig) -> None:
    job_id = rig.submit(rows=61)  # a dataset of this test alone
    job = rig.job(job_id)
    with rig.db.begin() as conn:
        delete_dataset(conn, job.dataset_id)
    age(rig)
    assert collect(rig.db, rig.store, kept_h=KEPT_H).objects == 0

    rig.cancel(job_id)
    assert collect(rig.db, rig.store, kept_h=KEPT_H).objects == 1


def test_a_checkpoint_is_kept_for_a_retry_until_its_days_are_over(rig: Rig) -> None:
    job_id = rig.submit()
    rig.steer("hold", "train", "3")
    with rig.in_process():
        rig.reached("train")
        rig.cancel(job_id)
        rig.let_go("train")
        rig.ended(job_id)

    def checkpoint() -> set[str]:
        return {sha for step in rig.steps(job_id) if step.checkpoint for sha in step.checkpoint["files"].values()}

    kept = checkpoint()
    assert kept
    age(rig)
    drop_checkpoints(rig.db, kept_d=7)
    collect(rig.db, rig.store, kept_h=KEPT_H)
    assert kept <= stored(rig)

    with rig.db.begin() as conn:
        conn.execute(update(jobs).where(jobs.c.id == job_id).values(finished_at=text("now() - interval '8 days'")))
    sweep_garbage(rig.db, rig.store, rig.settings)
    assert checkpoint() == set()
    assert not kept & stored(rig)
    rig.retry(job_id)
    with rig.in_process():
        assert rig.ended(job_id).status == "succeeded"
    rig.check(job_id)


def test_jobs_run_to_their_end_while_everything_unreferenced_is_collected_at_once(rig: Rig) -> None:
    stop = threading.Event()

    def rage() -> int:
        count = 0
        while not stop.wait(0.05):
            count += collect(rig.db, rig.store, kept_h=0).objects
        return count

    with ThreadPoolExecutor(2) as pool, rig.in_process(2):
        job_ids = [rig.submit() for _ in range(2)]
        collectors = [pool.submit(rage) for _ in range(2)]
        try:
            assert {rig.ended(job_id).status for job_id in job_ids} == {"succeeded"}
        finally:
            stop.set()
        assert sum(one.result() for one in collectors) > 0
    for job_id in job_ids:
        rig.check(job_id)
    collect(rig.db, rig.store, kept_h=0)
    live = {one.sha256 for job_id in job_ids for one in rig.artifacts(job_id).values()}
    assert live <= stored(rig)


def test_writers_of_the_same_few_bytes_race_two_collectors_and_lose_nothing(
    rig: Rig, tmp_path: Path, seed: int
) -> None:
    job_id = rig.submit()
    step_id = rig.steps(job_id)[0].id
    stop = threading.Event()
    refused: list[str] = []

    def write(number: int) -> None:
        rng = random.Random(seed + number)
        folder = tmp_path / str(number)
        folder.mkdir()
        for turn in range(25):
            name = f"{number}-{turn}"
            content = rng.choice("abc")
            while True:
                blob = put(rig.store, folder, content)
                new = NewArtifact(name=name, media_type="x", sha256=blob.sha256, size_bytes=blob.size_bytes)
                try:
                    with rig.db.begin() as conn:
                        insert_artifacts(conn, job_id, step_id, [new])
                    break
                except ObjectCollected:
                    refused.append(name)
            assert rig.store.exists(blob.sha256), "a live object was taken"
            with rig.db.begin() as conn:
                conn.execute(delete(artifacts).where(artifacts.c.job_id == job_id, artifacts.c.name == name))

    def rage() -> int:
        count = 0
        while not stop.is_set():
            count += collect(rig.db, rig.store, kept_h=0).objects
        return count

    with ThreadPoolExecutor(6) as pool:
        collectors = [pool.submit(rage) for _ in range(2)]
        writers = [pool.submit(write, number) for number in range(4)]
        try:
            for writer in writers:
                writer.result()
        finally:
            stop.set()
        assert sum(one.result() for one in collectors) > 10, "the race was none"


def test_a_writer_waits_until_the_same_bytes_are_gone_and_then_writes_them(rig: Rig, tmp_path: Path) -> None:
    blob = put(rig.store, tmp_path, "twice")
    age(rig)
    with rig.db.begin() as conn:
        condemned = condemn_objects(conn, kept_h=KEPT_H, limit=9)
    with ThreadPoolExecutor(1) as pool:
        with rig.db.begin() as conn:
            assert [one.sha256 for one in lock_condemned(conn, condemned)] == [blob.sha256]
            again = pool.submit(put, rig.store, tmp_path, "twice")
            wait_for(lambda: _waiting(rig.db), "the writer at the lock")
            rig.store.delete(blob.sha256)
            assert not again.done()
        assert again.result(30) == blob
    assert stored(rig) == {blob.sha256}


def _waiting(db: Engine) -> bool:
    with db.begin() as conn:
        query = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%objects%'"
        return bool(conn.execute(text(query)).scalar_one())


def test_a_collector_whose_transaction_is_gone_removes_nothing_more(rig: Rig, tmp_path: Path) -> None:
    for content in ("x", "y", "z"):
        put(rig.store, tmp_path, content)
    age(rig)

    class CutStore(BlobStore):
        def delete(self, sha256: str) -> None:
            super().delete(sha256)
            with rig.db.begin() as other:
                other.execute(text(
                    "select pg_terminate_backend(pid) from pg_stat_activity "
                    "where state = 'idle in transaction' and datname = current_database() and pid <> pg_backend_pid()"
                ))  # fmt: skip

    with pytest.raises(Exception, match=r"terminat|closed|connection"):
        collect(rig.db, CutStore(rig.store._store), kept_h=KEPT_H)

    assert len(stored(rig)) == 2


def test_the_command_says_what_it_would_remove_and_then_removes_it(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(rig.store, tmp_path, "litter")
    age(rig)
    for name in ("database_url", "store_url"):
        monkeypatch.setenv(f"P2D_{name.upper()}", rig.settings.url(name))

    assert p2d(capsys, monkeypatch, "gc", "--dry-run") == (0, "1 object, 0.0 MB would be removed.")
    assert len(stored(rig)) == 1
    assert p2d(capsys, monkeypatch, "gc") == (0, "Removed 1 object, 0.0 MB.")
    assert stored(rig) == set()


def test_every_column_that_names_an_object_counts_as_a_reference() -> None:
    named = {f"{table.name}.{column.name}" for table in metadata.tables.values() for column in table.columns
             if "sha256" in column.name}  # fmt: skip

    # `_referenced` in app/db/objects.py knows these, and steps.checkpoint. Uploads have their own prefix.
    known = {"artifacts.sha256", "datasets.sha256", "head_maps.sha256", "reports.sha256"}
    # What a user sent, before it became rows, is no object.
    assert named == {*known, "objects.sha256", "uploads.sha256", "upload_parts.sha256", "datasets.raw_sha256"}


class Interleavings(RuleBasedStateMachine):
    """Writers between their steps, deletions, time and collectors in any order, on one database and one folder."""

    db: Engine
    store: BlobStore
    folder: Path
    job_id: str
    step_id: str

    @initialize()
    def begin(self) -> None:
        with self.db.begin() as conn:
            conn.execute(delete(artifacts).where(artifacts.c.job_id == self.job_id))
            conn.execute(delete(objects))
        for path in (self.folder / "store").rglob("*"):
            if path.is_file():
                path.unlink()
        self.written: dict[str, Blob] = {}
        self.live: dict[str, Blob] = {}

    @rule(content=st.sampled_from("abc"))
    def put(self, content: str) -> None:
        self.written[content] = put(self.store, self.folder, content)

    @rule(content=st.sampled_from("abc"), name=st.sampled_from("12"))
    def register(self, content: str, name: str) -> None:
        if content not in self.written or name in self.live:
            return
        blob = self.written[content]
        new = NewArtifact(name=name, media_type="x", sha256=blob.sha256, size_bytes=blob.size_bytes)
        try:
            with self.db.begin() as conn:
                insert_artifacts(conn, self.job_id, self.step_id, [new])
        except ObjectCollected:
            assert not self.store.exists(blob.sha256), "refused although it is there"
            return
        self.live[name] = blob

    @rule(name=st.sampled_from("12"))
    def forget(self, name: str) -> None:
        self.live.pop(name, None)
        with self.db.begin() as conn:
            conn.execute(delete(artifacts).where(artifacts.c.job_id == self.job_id, artifacts.c.name == name))

    @rule()
    def pass_time(self) -> None:
        with self.db.begin() as conn:
            conn.execute(update(objects).values(used_at=text("used_at - interval '13 hours'")))

    @rule(kept_h=st.sampled_from([0.0, KEPT_H]))
    def collect(self, kept_h: float) -> None:
        collect(self.db, self.store, kept_h=kept_h)
        if kept_h == 0:
            live = {blob.sha256 for blob in self.live.values()}
            assert {path.name for path in (self.folder / "store").rglob("*") if path.is_file()} == live

    @invariant()
    def every_live_object_is_there(self) -> None:
        for blob in getattr(self, "live", {}).values():
            assert self.store.exists(blob.sha256)


def test_no_order_of_steps_loses_a_live_object(rig: Rig, tmp_path: Path) -> None:
    job_id = rig.submit()
    (tmp_path / "machine" / "store").mkdir(parents=True)
    folder = tmp_path / "machine"
    store = BlobStore.open((folder / "store").as_uri(), ObjectBook(rig.db))
    values = {"db": rig.db, "store": store, "folder": folder, "job_id": job_id, "step_id": rig.steps(job_id)[0].id}
    case = type("Case", (Interleavings,), values)
    case.TestCase.settings = hypothesis_settings(max_examples=25, stateful_step_count=20, deadline=None)  # type: ignore[attr-defined]

    case.TestCase().runTest()  # type: ignore[attr-defined]
