"""Laws of compressed files: the same rows and lines as plain, never more bytes than allowed, broken streams named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from p2d.errors import DatasetError, DatasetTooLarge
from p2d.formats import READERS
from p2d.rows import Format
from p2d.validation import DataFile, DatasetLimits, DatasetReport, check_files
from tests.p2d.test_rows import WRITERS


def as_zstd(content: bytes) -> bytes:
    packed: bytes = pyarrow.Codec("zstd").compress(content, asbytes=True)
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": as_zstd}
ROWS = [{"question": f"q{number}", "answer": f"a{number}"} for number in range(200)]


def check(tmp_path: Path, content: bytes, name: str = "upload", **limits: int) -> DatasetReport:
    path = tmp_path / "sent"
    path.write_bytes(content)
    try:
        return check_files(
            [DataFile(path=path, name=name)], DatasetLimits(**limits), normalised=tmp_path / "rows.jsonl"
        )
    finally:
        assert {left.name for left in tmp_path.iterdir()} <= {"sent", "rows.jsonl"}, "something unpacked was left"


@pytest.mark.parametrize("compression", PACKERS)
@pytest.mark.parametrize("format", READERS)
def test_a_compressed_file_of_any_format_is_the_same_dataset(tmp_path: Path, format: Format, compression: str) -> None:
    plain = WRITERS[format](ROWS)
    packed = PACKERS[compression](plain)

    report = check(tmp_path, packed, "misleading.bin")

    assert (report.format, report.compression, report.rows) == (format, compression, 200)
    assert report.content_hash == check(tmp_path, plain).content_hash
    assert report.size_bytes == len(packed)


@pytest.mark.parametrize(("compression", "suffix"), [("gzip", ".gz"), ("zstd", ".ZST")])
def test_the_name_below_the_compression_still_tells_csv(tmp_path: Path, compression: str, suffix: str) -> None:
    content = b"[question],question,answer\nx,q,a\n"  # would else be taken for a JSON array

    assert check(tmp_path, PACKERS[compression](content), "data.csv" + suffix).format == "csv"


@pytest.mark.parametrize("compression", PACKERS)
def test_bad_lines_are_numbered_as_in_the_unpacked_file(tmp_path: Path, compression: str) -> None:
    lines = WRITERS["jsonl"](ROWS).splitlines(keepends=True)
    lines[6], lines[150] = b"{}\n", b"no\n"

    with pytest.raises(DatasetError) as refused:
        check(tmp_path, PACKERS[compression](b"".join(lines)))

    assert [detail.line for detail in refused.value.errors] == [7, 151]


@pytest.mark.parametrize("compression", PACKERS)
def test_streams_one_after_the_other_are_one_file(tmp_path: Path, compression: str) -> None:
    pack, plain = PACKERS[compression], WRITERS["jsonl"](ROWS)

    assert check(tmp_path, pack(plain[:999]) + pack(plain[999:])).rows == 200


@pytest.mark.parametrize("compression", PACKERS)
def test_a_small_file_that_unpacks_to_a_huge_one_is_refused_as_it_unpacks(tmp_path: Path, compression: str) -> None:
    bomb = PACKERS[compression](b"\0" * (100 << 20))
    assert len(bomb) < 200_000

    tracemalloc.start()
    with pytest.raises(DatasetTooLarge):
        check(tmp_path, bomb, max_bytes=4 << 20)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert peak < 8 << 20


@pytest.mark.parametrize("compression", PACKERS)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda packed: packed[:-1], "cut off"),
        (lambda packed: packed[: len(packed) // 2], "cut off"),
        (lambda packed: packed[:5], "cut off"),
        (lambda packed: packed + b"more", "followed by bytes"),
        (lambda packed: packed + b"\0" * 20, "followed by bytes"),
        (lambda packed: packed[:40] + bytes(byte ^ 0xFF for byte in packed[40:60]) + packed[60:], "broken"),
    ],
)
def test_a_damaged_stream_is_refused_by_one_clear_error(
    tmp_path: Path, compression: str, damage: Callable[[bytes], bytes], said: str
) -> None:
    packed = PACKERS[compression](WRITERS["jsonl"](ROWS))

    with pytest.raises(DatasetError) as refused:
        check(tmp_path, damage(packed))

    assert [detail.code for detail in refused.value.errors] == ["dataset.compression"]
    assert compression in refused.value.text
    assert said in refused.value.text


def as_zip(content: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("data.jsonl", content)
    return sink.getvalue()


def as_tar(content: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        member = tarfile.TarInfo("data.jsonl")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return sink.getvalue()


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (as_zip, "zip archive"),
        (as_tar, "tar archive"),
        (lambda content: gzip.compress(as_tar(content)), "tar archive"),
        (bz2.compress, "bzip2"),
        (lzma.compress, "xz"),
        (lambda content: gzip.compress(as_zstd(content)), "twice"),
    ],
)
def test_archives_and_other_compressions_are_refused_by_name(
    tmp_path: Path, pack: Callable[[bytes], bytes], said: str
) -> None:
    with pytest.raises(DatasetError, match=said):
        check(tmp_path, pack(WRITERS["jsonl"](ROWS)))
