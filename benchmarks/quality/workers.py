"""Several processes that compute cells at once: a small model leaves most of a GPU idle, waiting for launches.

Each has a model of its own and takes the next order, an arm on a pool with all its rates and seeds, as soon as it is free. Cells go
to the process that began them, which alone writes the file. An order that fails costs itself, and is named.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from benchmarks.quality.arms import Arm
from benchmarks.quality.cells import Cell, Cells
from benchmarks.quality.matrix import Matrix, Say, failure
from benchmarks.quality.pools import PoolSpec
from p2d.errors import OutOfMemory, P2DError
from p2d.memory_guard import memory_guard

Order = tuple[PoolSpec, Arm]

POLL_S = 1.0
"""How long a silence lasts before it is asked which processes are alive."""


def share_out(options: argparse.Namespace, orders: Sequence[Order], cells: Cells, say: Say, ends: float) -> list[str]:
    """Compute all orders in `options.workers` processes.

    One that runs out of memory gives its order back and ends; what was given back is done by as many as were left.

    Args:    cells: takes each cell as it is done. ends: no cell is begun later (`time.monotonic`).
    Returns: a line for each order that failed, and for each process that died.
    """
    failed: list[str] = []
    left, workers = list(orders), options.workers
    while left:
        given_back: list[Order] = []
        for kind, what in _round(options, left, workers, ends):
            if kind == "cell":
                cells.put(*what)
            elif kind == "out of memory":
                given_back.append(what)
            else:
                say(what)
                failed += [what] if kind == "failed" else []
        if workers == 1:
            failed += [f"{arm.name} on {spec.name} needs more memory than there is." for spec, arm in given_back]
            break
        left, workers = given_back, max(1, workers - len(given_back))
    return failed


def _round(
    options: argparse.Namespace, orders: Sequence[Order], workers: int, ends: float
) -> Iterator[tuple[str, Any]]:
    """What some processes say until all have ended."""
    context = multiprocessing.get_context("spawn")  # a forked CUDA context is of no use
    waiting: Any = context.Queue()
    told: Any = context.Queue()
    for order in [*orders, *[None] * workers]:
        waiting.put(order)
    processes = [
        context.Process(target=_work, args=(options, waiting, told, ends), daemon=True) for _ in range(workers)
    ]
    for process in processes:
        process.start()
    alive = True
    while alive:
        alive = any(process.is_alive() for process in processes)  # asked first: what the last one said is then there
        with suppress(queue.Empty):
            while True:
                yield told.get(timeout=POLL_S)
    for process in processes:
        process.join()
        if process.exitcode:
            yield "failed", f"A process ended with {process.exitcode}: its order is missing."
    waiting.cancel_join_thread()  # nobody reads what is still in it


def _end_with(parent: Any) -> None:
    """A killed parent takes no cells any more, and cannot end what it began."""
    if parent is not None:
        parent.join()
        os._exit(1)


class _Sent(Cells):
    """Cells of a worker: known from the file, told to the process that writes it."""

    told: Any

    def put(self, key: str, cell: Cell) -> None:
        self.add(key, cell)
        self.told.put(("cell", (key, cell)))


def _work(options: argparse.Namespace, waiting: Any, told: Any, ends: float) -> None:
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    cells = _Sent(options.out / "quality.json")
    cells.told = told
    matrix = Matrix(options, cells, lambda line: told.put(("say", line)), ends)
    while (order := waiting.get()) is not None:
        spec, arm = order
        try:
            with memory_guard("computing a cell"):
                matrix.laboratory(spec).best(arm, options.seeds)
        except OutOfMemory:
            told.put(("out of memory", order))
            return
        except (P2DError, RuntimeError, ValueError) as error:  # the other orders go on
            told.put(("failed", failure(arm, spec, error)))
