"""From cells to quality.md: what every arm reached, what it cost, and how sure the difference is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks.quality.arms import FULL, LORA_8, RANDOM, REFERENCE, Arm
from benchmarks.quality.cells import Cell
from p2d.evaluation import Change, RowLosses, paired_bootstrap


@dataclass(frozen=True, slots=True)
class Found:
    """One arm on one pool, at its best rate; a cell for each seed."""

    arm: Arm
    cells: list[Cell]
    cut: bool = False
    """Whether the search for its rate had no time to end: a better one may be beside it."""

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return fmean(cell.measured.loss for cell in self.cells if cell.measured)

    @property
    def cost(self) -> float:
        """Operations of choosing and training, mean over seeds."""
        return fmean(cell.flops for cell in self.cells)

    @property
    def at_border(self) -> bool:
        """Whether a better rate may lie outside of what was tried."""
        return self.cells[0].rate in (self.arm.weights.rates[0], self.arm.weights.rates[-1])


@dataclass(frozen=True, slots=True)
class Before:
    """The untouched model's losses."""

    held_out: float
    other: float | None = None
    """On the rows of the other task."""


def difference(one: Found, other: Found) -> Change:
    """`one` minus `other`, each row's loss averaged over the seeds that both have; a bootstrap over rows, always in pairs."""
    seeds = {cell.seed for cell in one.cells} & {cell.seed for cell in other.cells}
    return paired_bootstrap(_mean(other, seeds), _mean(one, seeds), seed=0)


def _mean(found: Found, seeds: set[int]) -> RowLosses:
    measured = [cell.measured for cell in found.cells if cell.seed in seeds and cell.measured]
    nll_SR = np.array([one.nll for one in measured])
    return RowLosses(nll_SR.mean(axis=0), np.array(measured[0].tokens, dtype=np.float64))


def page(pools: dict[str, list[Found]], *, base: dict[str, Before], facts: dict[str, Any], notes: Sequence[str]) -> str:
    """All tables as Markdown. base: the untouched model's losses by pool."""
    lines = ["# What an adapted model is worth, and what it cost", ""]
    lines += [f"{name}: {value}." for name, value in facts.items()]
    lines += ["", *[f"* {note}" for note in notes], ""]
    if any(_named(found, REFERENCE) for found in pools.values()):
        lines += ["![held-out loss of each arm against what it cost](quality.svg)", ""]
    for pool, found in pools.items():
        other = base[pool].other
        forgotten = "" if other is None else f" The other task's loss before training {other:.4f}."
        lines += [f"## {pool}", f"Held-out loss before training {base[pool].held_out:.4f}.{forgotten}", ""]
        lines += _main(found) + _costs(found) + _parameters(found) + _curve(found) + _rows(found) + _heads(found)
    return "\n".join(lines).rstrip() + "\n"


def _main(found: Sequence[Found]) -> list[str]:
    reference = _named(found, REFERENCE)
    full = _named(found, FULL)
    lines = [
        "### Each arm against LoRA on all linear layers and all rows",
        "| arm | rows | bad | trained | rate | seeds | held-out loss | difference (95 %) | aer_lora s | aer_lora FLOP | AER FLOP "
        "| token accuracy | other task's loss | KL to base |",
        "| --- " * 14 + "|",
    ]
    for one in sorted(found, key=lambda one: one.loss):
        first = one.cells[0]
        losses = [cell.measured.loss for cell in one.cells if cell.measured]
        spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
        lines.append(
            "| "
            + " | ".join(
                (
                    one.arm.name,
                    str(first.rows),
                    f"{fmean(cell.bad for cell in one.cells):.0%}",
                    f"{first.parameters / 1e6:.2f} M",
                    f"{first.rate:g}{' (border)' if one.at_border else ''}{' (search cut)' if one.cut else ''}",
                    str(len(one.cells)),
                    f"{one.loss:.4f}{spread}",
                    _change(one, reference),
                    _over(one, reference, "seconds"),
                    _over(one, reference, "flops"),
                    _over(one, full, "flops"),
                    _average(one, "token_accuracy"),
                    _average(one, "other_loss"),
                    _average(one, "other_kl"),
                )
            )
            + " |"
        )
    return [*lines, ""]


BUDGETS = (0.1, 0.2, 0.35, 0.5, 1.0)
"""Shares of the reference's operations."""
UNCHOSEN = ("all", RANDOM)


def _costs(found: Sequence[Found]) -> list[str]:
    """Equal cost: the best arm with chosen rows, and the best without, at each share of the reference's operations."""
    reference = _named(found, REFERENCE)
    if reference is None:
        return []
    lines = [
        "### Equal cost, choosing included: the best within a share of the reference's operations",
        "| at most | rows chosen | held-out loss | rows not chosen | held-out loss | difference (95 %) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for budget in BUDGETS:
        within = [one for one in found if one.arm.rows != "oracle" and one.cost <= budget * reference.cost * (1 + 1e-9)]
        chosen = min((one for one in within if one.arm.rows not in UNCHOSEN), key=lambda one: one.loss, default=None)
        plain = min((one for one in within if one.arm.rows in UNCHOSEN), key=lambda one: one.loss, default=None)
        cells = [
            cell for one in (chosen, plain) for cell in (("", "") if one is None else (one.arm.name, f"{one.loss:.4f}"))
        ]
        change = "" if chosen is None or plain is None else _change(chosen, plain)
        lines.append(f"| {budget:.2f} | {' | '.join(cells)} | {change} |")
    return [*lines, ""]


ALIKE = 1.6
"""Most that the trained parameters of two arms may differ by to be called equal."""


def _parameters(found: Sequence[Found]) -> list[str]:
    """Equal trained parameters, on all rows: against LoRA on all linear layers, where the group has it."""
    arms = sorted((one for one in found if "weights" in one.arm.groups), key=lambda one: one.cells[0].parameters)
    groups: list[list[Found]] = []
    for one in arms:
        if groups and one.cells[0].parameters <= ALIKE * groups[-1][0].cells[0].parameters:
            groups[-1].append(one)
        else:
            groups.append([one])
    if all(len(group) < 2 for group in groups):
        return []
    lines = [
        "### Equal trained parameters, all rows",
        "| trained | arm | held-out loss | against LoRA on all linear layers (95 %) |",
        "| --- | --- | --- | --- |",
    ]
    for group in groups:
        lora = next(
            (
                one
                for one in group
                if one.arm.weights == replace(one.arm.weights, kind="lora", slices=(), variant="lora")
            ),
            None,
        )
        lines += [
            f"| {one.cells[0].parameters / 1e6:.2f} M | {one.arm.name} | {one.loss:.4f} | {_change(one, lora)} |"
            for one in sorted(group, key=lambda one: one.loss)
        ]
    return [*lines, ""]


CURVE = {
    RANDOM: "random rows",
    "oracle": "clean rows by an oracle",
    "alignment_likelihood": "by alignment_likelihood, fast",
}


def _curve(found: Sequence[Found]) -> list[str]:
    """The learning curve of LoRA on all linear layers: more rows or more epochs, by each way to choose rows."""
    losses: dict[tuple[float, int], dict[str, str]] = {}
    for one in found:
        rows = RANDOM if one.arm.rows == "all" else one.arm.rows  # all rows are a random draw of all
        shown = rows in (RANDOM, "oracle") or (rows in CURVE and one.arm.mode == "fast")
        if one.arm.weights == LORA_8 and shown:
            place = losses.setdefault((one.arm.ratio, one.arm.epochs), {})
            place[rows] = f"{one.loss:.4f} ({one.cells[0].rows} rows, {fmean(cell.bad for cell in one.cells):.0%} bad)"
    if len(losses) < 3:
        return []
    lines = [
        "### How many rows: LoRA on all linear layers",
        f"| rows x epochs | {' | '.join(CURVE.values())} |",
        "| --- " * (1 + len(CURVE)) + "|",
    ]
    for (ratio, epochs), by in sorted(losses.items()):
        lines.append(f"| {ratio:.0%} x {epochs} | {' | '.join(by.get(rows, '') for rows in CURVE)} |")
    return [*lines, ""]


def _rows(found: Sequence[Found]) -> list[str]:
    """The same weights on rows chosen in every way: against random rows, and what share of the oracle's gain."""
    arms = [one for one in found if "rows" in one.arm.groups and one.arm.rows != "all"]
    random, oracle = (next((one for one in arms if one.arm.rows == name), None) for name in (RANDOM, "oracle"))
    if random is None or len(arms) < 2:
        return []
    lines = [
        "### Rows: the same weights, the same number of rows",
        "| rows by | bad | held-out loss | against random (95 %) | share of the oracle's gain |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in sorted(arms, key=lambda one: one.loss):
        gain = "" if oracle is None or oracle.loss >= random.loss else f"{_gain(one, random, oracle):.0%}"
        bad = fmean(cell.bad for cell in one.cells)
        lines.append(f"| {one.arm.rows} | {bad:.0%} | {one.loss:.4f} | {_change(one, random)} | {gain} |")
    return [*lines, ""]


def _heads(found: Sequence[Found]) -> list[str]:
    """The same rows with heads chosen in every way, as many parameters as come nearest; and rows chosen for other heads."""
    arms = [one for one in found if "heads" in one.arm.groups]
    lines = []
    for control in [one for one in arms if RANDOM in (one.arm.heads, one.arm.rows_for)]:
        alike = [one for one in arms if _size(one.arm) == _size(control.arm)]
        lines += [
            f"| {one.arm.name} | {one.cells[0].parameters / 1e6:.2f} M | {one.loss:.4f} | {_change(one, control)} |"
            for one in sorted(alike, key=lambda one: one.loss)
            if len(alike) > 1
        ]
    if not lines:
        return []
    return [
        "### Heads: the same rows, the same number of heads and rank",
        "| arm | trained | held-out loss | against random heads, or rows for random heads (95 %) |",
        "| --- | --- | --- | --- |",
        *lines,
        "",
    ]


def _size(arm: Arm) -> tuple[object, ...]:
    """What arms of one comparison of heads have in common."""
    return arm.weights, arm.heads_ratio, arm.rows


def _gain(one: Found, random: Found, oracle: Found) -> float:
    return (random.loss - one.loss) / (random.loss - oracle.loss)


def _named(found: Sequence[Found], name: str) -> Found | None:
    return next((one for one in found if one.arm.name == name), None)


def _change(one: Found, other: Found | None) -> str:
    if other is None or one is other:
        return ""
    change = difference(one, other)
    return f"{change.difference:+.4f} ({change.low:+.4f} to {change.high:+.4f})"


def _over(one: Found, other: Found | None, what: str) -> str:
    if other is None:
        return ""
    return (
        f"{fmean(getattr(cell, what) for cell in one.cells) / fmean(getattr(cell, what) for cell in other.cells):.2f}"
    )


def _average(found: Found, what: str) -> str:
    values = [getattr(cell.measured, what) for cell in found.cells if cell.measured]
    return "" if any(value is None for value in values) else f"{fmean(values):.4f}"
