"""What a part found: ratios with their exact twins, tables, notes; and how they become bench.json and bench.md.

Knows nothing about how anything was measured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

FORMAT = 1
"""Of bench.json."""
JSON, PAGE = "bench.json", "bench.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a ratio should reach on a CPU."""

    at: Literal["least", "most"]
    value: float

    def met(self, value: float) -> bool:
        """Whether a ratio reaches it."""
        return value >= self.value if self.at == "least" else value <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.at == 'least' else '<='} {self.value:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """One number of the benchmark: measured round by round, or exact."""

    name: str
    rounds: tuple[float, ...]
    """Per-round ratios; one where the number is exact."""
    target: Target | None = None
    twin: Mapping[str, float] = field(default_factory=dict)
    """Noise-free counts that explain the ratio, by name."""
    note: str = ""

    @property
    def value(self) -> float:
        """The median."""
        return statistics.median(self.rounds)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Numbers that are no ratios of two arms."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str | float, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """All that one part found."""

    ratios: tuple[Ratio, ...] = ()
    tables: tuple[Table, ...] = ()
    seconds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Raw times by arm, for whoever wants to check a ratio."""
    notes: tuple[str, ...] = ()


def as_json(findings: Findings) -> dict[str, Any]:
    """The findings of a part as bench.json holds them."""
    data = asdict(findings)
    for ratio, entry in zip(findings.ratios, data["ratios"], strict=True):
        entry["value"] = ratio.value
        entry["met"] = None if ratio.target is None else ratio.target.met(ratio.value)
    return data


def of_json(data: Mapping[str, Any]) -> Findings:
    """What `as_json` wrote."""
    ratios = [
        Ratio(
            name=entry["name"],
            rounds=tuple(entry["rounds"]),
            target=None if entry["target"] is None else Target(**entry["target"]),
            twin=entry["twin"],
            note=entry["note"],
        )
        for entry in data["ratios"]
    ]
    tables = [
        Table(title=t["title"], columns=tuple(t["columns"]), lines=tuple(tuple(line) for line in t["lines"]))
        for t in data["tables"]
    ]
    return Findings(ratios=tuple(ratios), tables=tuple(tables), seconds=data["seconds"], notes=tuple(data["notes"]))


def write(folder: Path, results: Mapping[str, Any]) -> None:
    """Write bench.json and bench.md, each replaced in one step: a run cut short leaves whole files."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {JSON: json.dumps(results, indent=1) + "\n", PAGE: as_markdown(results)}
    for name, text in texts.items():
        partial = folder / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(folder / name)


def as_markdown(results: Mapping[str, Any]) -> str:
    """The page of a whole bench.json."""
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    lines = [
        "# Cost benchmark",
        "<!-- Written by `./run bench`; do not edit. What each ratio means: docs/benchmarks.md. -->",
        "",
        f"`./run bench` with {settings}, at commit {results['commit']}. "
        "Ratios are medians over rounds in which the arms took turns.",
        "",
        "| " + " | ".join(results["environment"]) + " |",
        "| " + " | ".join("---" for _ in results["environment"]) + " |",
        "| " + " | ".join(str(value) for value in results["environment"].values()) + " |",
        "",
    ]
    for name, part in results["parts"].items():
        findings = of_json(part["findings"])
        load = f"load average {part['load_before']:.1f} to {part['load_after']:.1f}"
        lines += [f"## {name}", f"{part['seconds']:.0f} s, {load}.", ""]
        lines += _ratio_lines(findings.ratios)
        for table in findings.tables:
            lines += [f"**{table.title}**", "", *_table(table.columns, table.lines), ""]
        lines += [f"* {note}" for note in findings.notes] + ([""] if findings.notes else [])
    return "\n".join(lines).rstrip("\n") + "\n"


def _ratio_lines(ratios: Sequence[Ratio]) -> list[str]:
    if not ratios:
        return []
    rows = []
    for ratio in ratios:
        spread = "exact" if len(ratio.rounds) == 1 else f"{number(min(ratio.rounds))} to {number(max(ratio.rounds))}"
        target = (
            "" if ratio.target is None else f"{ratio.target}, {'met' if ratio.target.met(ratio.value) else 'MISSED'}"
        )
        twin = "; ".join(f"{name} {number(value)}" for name, value in ratio.twin.items())
        rows.append((ratio.name, number(ratio.value), spread, target, twin, ratio.note))
    return [*_table(("ratio", "median", "range", "target", "exact twin", "note"), rows), ""]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str | float]]) -> list[str]:
    return [
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
        *("| " + " | ".join(cell if isinstance(cell, str) else number(cell) for cell in row) + " |" for row in rows),
    ]


def number(value: float) -> str:
    """A number as people read it: three significant digits, thousands parted."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
