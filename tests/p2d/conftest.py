"""Tiny models and rows that the engine's tests share; made once, loaded afresh for each test that asks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from p2d.models import BaseModel
from p2d.rendering import RenderedRow
from tests.factories import some_rows, tiny_model_dir
from tests.loaded import loaded


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template: 3 layers, 6 heads in 2 KV groups, fp32."""
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny(tiny_dir: Path) -> BaseModel:
    """The tiny model, of one test alone."""
    return loaded(tiny_dir)


@pytest.fixture
def rendered(tiny: BaseModel) -> list[RenderedRow]:
    """Twelve rows as the tiny model reads them."""
    return [tiny.renderer.render(row) for row in some_rows(12)]
