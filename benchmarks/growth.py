"""How a job grows with its rows: time, bytes, exact counts and memory at 1,000 to 1,000,000 rows, step by step.

    python -m benchmarks.growth                    # 1k, 10k, 100k and 1M rows; 100k took 102 s of a core
    python -m benchmarks.growth --max-rows 100000  # as far as 100k
    python -m benchmarks.growth --precision bf16   # whatever this device computes fastest

Every size is a whole job (`validate` to `package`) in a process of its own, on a random model of two layers: what is measured is
the machinery around a model, not the model. Rows are a few sentences repeated with other numbers, some 30 tokens each. An
exponent is the slope of log cost over log rows between the two largest sizes: 1 = linear, 0 = flat. It is judged where fixed
costs do not hide it: where the smaller of the two costs eight times what the smallest job did, or more. Seconds are of the
processor, on one thread. Memory is the highest resident set of the process so far, libraries included. Writes growth.json and
growth.md; the runs of another precision stay in them.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from p2d.config import Precision

ROOT = Path(__file__).resolve().parent.parent
SIZES = (1_000, 10_000, 100_000, 1_000_000)

LINEAR, FLAT = (0.95, 1.05), (-1.0, 0.1)
"""Exponents that a cost of every row, and one that no row adds to, may have."""
FIXED_SHARE = 0.12
"""Share that the smallest job's cost may be of the second largest's, for an exponent between the two largest to be judged: were all
of it fixed, a cost ten times as large would still have the exponent 0.95."""

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StepGrowth:
    """One step of one job, all its shards together."""

    seconds: float
    """Of the processor."""
    written_bytes: int
    peak_bytes: int
    """Of the process, until the step ended: it only rises."""
    tokens: int = 0
    """Processed, as the step accounts for them."""
    flops: int = 0
    """Of matrix products, in closed form."""


def main(arguments: list[str] | None = None) -> None:
    """Parse, run every size in a child, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description="Growth from 1k to 1M rows.")
    parser.add_argument("--max-rows", type=int, default=SIZES[-1], help="largest job (default 1000000)")
    parser.add_argument(
        "--precision",
        default="auto",
        choices=["auto", "fp32", "bf16"],
        help="of the weights; auto = the faster one here",
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs" / "results", help="where growth.json and growth.md go"
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # what a child is called with
    options = parser.parse_args(arguments)
    if options.max_rows < SIZES[0]:
        parser.error(f"--max-rows: the smallest job has {SIZES[0]:,} rows")
    if options.one:
        print(json.dumps(one_job(options.one, options.precision)))  # noqa: T201 - the answer to the parent
        return
    started, found = time.monotonic(), list[Facts]()
    for rows in (size for size in SIZES if size <= options.max_rows):
        child = [sys.executable, "-m", "benchmarks.growth", "--one", str(rows), "--precision", options.precision]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(child, check=True, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
        found.append(json.loads(done.stdout))
        command = f"python -m benchmarks.growth --max-rows {rows} --precision {options.precision}"
        held = held_rows(options.out, found[0]["dtype"])
        if held > rows:  # so that one that is cut replaces none that was not
            file = options.out / "growth.json"
            say(f"{file} holds a run over {held:,} rows, which stays: write elsewhere with --out")
        else:
            write(options.out, found, command=command, seconds=time.monotonic() - started)
        say(f"{rows:,} rows: {found[-1]['seconds']:.0f} s, peak {found[-1]['peak_bytes'] / 2**20:.0f} MiB")


def held_rows(out: Path, dtype: str) -> int:
    """Rows of the largest job of the run in this precision that growth.json holds; 0 without one."""
    path = out / "growth.json"
    runs: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return max((job["rows"] for job in runs.get(dtype, {}).get("jobs", [])), default=0)


def write(out: Path, jobs: Sequence[Facts], *, command: str, seconds: float) -> None:
    """Put the jobs of one precision into growth.json and write growth.md anew."""
    from benchmarks.workbench import load_average, machine

    out.mkdir(parents=True, exist_ok=True)
    path = out / "growth.json"
    runs: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    runs[jobs[0]["dtype"]] = {
        "command": command,
        "machine": f"{machine()}, one thread, cpu, torch {jobs[0]['torch']}",
        "load_average": load_average(),
        "wall_seconds": seconds,
        "jobs": list(jobs),
    }
    path.write_text(json.dumps(runs, indent=1) + "\n")
    (out / "growth.md").write_text(as_markdown(runs))


def say(line: str) -> None:
    """Tell how far the run has come."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)  # noqa: T201 - a command line


# --- one size --------------------------------------------------------------------------------------------------------


def one_job(count: int, precision: Precision = "auto") -> Facts:
    """A whole job of `count` rows; what each step took."""
    import torch

    from p2d.config import DEFAULT_RATIO, MIN_ROWS, DataConfig, HeadsConfig, JobConfig, TrainingConfig, top_count
    from p2d.pipeline import SHARD_ROWS, ModelCache, StepCall, plan_steps, run_step
    from p2d.plans import held_out_count
    from p2d.response_matrix import load_shard
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
        training = TrainingConfig(rank=None, epochs=1, learning_rate=1e-3, batch_size=32, precision=precision)
        # A tenth of heads and of rows, all scored whole: as the default recipe was when the committed results were made.
        trained = count - held_out_count(count, None, proxy_rows=0)
        kept = max(top_count(DEFAULT_RATIO, trained), MIN_ROWS)
        config = JobConfig(
            heads=HeadsConfig(ratio=DEFAULT_RATIO),
            data=DataConfig(ratio=min(1.0, kept / trained), mode="faithful"),
            training=training,
        )
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
        steps = {
            name: replace(cost, tokens=counted(work, name, "tokens"), flops=counted(work, name, "flops"))
            for name, cost in steps.items()
        }
        plan = json.loads((work / "plan.json").read_text())
        shards = [load_shard(path) for path in sorted(work.glob("responses-*.safetensors"))]
        response_bytes = sum(shard.response_RN.nbytes + shard.row_R.nbytes for shard in shards)
    return {
        "rows": count,
        "dtype": plan["dtype"],
        "torch": torch.__version__,
        "seconds": sum(cost.seconds for cost in steps.values()),
        "written_bytes": sum(cost.written_bytes for cost in steps.values()),
        "tokens": sum(cost.tokens for cost in steps.values()),
        "flops": sum(cost.flops for cost in steps.values()),
        "base_peak_bytes": base_peak,
        "peak_bytes": steps["package"].peak_bytes,
        "steps": {name: asdict(cost) for name, cost in steps.items()},
        "sets": {name: plan[name] for name in ("train", "guide", "evaluation")},
        "response_bytes": response_bytes,
    }


PERIOD = 21
"""Rows after which lengths come again: jobs of a multiple of it are exactly as many times as long, in bytes and in tokens."""


def lines(count: int) -> Iterator[str]:
    """Rows that repeat a few sentences with other numbers, at some twenty lengths."""
    for number in range(count):
        a, b = number % 800 + 100, number % 90 + 10
        asked = ("What is {} plus {}?", "Add {} to {}.", "{} + {} =")[number % 3].format(a, b) + "?" * (number // 3 % 7)
        yield json.dumps({"question": f"{number:07}: {asked}", "answer": str(a + b)}) + "\n"


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


def counted(folder: Path, name: str, what: str) -> int:
    """Tokens or operations of all shards of a step, as it accounts for them."""
    return sum(json.loads(path.read_text())[what] for path in folder.glob(f"accounting-{name}*.json"))


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
    costs = [cost_of(job, path) for job in jobs[-2:]]
    return math.log(costs[1] / costs[0]) / math.log(jobs[-1]["rows"] / jobs[-2]["rows"]) if min(costs) > 0 else 0.0


def cost_of(job: Facts, path: Sequence[str]) -> float:
    """A number deep inside of a job's facts."""
    value: Any = job
    for name in path:
        value = value[name]
    return float(value)


def shows(jobs: Sequence[Facts], *path: str) -> bool:
    """Whether the exponent says something: fixed costs are a small share of the smaller of its two jobs."""
    smallest, smaller = cost_of(jobs[0], path), cost_of(jobs[-2], path)
    return len(jobs) > 2 and 0 < smallest <= FIXED_SHARE * smaller


def _slope(jobs: Sequence[Facts], wanted: tuple[float, float], *path: str) -> tuple[str, str]:
    """The exponent, and whether it is as it should be."""
    if len(jobs) < 2:
        return "", ""
    slope = exponent(jobs, *path)
    if wanted == LINEAR and not shows(jobs, *path):
        return f"{slope:.2f}", "fixed costs"
    return f"{slope:.2f}", "met" if wanted[0] <= slope <= wanted[1] else "MISSED"


def as_markdown(runs: Mapping[str, Any]) -> str:
    """The page: for every precision tables of seconds, bytes, exact counts and memory."""
    out = [
        "# Growth",
        "<!-- Written by `python -m benchmarks.growth`, whose first lines say what is measured; do not edit. -->",
        "",
        f"An exponent is met between {LINEAR[0]} and {LINEAR[1]} (seconds, bytes, counts), and up to {FLAT[1]} (memory); "
        "where fixed costs hide it, it is not judged.",
        "",
    ]
    for dtype, run in runs.items():
        load = f"load average {run['load_average']:.1f} at its end, {run['wall_seconds']:.0f} s in all"
        out += [f"## {dtype}", f"`{run['command']}`; {run['machine']}; {load}.", "", *_tables(run["jobs"])]
    return "\n".join(out).rstrip("\n") + "\n"


def _tables(jobs: Sequence[Facts]) -> list[str]:
    head = " | ".join(f"{job['rows']:,} rows" for job in jobs)
    rule = "| --- |" + " ---: |" * (len(jobs) + 1) + " --- |"
    tables: tuple[tuple[str, str, tuple[float, float], Callable[[float], str]], ...] = (
        ("Seconds", "seconds", LINEAR, lambda value: f"{value:.3g}"),
        ("Bytes written, MiB", "written_bytes", LINEAR, lambda value: f"{value / 2**20:.3g}"),
        ("Tokens processed, thousands", "tokens", LINEAR, lambda value: f"{value / 1e3:,.1f}"),
        ("Operations, GFLOP", "flops", LINEAR, lambda value: f"{value / 1e9:.3g}"),
        (
            "Highest resident set until the step ended, MiB",
            "peak_bytes",
            FLAT,
            lambda value: f"{value / 2**20:.0f}",
        ),
    )
    out: list[str] = []
    for title, fact, wanted, show in tables:
        out += [f"**{title}**", "", f"| step | {head} | exponent | |", rule]
        rows = [(name, ("steps", name, fact)) for name in jobs[0]["steps"] if jobs[0]["steps"][name][fact]]
        for name, path in (*rows, ("**whole job**", (fact,))):
            cells = " | ".join(show(cost_of(job, path)) for job in jobs)
            out.append(f"| {name} | {cells} | {' | '.join(_slope(jobs, wanted, *path))} |")
        out.append("")
    return out


if __name__ == "__main__":
    main()
