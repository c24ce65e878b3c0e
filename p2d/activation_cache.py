"""What the frozen layers below the shallowest trained one make of a row is computed once, then remembered.

Training passes the same rows through the same frozen layers in every epoch, in every trial of the learning rate, and at
every look at held-out rows. While `remember_below` is on, `p2d.batches` runs those layers for each row *by itself*, keeps
what they give, and runs only the layers above for the batch. Alone, because in the last bit a matrix product depends on the
shape of the batch: so remembering, spilling to disk, computing again and resuming in another process all give the same bits.

Legend: B batch, T token, D model width.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from torch import Tensor, nn

from p2d.models import BaseModel

MEMORY_SHARE = 0.25
"""Of the host memory that is free at the beginning: most that is kept there. A guess."""
DISK_SHARE = 0.5
"""Of the free space of the folder: most that is kept there once memory is full. A guess."""


class ActivationStore:
    """Activations by row, in host memory up to a budget, then in an unnamed file that is gone with this process."""

    def __init__(self, *, memory_bytes: int, file: IO[bytes] | None = None, file_bytes: int = 0) -> None:
        self._room, self._file_room, self._file = memory_bytes, file_bytes, file
        self._end = 0
        self._held: dict[bytes, Tensor] = {}
        self._spilled: dict[bytes, tuple[int, torch.Size, torch.dtype]] = {}

    def get(self, key: bytes) -> Tensor | None:
        """What was kept under a key, on the host; None if there was no room for it."""
        if key in self._held:
            return self._held[key]
        if key not in self._spilled or self._file is None:
            return None
        start, shape, dtype = self._spilled[key]
        data = bytearray(os.pread(self._file.fileno(), shape.numel() * dtype.itemsize, start))
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def put(self, key: bytes, value: Tensor) -> None:
        """Keep a value where there is room; elsewhere forget it."""
        value = value.detach().cpu().contiguous()
        if value.nbytes <= self._room:
            self._room -= value.nbytes
            # Own storage: a view would keep what it was cut from.
            self._held[key] = value.clone()
        elif self._file is not None and value.nbytes <= self._file_room:
            try:
                _write(self._file.fileno(), value.view(torch.uint8).numpy().data.cast("B"), self._end)
            except OSError:  # the disk filled up in spite of DISK_SHARE: what does not fit is computed again
                self._file_room = 0
                return
            self._spilled[key] = (self._end, value.shape, value.dtype)
            self._end += value.nbytes
            self._file_room -= value.nbytes


def _write(file: int, data: memoryview, start: int) -> None:
    """Write at a place, past the file object, whose buffer would try once more to write what did not fit when it is closed."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], start + done)


class FrozenLayers:
    """The layers [0, layer) of a model as a function of one row, and the layers from `layer` on as a function of a batch."""

    def __init__(self, base: BaseModel, layer: int, store: ActivationStore) -> None:
        self.base = base
        self._store = store
        layers = base.module.get_submodule(base.spec.layers)
        assert isinstance(layers, nn.ModuleList)
        assert 0 < layer < len(layers), layer
        self._layer, self._below, self._first_above = layer, list(layers[:layer]), layers[layer]

    def below(self, ids_T: Tensor) -> Tensor:
        """The input of the first layer above for one row's tokens, [T, D] on the model's device."""
        key = hashlib.blake2b(ids_T.cpu().numpy().tobytes(), digest_size=16).digest()
        h_TD = self._store.get(key)
        if h_TD is None:
            h_TD = self._run_below(ids_T)
            self._store.put(key, h_TD)
        return h_TD.to(self.base.device)

    def _run_below(self, ids_T: Tensor) -> Tensor:
        found: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])

        handle = self._first_above.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with torch.no_grad(), _first_layers(self.base, self._layer):  # its hook comes after ours
                self.base.hidden(ids_T[None])
        finally:
            handle.remove()
        (h_BTD,) = found
        return h_BTD[0]

    @contextmanager
    def above(self, h_BTD: Tensor) -> Iterator[None]:
        """Within the block a forward pass runs the layers above only, on these inputs in place of their own."""

        def replace(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (h_BTD, *args[1:]), {name: value for name, value in kwargs.items() if name != "hidden_states"}

        handle = self._first_above.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            with _passed_through(self._below):
                yield
        finally:
            handle.remove()


class _DeepEnoughError(Exception):
    """Raised where the pass was to stop."""


@contextmanager
def _first_layers(base: BaseModel, count: int) -> Iterator[None]:
    """Within the block, a forward pass ends before layer `count`, and the block with it."""

    def stop(*_: object) -> None:
        raise _DeepEnoughError

    handle = base.module.get_submodule(f"{base.spec.layers}.{count}").register_forward_pre_hook(stop)
    try:
        yield
    except _DeepEnoughError:
        pass
    finally:
        handle.remove()


@contextmanager
def _passed_through(layers: list[nn.Module]) -> Iterator[None]:
    """Within the block these layers hand their input on."""
    with ExitStack() as stack:
        for layer in layers:
            layer.forward = _hand_on  # on this instance alone
            stack.callback(vars(layer).pop, "forward")
        yield


def _hand_on(hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
    return hidden_states


_ACTIVE: ContextVar[FrozenLayers | None] = ContextVar("p2d_frozen_layers", default=None)


def active_frozen_layers(base: BaseModel) -> FrozenLayers | None:
    """The frozen layers whose outputs are remembered, if any are."""
    frozen = _ACTIVE.get()
    assert frozen is None or frozen.base is base, "another model's activations"
    return frozen


@contextmanager
def remember_below(base: BaseModel, layer: int, folder: Path | None = None) -> Iterator[None]:
    """Within the block, batches run the layers below `layer` once for each row; none of their weights may change there.

    Args: layer: 0 = there is nothing below, nothing changes. folder: where activations go once a share of the free host
          memory is full; None = what does not fit is computed again.
    """
    if layer == 0:
        yield
        return
    with ExitStack() as stack:
        file, file_bytes = None, 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            file_bytes = int(DISK_SHARE * shutil.disk_usage(folder).free)
        memory_bytes = int(MEMORY_SHARE * psutil.virtual_memory().available)
        store = ActivationStore(memory_bytes=memory_bytes, file=file, file_bytes=file_bytes)
        token = _ACTIVE.set(FrozenLayers(base, layer, store))
        stack.callback(_ACTIVE.reset, token)
        yield
