"""The whole service as a user starts it: embedded servers, API and worker as processes, a tiny base model."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.embedded import remove
from app.service import Service, running
from app.settings import Settings
from p2d.client import Client
from tests.factories import tiny_model_dir

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
"""The name that the README's walk uses; here it is a random model of 265,152 weights."""


@pytest.fixture(scope="session")
def service() -> Iterator[Service]:
    """Started once; blank and umlaut in its path on purpose."""
    home = Path(tempfile.gettempdir()) / f"p2d e2e ä {secrets.token_hex(4)}"
    # Short leases, so that a killed worker is missed within seconds.
    quick = {"poll_s": 0.5, "lease_s": 8, "heartbeat_s": 1, "reconcile_s": 1}
    settings = Settings.model_validate({"home": home, "port": 0, "api_processes": 2, **quick})
    tiny_model_dir(settings.models_dir / MODEL, context_length=1024)
    try:
        with running(settings, say=print) as service:
            yield service
    finally:
        remove(home)


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample dataset with the layout of `examples/gsm8k`, cut to its shortest rows: the tiny model counts bytes."""
    folder = tmp_path_factory.mktemp("cwd") / "examples" / "gsm8k"
    folder.mkdir(parents=True)
    for name, count in (("train.jsonl", 40), ("test.jsonl", 16)):
        rows = [json.loads(line) for line in (ROOT / "examples" / "gsm8k" / name).read_text("utf-8").splitlines()]
        rows.sort(key=lambda row: len(row["question"] + row["answer"]))
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), "utf-8")
    return folder
