"""Which versions of what compute a job, and the one hash by which two computations are the same. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from p2d import __version__

ENGINE = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
"""Distributions whose version can change a result."""


def versions() -> dict[str, str]:
    """Name -> version of this product, of Python, and of what the engine uses where it is installed."""
    return dict(_versions())


@lru_cache(maxsize=1)  # reading them takes longer than all else that a request for a job computes
def _versions() -> dict[str, str]:
    found = {"p2d": __version__, "python": platform.python_version()}
    for name in ENGINE:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Sha256 over the engine's own source files: between two releases the version alone would miss a change."""
    digest, root = hashlib.sha256(), Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def fingerprint(facts: Mapping[str, Any]) -> str:
    """Sha256 of the canonical JSON of facts, with the code and the packages that compute: equal fingerprint, equal output."""
    whole = {**facts, "code": code_digest(), "versions": versions()}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
