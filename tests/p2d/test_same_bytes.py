"""What is stored by its hash must have one: the same content written twice is the same file."""

from __future__ import annotations

from pathlib import Path

from p2d.models import BaseModel
from p2d.response_matrix import save_shard
from tests.p2d.test_adapters import trained_adapter
from tests.p2d.test_selection import a_shard

TIMES = 12
"""Two metadata entries in random order would agree so often by chance once in 2,000 runs."""


def test_equal_response_shards_are_equal_files(tmp_path: Path) -> None:
    path = tmp_path / "responses-00000.safetensors"
    shard = a_shard([[0, 1, 2, 3]], [0.5], combine="product")

    written = set()
    for _ in range(TIMES):
        save_shard(path, shard)
        written.add(path.read_bytes())

    assert len(written) == 1


def test_equal_adapters_are_equal_files(tiny: BaseModel, tmp_path: Path) -> None:
    written = set()
    for _ in range(TIMES):
        trained_adapter(tiny, tmp_path)
        written.add(tuple((tmp_path / name).read_bytes() for name in ("heads.safetensors", "manifest.json")))

    assert len(written) == 1
