"""What the child's process is given, and what not."""

from __future__ import annotations

import pytest

from app.settings import Settings
from workers.engine_process import _environment

SECRETS = [
    f"P2D_{name.upper()}" for name, field in Settings.model_fields.items() if "SecretStr" in str(field.annotation)
]


@pytest.mark.parametrize("name", [*SECRETS, "P2D_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "PGPASSWORD"])
def test_the_child_is_given_no_credential(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "canary")

    assert "canary" not in _environment().values()


@pytest.mark.parametrize("name", ["PATH", "CUDA_VISIBLE_DEVICES", "HF_HOME", "OMP_NUM_THREADS", "LC_ALL", "TMPDIR"])
def test_the_child_is_given_what_the_machine_is_set_up_with(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "here")

    assert _environment()[name] == "here"
