"""A fresh rig for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.settings import Settings
from tests.rig import Rig, make_rig


@pytest.fixture
def rig(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    """Ledger, store, stub engine and workers on real servers; everything is stopped afterwards."""
    rig = make_rig(settings, tmp_path)
    monkeypatch.setenv("STUB_DIR", str(rig.stub))
    yield rig
    rig.stop()
