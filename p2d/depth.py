"""Stop a forward pass after its first layers, in any family: what is wanted from them was read on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from p2d.models import BaseModel


class _DeepEnoughError(Exception):
    """Raised where the pass was to stop."""


@contextmanager
def first_layers(base: BaseModel, count: int) -> Iterator[None]:
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
