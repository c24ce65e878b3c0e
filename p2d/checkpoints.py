"""One checkpoint = one directory: tensors as safetensors, everything else as JSON; whole or absent, never pickled.

What goes into a checkpoint is `p2d.training`'s business; moving one to another machine is the worker's.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from p2d.files import read_json, sha256_of, write_json

TENSORS, FACTS = "tensors.safetensors", "checkpoint.json"
KEPT = 2
"""Checkpoints left in a directory: the newest may be on its way to the store while the next is written."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state of training after `step` optimizer steps."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """JSON values; floats come back as the same doubles."""


def save_checkpoint(parent: Path, checkpoint: Checkpoint) -> Path:
    """Write `parent/step-NNNNNNNN`, which appears only when it is complete; older ones beyond KEPT are removed."""
    parent.mkdir(parents=True, exist_ok=True)
    final = parent / f"step-{checkpoint.step:08d}"
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=parent))
    try:
        save_file({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}, part / TENSORS)
        digest = sha256_of(part / TENSORS)
        write_json(part / FACTS, {"step": checkpoint.step, "sha256": digest, "facts": dict(checkpoint.facts)})
        for file in part.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in _steps(parent)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_checkpoint(directory: Path) -> Checkpoint | None:
    """The checkpoint in a directory, or the newest of the directories in it; None if there is no whole one.

    A broken checkpoint counts as none: starting over costs time only, the result is the same.
    """
    for place in [directory, *reversed(_steps(directory))]:
        try:
            value = read_json(place / FACTS)
            if sha256_of(place / TENSORS) == value["sha256"]:
                return Checkpoint(value["step"], load_file(place / TENSORS), value["facts"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            continue
    return None


def _steps(parent: Path) -> list[Path]:
    return sorted(parent.glob("step-*"))
