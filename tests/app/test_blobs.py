"""One law book for every store: a local folder, and S3 as a real server speaks it."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from app.blobs import PART_BYTES, SMALL_BYTES, BlobStore
from app.errors import BlobCorrupt, BlobMissing, StoreUnavailable
from tests.s3_server import KEYS, free_ports


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlobStore:
    """Each kind of store in turn."""
    if request.param == "folder":
        return BlobStore.open((tmp_path / "a store").as_uri())
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    return BlobStore.open(request.getfixturevalue("s3_url"))


def a_file(tmp_path: Path, size: int, *, seed: int = 0) -> Path:
    path = tmp_path / f"file-{size}-{seed}"
    block = hashlib.sha512(f"{size} {seed}".encode()).digest()
    path.write_bytes((block * (size // len(block) + 1))[:size])
    return path


@pytest.mark.parametrize("size", [0, 1, 1000, SMALL_BYTES, SMALL_BYTES + 1, 2 * PART_BYTES + 12345])
def test_what_is_put_comes_back(store: BlobStore, tmp_path: Path, size: int) -> None:
    path = a_file(tmp_path, size)

    blob = store.put_file(path)

    assert blob.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert store.size(blob.sha256) == size
    assert store.fetch(blob.sha256, tmp_path / "new" / "copy") == blob
    assert (tmp_path / "new" / "copy").read_bytes() == path.read_bytes()
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "copy"]


@pytest.mark.parametrize("size", [2000, SMALL_BYTES + 2000])
def test_putting_the_same_again_or_at_once_is_one_object(store: BlobStore, tmp_path: Path, size: int) -> None:
    path = a_file(tmp_path, size)

    with ThreadPoolExecutor(8) as pool:
        blobs = set(pool.map(lambda _: store.put_file(path), range(8)))

    (blob,) = blobs
    assert store.put_file(path) == blob
    assert b"".join(store.stream(blob.sha256)) == path.read_bytes()


def test_a_range_is_the_bytes_between(store: BlobStore, tmp_path: Path) -> None:
    path = a_file(tmp_path, 3_000_000)
    sha256, content = store.put_file(path).sha256, path.read_bytes()

    for start, end in [(0, 1), (5, 2_500_001), (2_999_999, 3_000_000), (0, 3_000_000)]:
        assert b"".join(store.stream(sha256, start, end)) == content[start:end]
    assert b"".join(store.stream(sha256, 2_999_990)) == content[2_999_990:]


def test_what_is_not_there_is_named(store: BlobStore, tmp_path: Path) -> None:
    for read in (lambda: store.fetch("0" * 64, tmp_path / "x"), lambda: list(store.stream("0" * 64))):
        with pytest.raises(BlobMissing):
            read()
    assert not store.exists("0" * 64)
    assert not (tmp_path / "x").exists()


def test_deleting_is_final_and_may_be_repeated(store: BlobStore, tmp_path: Path) -> None:
    sha256 = store.put_file(a_file(tmp_path, 100, seed=7)).sha256

    store.delete(sha256)
    store.delete(sha256)

    assert not store.exists(sha256)


def test_a_store_that_answers_can_be_pinged(store: BlobStore) -> None:
    store.ping()


def test_changed_bytes_are_never_handed_out_as_the_object(tmp_path: Path) -> None:
    store = BlobStore.open((tmp_path / "store").as_uri())
    path = a_file(tmp_path, 500)
    sha256 = store.put_file(path).sha256
    (stored,) = (tmp_path / "store").rglob(sha256)

    stored.write_bytes(b"!" + path.read_bytes()[1:])
    with pytest.raises(BlobCorrupt):
        store.fetch(sha256, tmp_path / "copy")
    stored.write_bytes(path.read_bytes()[1:])
    with pytest.raises(BlobCorrupt):
        store.put_file(path)

    assert not (tmp_path / "copy").exists()


def test_a_store_that_is_away_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    store = BlobStore.open(f"s3://p2d?endpoint=http://127.0.0.1:{free_ports(1)[0]}")

    with pytest.raises(StoreUnavailable):
        store.ping()
    with pytest.raises(StoreUnavailable):
        store.put_file(a_file(tmp_path, 10))


@pytest.mark.parametrize("url", ["", "/tmp/x", "http://x/y", "s3://", "s3://b?key=secret", "gs://bucket"])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="store URL"):
        BlobStore.open(url)


@pytest.mark.parametrize("size", [1, PART_BYTES - 1, 2 * PART_BYTES + 1])
def test_a_part_of_an_upload_is_kept_until_it_is_deleted(store: BlobStore, tmp_path: Path, size: int) -> None:
    path, name = a_file(tmp_path, size, seed=9), f"upl_x.1.{'0' * 64}"

    for _ in range(2):
        store.put_part(name, path)

    assert b"".join(store.stream_part(name, "0" * 64)) == path.read_bytes()
    for _ in range(2):
        store.delete_part(name)
    with pytest.raises(BlobMissing):
        list(store.stream_part(name, "0" * 64))
