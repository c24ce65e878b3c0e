"""Running out of memory, by whatever name torch or Python calls it, becomes one error of our own. No torch here."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from p2d.errors import OutOfMemory

_HOST = ("DefaultCPUAllocator", os.strerror(errno.ENOMEM))
"""In the message of a plain RuntimeError or OSError: torch's CPU allocator has no error class of its own, nor has a file that
could not be mapped (torch says it as a RuntimeError, safetensors as an OSError without a number)."""
_ONEDNN = re.compile(r"could not create a (primitive(?! descriptor)|memory object)")
"""What oneDNN says when a kernel's own memory is not to be had; a descriptor needs none, and fails for other reasons."""
_DEVICE = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""The same of CUDA's libraries, which ask past torch's allocator."""


@contextmanager
def memory_guard(doing: str) -> Iterator[None]:
    """Turn running out of memory into OutOfMemory (`engine.out_of_memory`), with what was being done."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(f"The machine ran out of memory while {doing}.") from error
    except (OSError, RuntimeError) as error:
        text = str(error)
        if any(words in text for words in _HOST):
            raise OutOfMemory(f"The machine ran out of memory while {doing}.") from error
        if said := _ONEDNN.search(text):
            doubt = f"oneDNN {said[0]}, which can have another cause"
            raise OutOfMemory(f"The machine seems to have run out of memory while {doing}: {doubt}.") from error
        # By name: planning imports this, and must not bring torch.
        if type(error).__name__ == "OutOfMemoryError" or any(words in text for words in _DEVICE):
            raise OutOfMemory(f"The device ran out of memory while {doing}.") from error
        raise
