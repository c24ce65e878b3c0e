"""The exact twins of times and of peak memory: operations, bytes saved for backward, bytes alive at most.

Free of noise, so tests can assert them. Bytes are those of tensors' storages as PyTorch makes them; what a kernel takes for
itself inside is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


def count_flops(work: Callable[[], object]) -> int:
    """Operations of matrix products, backward included.

    PyTorch's counter knows no formula for the attention kernel that CPUs use and would count nothing there, so attention
    takes the plain products instead: every token then meets every other, whatever is masked.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def peak_extra_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """Most bytes alive at once beyond those before: by the allocator on a GPU, by counting storages on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _LiveBytes() as live:
        work()
    return int(live.peak)


class _LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, and takes them off when nobody holds them any more."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, ours=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor, ours=True)
        return result

    def _note(self, tensor: Tensor, *, ours: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if ours else 0

        def gone(_: object) -> None:
            self._now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@contextmanager
def saved_for_backward(weights: Iterable[Tensor]) -> Iterator[list[int]]:
    """Bytes of the activations that autograd keeps inside the block: one number in the list once it ends.

    Args:   weights: tensors that live anyway and do not count.
    """
    sizes: dict[int, int] = {}
    skip = {weight.untyped_storage()._cdata for weight in weights}
    keep: list[Any] = []  # a storage that were freed inside could give its address to another
    found: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in skip:
            sizes[storage._cdata] = storage.nbytes()
            keep.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
    found.append(sum(sizes.values()))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of these tensors, views of one storage counted apart."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
