"""From Parameters to Data: adapt a base model through its attention heads, all or a few, and the rows that they respond to.

    from p2d import adapt
    result = adapt(model="smollm2", data="train.jsonl", out="out")

Names load when first used, so that `import p2d` costs nothing and leaves torch alone.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Read by OpenMP when torch loads. Waiting threads that spin make a busy machine crawl: one step of SmolLM2 on two cores
# at load 7 took 7 to 18 s, and 1.3 s when they sleep instead.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from p2d.adapters import load_adapter
    from p2d.client import Client
    from p2d.config import JobConfig
    from p2d.jobs import Result, adapt, identify_heads, select_data

_WHERE = {
    "adapt": "p2d.jobs",
    "identify_heads": "p2d.jobs",
    "select_data": "p2d.jobs",
    "Result": "p2d.jobs",
    "JobConfig": "p2d.config",
    "load_adapter": "p2d.adapters",
    "Client": "p2d.client",
}

__all__ = ["Client", "JobConfig", "Result", "adapt", "identify_heads", "load_adapter", "select_data"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'p2d' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])
