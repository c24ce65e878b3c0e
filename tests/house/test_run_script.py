"""`./run` installs what a command needs and is not there yet, and nothing twice. pip is a double that notes its arguments."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the script and the lock, with a Python that only writes down what it is asked."""
    for name in ("run", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n')
    python.chmod(0o755)
    return tmp_path


def installed(checkout: Path, command: str) -> list[str]:
    """The extras that `./run COMMAND` has pip install."""
    asked = checkout / "asked"
    asked.unlink(missing_ok=True)
    subprocess.run(["sh", checkout / "run", command], capture_output=True, check=False)
    lines = [line for line in asked.read_text().splitlines() if "pip install" in line]
    return [line.rpartition(".[")[2].rstrip("]") for line in lines]


def test_more_extras_serve_a_command_that_needs_fewer(checkout: Path) -> None:
    assert installed(checkout, "doctor") == ["engine,embedded"]
    assert installed(checkout, "doctor") == []
    assert installed(checkout, "bench") == ["engine,embedded,bench"]
    assert installed(checkout, "doctor") == []
    assert installed(checkout, "quality") == []
    assert installed(checkout, "test") == ["engine,embedded,bench,test"]
    assert installed(checkout, "bench") == []


def test_a_new_lock_renews_all_that_was_there(checkout: Path) -> None:
    assert installed(checkout, "bench") == ["engine,embedded,bench"]
    with (checkout / "constraints.txt").open("a") as file:
        file.write("# another lock\n")

    assert installed(checkout, "doctor") == ["engine,embedded,bench"]
    assert installed(checkout, "doctor") == []
