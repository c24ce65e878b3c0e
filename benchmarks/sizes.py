"""Part `growth`: how a job grows from a thousand rows to ten thousand, by `benchmarks.growth`; larger sizes are run by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.findings import Findings, Ratio, Table, Target
from benchmarks.growth import exponent
from benchmarks.workbench import Workbench

LARGEST = 10_000
"""Rows: what fits a quarter of an hour beside the other parts."""

ROOT = Path(__file__).resolve().parents[1]


def growth(bench: Workbench) -> Findings:
    """Exponents of time, bytes and memory over rows."""
    out = bench.scratch / "growth"
    command = [sys.executable, "-m", "benchmarks.growth", "--max-rows", str(LARGEST), "--out", str(out)]
    subprocess.run([*command, "--precision", bench.precision], check=True, cwd=ROOT)
    (run,) = json.loads((out / "growth.json").read_text(encoding="utf-8")).values()
    return findings_of(run["jobs"])


def findings_of(jobs: list[dict[str, Any]]) -> Findings:
    """The exponents between the two largest jobs. Below ten thousand rows fixed costs flatter time."""
    sizes = f"{jobs[-2]['rows']:,} to {jobs[-1]['rows']:,} rows"
    ratios = (
        Ratio(
            name=f"growth of bytes written, exponent from {sizes}",
            rounds=(exponent(jobs, "written_bytes"),),
            target=Target(at="most", value=1.05),
        ),
        Ratio(
            name=f"growth of time, exponent from {sizes}",
            rounds=(exponent(jobs, "seconds"),),
            target=Target(at="most", value=1.05),
        ),
        Ratio(
            name=f"growth of peak memory, exponent from {sizes}",
            rounds=(exponent(jobs, "peak_bytes"),),
            target=Target(at="most", value=0.1),
        ),
    )
    table = Table(
        title="Whole jobs on a two-layer model",
        columns=("rows", "seconds", "MB written", "peak MB"),
        lines=tuple((j["rows"], j["seconds"], j["written_bytes"] / 1e6, j["peak_bytes"] / 1e6) for j in jobs),
    )
    note = "`python -m benchmarks.growth` runs 100,000 and 1,000,000 rows as well: docs/results/growth.md."
    return Findings(ratios=ratios, tables=(table,), notes=(note,))
