"""What every arm reached for what it cost, one picture for all pools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from textwrap import fill

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.quality.arms import REFERENCE
from benchmarks.quality.tables import Found

COLOURS = {"lora": "#3465a4", "slices": "#cc0000", "full": "#555753"}
MARKERS = {"all": "s", "random": "x", "oracle": "*"}
CHOSEN = "o"
"""Of rows by a data scorer."""
TITLE_WIDTH = 48
"""Characters that fit above one pool."""


def draw(pools: Mapping[str, Sequence[Found]], path: Path) -> None:
    """Write an SVG: operations over those of LoRA on all rows against held-out loss, of every pool that has that arm.

    Bars are the standard deviation over seeds. The same cells give the same bytes.
    """
    shown = {pool: found for pool, found in pools.items() if any(one.arm.name == REFERENCE for one in found)}
    if not shown:
        path.unlink(missing_ok=True)
        return
    with mpl.rc_context({"svg.hashsalt": "p2d", "font.size": 8}):
        figure = Figure(figsize=(5.2 * min(2, len(shown)), 3.8 * ((len(shown) + 1) // 2)), layout="constrained")
        for place, (pool, found) in enumerate(shown.items()):
            axes = figure.add_subplot((len(shown) + 1) // 2, min(2, len(shown)), place + 1)
            _pool(axes, pool, found)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _pool(axes: mpl.axes.Axes, pool: str, found: Sequence[Found]) -> None:
    reference = next(one for one in found if one.arm.name == REFERENCE)
    for one in found:
        losses = [cell.measured.loss for cell in one.cells if cell.measured]
        axes.errorbar(
            one.cost() / reference.cost(),
            one.loss,
            yerr=stdev(losses) if len(losses) > 1 else None,
            color=COLOURS[one.arm.weights.kind],
            marker=MARKERS.get(one.arm.rows, CHOSEN),
            markersize=5,
            linewidth=0.8,
        )
    axes.axhline(reference.loss, color=COLOURS["lora"], linewidth=0.6, linestyle=":")
    axes.axvline(0.35, color="#888a85", linewidth=0.6, linestyle=":")
    axes.set(
        title=fill(pool, TITLE_WIDTH), xlabel="operations / LoRA on all rows", ylabel="held-out loss", xscale="log"
    )
    named = [
        ("LoRA", COLOURS["lora"], "s"),
        ("slices of heads", COLOURS["slices"], "s"),
        ("all weights", COLOURS["full"], "s"),
    ]
    named += [(f"{rows} rows", "black", marker) for rows, marker in [*MARKERS.items(), ("chosen", CHOSEN)]]
    for name, colour, marker in named:
        axes.plot([], [], color=colour, marker=marker, linestyle="", markersize=5, label=name)
    axes.legend(fontsize=6, frameon=False)
