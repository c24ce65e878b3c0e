"""Where and in which number type the engine computes: device, dtype, determinism, peak memory. Knows no model."""

from __future__ import annotations

import os
import resource
import sys

import torch
from torch import Tensor

from p2d.config import Precision
from p2d.errors import ConfigError

SHAPE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's cache of compiled shapes and PyTorch's own above it: both keep up to 1,024 entries of some 0.3 MiB each."""
CACHED_SHAPES = "128"
"""Entries of each. Packed lines have many lengths, so a bf16 job on a CPU filled both: 700 MiB, bit by bit. A micro-batch
needs some 60 shapes, again in every layer: SmolLM2's training steps took as long with 64 and 128 as with 1,024 (docs/LOG.md)."""

for _name in SHAPE_CACHES:  # read at the first product, so this is early enough; a user's own number stays
    os.environ.setdefault(_name, CACHED_SHAPES)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which cuBLAS need not repeat itself


def pick_device(name: str = "auto") -> torch.device:
    """`auto` = the first CUDA device, else the CPU. Raises ConfigError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"The device {name!r} is not available here.", device=name) from error
    return device


def backward(loss: Tensor) -> None:
    """`loss.backward()`, to the same bits each time on a GPU too: what is resumed must end as if never interrupted.

    By itself SDPA's flash kernel adds up rows of more than one of its blocks in any order. Only here, because elsewhere torch's
    deterministic ways wait for the device: they look at every index before they write to it.
    """
    if loss.device.type != "cuda":
        loss.backward()
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # Else every new tensor would be filled, with a launch of its own: a guard against bugs of another kind.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        loss.backward()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pick_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Type of the frozen weights and activations. Slices, optimizer state and scores are float32 whatever this says."""
    if precision == "fp32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    return torch.bfloat16 if bf16_is_fast(device) else torch.float32


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bf16 is the faster type here, by what the hardware is and not by a clock: the same job, the same numbers.

    On a CPU only matrix units count (AMX; bf16 of Arm). One that merely knows `avx512_bf16` multiplied fp32 up to twice as
    fast (docs/LOG.md).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("amx_bf16", "bf16"))
    return False


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the device where it counts, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_memory_bytes(device: torch.device) -> int:
    """What a device has that does not compute in the host's memory; 0 for a CPU."""
    return int(torch.cuda.mem_get_info(device)[1]) if device.type == "cuda" else 0
