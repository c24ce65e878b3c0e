"""`python -m benchmarks PART ...`: run parts of the cost benchmark and write bench.json and bench.md. See docs/benchmarks.md.

A part's findings are written as soon as it ends. A later run with the same settings keeps the parts that are already there,
unless they are asked for by name or with `--again`: a run that was cut goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import findings
from benchmarks.findings import FORMAT, Findings

if TYPE_CHECKING:
    from benchmarks.workbench import Workbench

ROOT = Path(__file__).resolve().parents[1]

PARTS = {
    "respond": "benchmarks.respond:respond",
    "heads": "benchmarks.heads:heads",
    "train": "benchmarks.train:train",
    "cost": "benchmarks.cost:cost",
    "growth": "benchmarks.sizes:growth",
}
"""Part -> function `(Workbench) -> Findings`; nothing is imported before it is asked for."""


def main(arguments: list[str] | None = None) -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(prog="./run bench", description="The cost benchmark; see docs/benchmarks.md.")
    parser.add_argument("part", nargs="?", default="all", choices=["all", *PARTS])
    parser.add_argument(
        "--model", type=Path, help="directory of the base model (`./run bench`: the demo's, fetched once)"
    )
    parser.add_argument(
        "--rows", type=positive, default=40, help="rows whose responses a sweep of head sets uses (default 40)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=5, help="rounds that every ratio is the median of (default 5)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="of the weights; auto = the faster one here",
    )
    parser.add_argument("--threads", type=positive, default=1, help="threads on a CPU; one gives the steadiest ratios")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results", help="where bench.json and bench.md go")
    parser.add_argument("--again", action="store_true", help="do not keep what an earlier run found")
    options = parser.parse_args(arguments)
    if options.model is None:
        parser.error("name the base model's directory with --model; `./run bench` takes the demo's by itself")
    if not options.model.is_dir():
        parser.error(f"there is no directory {str(options.model)!r}")
    # Before torch is imported: it reads the number once.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    run(options)


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Run the parts that are wanted and not there yet, and write both files after each."""
    import torch

    from benchmarks.workbench import Workbench, environment, example_rows, load_average

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="p2d-bench-") as scratch:
        bench = Workbench(
            model_dir=options.model,
            rows=example_rows(ROOT / "examples" / "gsm8k" / "train.jsonl"),
            scored=options.rows,
            rounds=options.rounds,
            device=options.device,
            precision=options.precision,
            scratch=Path(scratch),
        )
        results = _results(options, environment(bench))
        for name in PARTS if options.part == "all" else [options.part]:
            if options.part == "all" and name in results["parts"]:
                bench.say(f"{name}: kept from an earlier run, --again measures it anew")
                continue
            bench.say(f"{name} ...")
            before, started = load_average(), time.monotonic()
            found = _function(name)(bench)
            results["parts"][name] = {
                "seconds": time.monotonic() - started,
                "load_before": before,
                "load_after": load_average(),
                "findings": findings.as_json(found),
            }
            results["parts"] = {known: results["parts"][known] for known in PARTS if known in results["parts"]}
            findings.write(options.out, results)
            bench.say(f"{name}: done in {time.monotonic() - started:.0f} s")
    print(findings.as_markdown(results))  # noqa: T201 - a command line


def _results(options: argparse.Namespace, environment: dict[str, Any]) -> dict[str, Any]:
    """What stands in bench.json if it was found under the same settings, else an empty page."""
    settings = {"rows": options.rows, "rounds": options.rounds, "precision": options.precision}
    fresh: dict[str, Any] = {
        "format": FORMAT,
        "commit": _commit(),
        "settings": settings,
        "environment": environment,
        "parts": {},
    }
    try:
        earlier: dict[str, Any] = json.loads((options.out / findings.JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return fresh
    same = all(earlier.get(key) == fresh[key] for key in ("format", "settings", "environment"))
    if options.again or not same:
        return fresh
    return fresh | {"parts": earlier["parts"]}


def _function(name: str) -> Callable[[Workbench], Findings]:
    module, function = PARTS[name].split(":")
    part: Callable[[Workbench], Findings] = getattr(import_module(module), function)
    return part


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
