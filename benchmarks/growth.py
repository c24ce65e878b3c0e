"""How a job grows with its rows: time, bytes written and memory at 1,000 to 1,000,000 rows, step by step.

    python -m benchmarks.growth                    # 1k, 10k, 100k and 1M rows: hours on two cores
    python -m benchmarks.growth --max-rows 100000  # as far as 100k

Every size is a whole job (`validate` to `package`) in a process of its own, on a random model of two layers: what is measured is
the machinery around a model, not the model. Rows are a few sentences repeated with other numbers, some 20 tokens each. An
exponent is the slope of log cost over log rows between the two largest sizes: 1 = linear, 0 = flat. Seconds are of the
processor, on one thread. Memory is the highest resident set of the process so far, libraries included. Writes growth.json and
growth.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SIZES = (1_000, 10_000, 100_000, 1_000_000)
SEED = 0

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StepGrowth:
    """One step of one job, all its shards together."""

    seconds: float
    """Of the processor."""
    written_bytes: int
    peak_bytes: int
    """Of the process, until the step ended: it only rises."""


def main(arguments: list[str] | None = None) -> None:
    """Parse, run every size in a child, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description="Growth from 1k to 1M rows.")
    parser.add_argument("--max-rows", type=int, default=SIZES[-1], help="largest job (default 1000000)")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results", help="where growth.json and growth.md go"
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # what a child is called with
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(one_job(options.one)))  # noqa: T201 - the answer to the parent
        return
    found: list[Facts] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for rows in (size for size in SIZES if size <= options.max_rows):
        child = [sys.executable, "-m", "benchmarks.growth", "--one", str(rows)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(child, check=True, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
        found.append(json.loads(done.stdout))
        (options.out / "growth.json").write_text(json.dumps({"jobs": found}, indent=1) + "\n")
        (options.out / "growth.md").write_text(as_markdown(found))
        say(f"{rows:,} rows: {found[-1]['seconds']:.0f} s, peak {found[-1]['peak_bytes'] / 2**20:.0f} MiB")


def say(line: str) -> None:
    """Tell how far the run has come."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)  # noqa: T201 - a command line


# --- one size --------------------------------------------------------------------------------------------------------


def one_job(count: int) -> Facts:
    """A whole job of `count` rows; what each step took."""
    from p2d.config import JobConfig, TrainingConfig
    from p2d.pipeline import SHARD_ROWS, ModelCache, StepCall, plan_steps, run_step
    from p2d.validation import validate_file
    from tests.factories import tiny_model_dir

    steps: dict[str, StepGrowth] = {}
    with tempfile.TemporaryDirectory(prefix="p2d-growth-") as scratch:
        work, model = Path(scratch) / "work", Path(scratch) / "model"
        work.mkdir()
        tiny_model_dir(model, n_layers=2, n_heads=4, n_kv_groups=2, head_dim=8, chat=False)
        sent = Path(scratch) / "sent.jsonl"
        with sent.open("w") as file:
            file.writelines(lines(count))
        base_peak = peak_bytes()
        with step(steps, "ingest", work):
            validate_file(sent, "jsonl", normalised=work / "dataset.jsonl")
        config = JobConfig(training=TrainingConfig(epochs=1, learning_rate=1e-3, batch_size=32))
        models = ModelCache()
        for planned in plan_steps(config, count, SHARD_ROWS):
            call = StepCall(
                step=planned.step, shard=planned.shard, shards=planned.shards, config=config, model_dir=model, inputs=work,
                out=work, device="cpu",
            )  # fmt: skip
            if planned.step == "package":
                (work / "steps.json").write_text('{"steps": []}')
            with step(steps, planned.step, work):
                run_step(call, models=models)
            if planned.shard % 16 == 0:
                say(f"  {count:,} rows: {planned.step} {planned.shard + 1} of {planned.shards}")
    return {
        "rows": count,
        "seconds": sum(cost.seconds for cost in steps.values()),
        "written_bytes": sum(cost.written_bytes for cost in steps.values()),
        "base_peak_bytes": base_peak,
        "peak_bytes": peak_bytes(),
        "steps": {name: asdict(cost) for name, cost in steps.items()},
    }


def lines(count: int) -> Iterator[str]:
    """Rows that repeat a few sentences with other numbers."""
    for number in range(count):
        a, b = number % 9973, number // 7 % 97
        asked = ("What is {} plus {}?", "Add {} to {}.", "{} + {} =")[number % 3].format(a, b)
        yield json.dumps({"question": f"{number}: {asked}", "answer": str(a + b)}) + "\n"


class step:
    """Adds what happens inside to a step's cost."""

    def __init__(self, steps: dict[str, StepGrowth], name: str, folder: Path) -> None:
        self._steps, self._name, self._folder = steps, name, folder

    def __enter__(self) -> None:
        self._started, self._bytes = time.process_time(), folder_bytes(self._folder)

    def __exit__(self, *_: object) -> None:
        before = self._steps.get(self._name, StepGrowth(0.0, 0, 0))
        self._steps[self._name] = StepGrowth(
            before.seconds + time.process_time() - self._started,
            before.written_bytes + folder_bytes(self._folder) - self._bytes,
            peak_bytes(),
        )


def folder_bytes(folder: Path) -> int:
    """Size of all files of a folder; a step replaces none of an earlier one."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def peak_bytes() -> int:
    """Highest resident set of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- the table -------------------------------------------------------------------------------------------------------


def exponent(jobs: Sequence[Facts], *path: str) -> float:
    """Slope of log cost over log rows between the two largest jobs."""
    costs = []
    for job in jobs[-2:]:
        value: Any = job
        for name in path:
            value = value[name]
        costs.append(float(value))
    return math.log(costs[1] / costs[0]) / math.log(jobs[-1]["rows"] / jobs[-2]["rows"]) if min(costs) > 0 else 0.0


def as_markdown(jobs: Sequence[Facts]) -> str:
    """Tables of seconds, of bytes and of memory."""
    out = ["# Growth", "", "Made by `python -m benchmarks.growth`; see its first lines for what is measured.", ""]
    names = list(jobs[0]["steps"])
    head = " | ".join(f"{job['rows']:,} rows" for job in jobs)
    rule = "| --- |" + " ---: |" * (len(jobs) + 1)
    tables: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("Seconds", "seconds", lambda value: f"{value:.3g}"),
        ("Bytes written, MiB", "written_bytes", lambda value: f"{value / 2**20:.3g}"),
        ("Highest resident set until the step ended, MiB", "peak_bytes", lambda value: f"{value / 2**20:.0f}"),
    )
    for title, fact, show in tables:
        out += [f"## {title}", "", f"| step | {head} | exponent |", rule]
        for name in names:
            cells = " | ".join(show(job["steps"][name][fact]) for job in jobs)
            slope = f"{exponent(jobs, 'steps', name, fact):.2f}" if len(jobs) > 1 else ""
            out.append(f"| {name} | {cells} | {slope} |")
        cells = " | ".join(show(job[fact]) for job in jobs)
        slope = f"{exponent(jobs, fact):.2f}" if len(jobs) > 1 else ""
        out += [f"| **whole job** | {cells} | {slope} |", ""]
    return "\n".join(out)


if __name__ == "__main__":
    main()
