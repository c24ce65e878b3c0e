"""The engine tests' tiny model, for the benchmark's."""

from __future__ import annotations

from tests.p2d.conftest import _one_thread, tiny, tiny_dir

__all__ = ["_one_thread", "tiny", "tiny_dir"]
