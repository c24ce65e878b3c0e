"""From cells to quality.md: what every arm reached, what it cost, and how sure the difference is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.quality.arms import FULL, LORA_8, RANDOM, REFERENCE, REFERENCE_ONCE, Arm
from benchmarks.quality.cells import Cell
from p2d.evaluation import Change, RowLosses, paired_bootstrap
from p2d.memory import FP32, MOMENTS
from p2d.wording import counted


@dataclass(frozen=True, slots=True)
class Found:
    """One arm on one pool, at its best rate; a cell for each seed."""

    arm: Arm
    cells: list[Cell]
    """None of them diverged."""
    cut: bool = False
    """Whether the search for its rate had no time to end: a better one may be beside it."""

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return fmean(cell.measured.loss for cell in self.cells if cell.measured)

    def cost(self, what: str = "flops") -> float:
        """Choosing and training in `flops` or `seconds`, mean over seeds."""
        return fmean(getattr(cell, what) for cell in self.cells)

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
    text: float | None = None
    """On passages of a text."""


def difference(one: Found, other: Found) -> Change:
    """`one` minus `other`, each row's loss averaged over the seeds that both have; a bootstrap over rows, always in pairs."""
    seeds = {cell.seed for cell in one.cells} & {cell.seed for cell in other.cells}
    return paired_bootstrap(_mean(other, seeds), _mean(one, seeds), seed=0)


def _mean(found: Found, seeds: set[int]) -> RowLosses:
    measured = [cell.measured for cell in found.cells if cell.seed in seeds and cell.measured]
    nll_SR = np.array([one.nll for one in measured])
    return RowLosses(nll_SR.mean(axis=0), np.array(measured[0].tokens, dtype=np.float64))


def page(
    pools: dict[str, list[Found]],
    *,
    base: dict[str, Before],
    facts: dict[str, Any],
    notes: Sequence[str],
    stored: Mapping[str, Sequence[Cell]] = MappingProxyType({}),
) -> str:
    """All tables as Markdown. base: the untouched model's losses by pool. stored: all cells that there are of it."""
    lines = ["# What an adapted model is worth, and what it cost", ""]
    lines += [f"{name}: {value}." for name, value in facts.items()]
    lines += ["", *[f"* {note}" for note in notes], ""]
    if any(_named(found, REFERENCE) for found in pools.values()):
        lines += ["![held-out loss of each arm against what it cost](quality.svg)", ""]
    for pool, found in pools.items():
        other = base[pool].other
        forgotten = "" if other is None else f" The other task's loss before training {other:.4f}."
        forgotten += "" if base[pool].text is None else f" The text's {base[pool].text:.4f}."
        lines += [f"## {pool}", f"Held-out loss before training {base[pool].held_out:.4f}.{forgotten}", ""]
        if not found:
            lines += ["No arm has been computed here.", ""]
            continue
        lines += _main(found) + _beside(stored.get(pool, ()), found)
        lines += _costs(found, "flops") + _costs(found, "seconds")
        lines += _parameters(found) + _curve(found) + _rows(found) + _heads(found)
    return "\n".join(lines).rstrip() + "\n"


MEASURES = {
    "token_accuracy": "token accuracy",
    "metric": "exact match or ROUGE-L",
    "other_loss": "other task's loss",
    "other_kl": "KL to base",
    "text_loss": "text's loss",
    "text_kl": "KL to base on text",
}
"""Columns of the main table beside the loss; one that no cell fills is left out."""


STATE_BYTES = 2 * FP32 + MOMENTS
"""Of each trained number: itself, its gradient and AdamW's two moments, all fp32."""


def _main(found: Sequence[Found]) -> list[str]:
    reference = _named(found, REFERENCE) or _named(found, REFERENCE_ONCE)
    full = _named(found, FULL)
    measured = [cell.measured for one in found for cell in one.cells if cell.measured]
    shown = [name for name in MEASURES if any(getattr(of, name) is not None for of in measured)]
    lines = [
        "### Each arm" if reference is None else f"### Each arm against {reference.arm.name}",
        "| arm | rows | bad | trained | state | rate | seeds | held-out loss | difference (95 %) | aer_lora s | aer_lora FLOP "
        "| AER FLOP | " + " | ".join(MEASURES[name] for name in shown) + " |",
        "| --- " * (12 + len(shown)) + "|",
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
                    _kept(one.cells),
                    f"{fmean(cell.bad for cell in one.cells):.0%}",
                    f"{first.parameters / 1e6:.2f} M",
                    f"{STATE_BYTES * first.parameters / 1e6:.0f} MB",
                    f"{first.rate:g}{' (border)' if one.at_border else ''}{' (search cut)' if one.cut else ''}",
                    str(len(one.cells)),
                    f"{one.loss:.4f}{spread}",
                    _change(one, reference),
                    _over(one, reference, "seconds"),
                    _over(one, reference, "flops"),
                    _over(one, full, "flops"),
                    *(_average(one, name) for name in shown),
                )
            )
            + " |"
        )
    return [*lines, ""]


def _kept(cells: Sequence[Cell]) -> str:
    """How many were chosen: where the guide decides, another seed keeps another number."""
    fewest, most = min(cell.rows for cell in cells), max(cell.rows for cell in cells)
    return str(most) if fewest == most else f"{fewest} to {most}"


BUDGETS = (0.1, 0.2, 0.35, 0.5, 1.0)
"""Shares of the reference's cost."""
UNCHOSEN = ("all", RANDOM)


def _beside(stored: Sequence[Cell], found: Sequence[Found]) -> list[str]:
    """Arms of which some cells are there and no line above: seeds of one rate together."""
    above = {one.arm.name for one in found}
    shown = {id(cell) for one in found for cell in one.cells}  # by another name where --epochs makes arms the same
    cells: dict[tuple[str, float], list[Cell]] = {}
    for cell in stored:
        if cell.arm not in above and cell.measured and id(cell) not in shown:
            cells.setdefault((cell.arm, cell.rate), []).append(cell)
    if not cells:
        return []
    lines = [
        "### Beside these: arms tried at some rates alone, or computed by earlier code or with other options",
        "| arm | rows | bad | rate | seeds | held-out loss | TFLOP |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (arm, rate), some in sorted(cells.items()):
        some.sort(key=lambda cell: cell.seed)
        losses = dict.fromkeys(f"{cell.measured.loss:.4f}" for cell in some if cell.measured)
        seeds = ", ".join(dict.fromkeys(str(cell.seed) for cell in some))
        lines.append(
            f"| {arm} | {_kept(some)} | {fmean(cell.bad for cell in some):.0%} | {rate:g} | {seeds} | "
            f"{' / '.join(losses)} | {fmean(cell.flops for cell in some) / 1e12:.0f} |"
        )
    return [*lines, ""]


COSTS = {"flops": "operations", "seconds": "device time"}


def _costs(found: Sequence[Found], what: str) -> list[str]:
    """Equal cost: the best arm with chosen rows, and the best without, at each share of the reference's `COSTS`."""
    reference = _named(found, REFERENCE)
    # Seconds of processes that shared a device say nothing.
    if reference is None or (what == "seconds" and any(cell.workers > 1 for one in found for cell in one.cells)):
        return []
    most = reference.cost(what) * (1 + 1e-9)
    lines = [
        f"### Equal {COSTS[what]}, choosing included: the best within a share of the reference's",
        "| at most | rows chosen | held-out loss | rows not chosen | held-out loss | difference (95 %) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for budget in BUDGETS:
        within = [one for one in found if one.arm.rows != "oracle" and one.cost(what) <= budget * most]
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
        ratio = one.arm.ratio
        if one.arm.weights == LORA_8 and shown and ratio != "auto":
            place = losses.setdefault((ratio, one.arm.epochs), {})
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
    # Seconds of a process that had a processor to itself say nothing beside those of many that shared a device.
    if what == "seconds" and len({cell.workers > 1 for cell in (*one.cells, *other.cells)}) > 1:
        return ""
    return f"{one.cost(what) / other.cost(what):.2f}"


def _average(found: Found, what: str) -> str:
    """Mean over the seeds that were measured so, and how many these are where it is not all."""
    values = [value for cell in found.cells if (value := getattr(cell.measured, what, None)) is not None]
    if not values:
        return ""
    return f"{fmean(values):.4f}" + (
        "" if len(values) == len(found.cells) else f" ({counted(len(values), 'seed', 'seeds')})"
    )
