"""Laws of merged models on a worker's machine: whole or not there, brought once however many ask, gone when nobody uses them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.blobs import BlobStore
from app.errors import BlobMissing
from benchmarks.service import write_stub_model
from p2d.errors import ModelError
from p2d.model_info import digest_of, model_digest, read_model_info
from workers.bases import UNUSED_H, bring, drop_unused

NAME = "art_00000000000000000000000000"


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore.open(f"file://{tmp_path}/store")


@pytest.fixture
def files(tmp_path: Path, store: BlobStore) -> Mapping[str, str]:
    """A model in the store: name -> sha256."""
    write_stub_model(tmp_path / "model")
    return {path.name: store.put_file(path).sha256 for path in (tmp_path / "model").iterdir()}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where it belongs."""
    return tmp_path / "bases" / NAME


def there(place: Path) -> list[str]:
    """Everything beside the models, half ones too."""
    return sorted(path.name for path in place.parent.iterdir())


def grow_old(path: Path, hours: float) -> None:
    os.utime(path, (time.time() - hours * 3600,) * 2)


def test_it_is_brought_whole_and_then_used_without_the_store(
    store: BlobStore, files: Mapping[str, str], place: Path
) -> None:
    digest = digest_of(files)

    assert bring(store, files, place, digest) == place
    for sha256 in files.values():
        store.delete(sha256)
    assert bring(store, files, place, digest) == place

    assert there(place) == [NAME]
    assert read_model_info(place).digest == model_digest(place.parents[1] / "model") == digest


def test_workers_that_bring_it_at_once_have_one(store: BlobStore, files: Mapping[str, str], place: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: bring(store, files, place, digest_of(files)), range(8)))

    assert set(found) == {place}
    assert there(place) == [NAME]
    assert model_digest(place) == digest_of(files)


def test_what_is_not_all_in_the_store_is_not_there(store: BlobStore, files: Mapping[str, str], place: Path) -> None:
    store.delete(files["model.safetensors"])

    with pytest.raises(BlobMissing):
        bring(store, files, place, digest_of(files))

    assert there(place) == []


def test_another_model_than_the_job_was_made_with_is_refused(
    store: BlobStore, files: Mapping[str, str], place: Path
) -> None:
    with pytest.raises(ModelError):
        bring(store, files, place, "0" * 64)

    assert there(place) == []


def test_one_that_was_changed_is_brought_again(store: BlobStore, files: Mapping[str, str], place: Path) -> None:
    bring(store, files, place, digest_of(files))
    (place / "config.json").write_text("{}")

    bring(store, files, place, digest_of(files))

    assert model_digest(place) == digest_of(files)


def test_one_that_nobody_uses_is_dropped_and_a_use_keeps_it(
    store: BlobStore, files: Mapping[str, str], place: Path
) -> None:
    assert drop_unused(place.parent) == 0  # no folder yet
    bring(store, files, place, digest_of(files))
    half = place.with_name(f".{NAME}-killed")
    half.mkdir()

    grow_old(place, UNUSED_H - 1)
    assert drop_unused(place.parent) == 0
    grow_old(place, UNUSED_H + 1)
    bring(store, files, place, digest_of(files))
    assert drop_unused(place.parent) == 0
    for path in (place, half):
        grow_old(path, UNUSED_H + 1)
    assert drop_unused(place.parent) == 2

    assert there(place) == []
