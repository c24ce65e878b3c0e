"""The child between two steps: it gives back what the last one took, and does not keep a model for ever."""

from __future__ import annotations

import io
import sys
from typing import Any

import psutil
import pytest

from tests.workers.test_wire import RUN
from workers import child
from workers.child import Child


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's allocator is told to give back")
def test_memory_that_a_step_has_freed_goes_back_to_the_system() -> None:
    process = psutil.Process()
    kept = [bytearray(60_000) for _ in range(5_000)]  # 300 MB in pieces that malloc keeps for itself
    last = bytearray(60_000)  # above them all, so that the heap cannot simply shrink
    full = process.memory_info().rss
    del kept

    child._give_back()

    assert full - process.memory_info().rss > 200_000_000
    assert last


def test_a_child_without_work_forgets_its_model_and_still_takes_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Child(lambda *_, **__: None, io.BytesIO(), io.BytesIO())
    monkeypatch.setattr(child, "WARM_S", 0.0)

    class Models:
        dropped = 0

        def drop(self) -> None:
            self.dropped += 1
            waiting._steps.put(RUN)

    models: Any = Models()
    waiting._models = models

    assert waiting._next() is RUN
    assert models.dropped == 1
