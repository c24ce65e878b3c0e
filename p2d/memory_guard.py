"""Running out of memory, by whatever name torch or Python calls it, becomes one error of our own. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from p2d.errors import OutOfMemory

_HOST = "DefaultCPUAllocator"
"""In the message of a plain RuntimeError: torch's CPU allocator has no error class of its own."""
_DEVICE = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""The same of CUDA's libraries, which ask past torch's allocator."""


@contextmanager
def memory_guard(doing: str) -> Iterator[None]:
    """Turn running out of memory into OutOfMemory (`engine.out_of_memory`), with what was being done."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(f"The machine ran out of memory while {doing}.") from error
    except RuntimeError as error:
        text = str(error)
        if _HOST in text:
            raise OutOfMemory(f"The machine ran out of memory while {doing}.") from error
        # By name: planning imports this, and must not bring torch.
        if type(error).__name__ == "OutOfMemoryError" or any(words in text for words in _DEVICE):
            raise OutOfMemory(f"The device ran out of memory while {doing}.") from error
        raise
