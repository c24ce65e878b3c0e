"""Which versions of what compute a job, read from package metadata: nothing is imported for it."""

from __future__ import annotations

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version

from p2d import __version__

ENGINE = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
"""Distributions whose version can change a result."""


def versions() -> dict[str, str]:
    """Name -> version of this product, of Python, and of what the engine uses where it is installed."""
    found = {"p2d": __version__, "python": platform.python_version()}
    for name in ENGINE:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
