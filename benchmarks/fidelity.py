"""Fast mode against faithful mode: do they like the same rows, and do models trained by them come out the same?

    python -m benchmarks.fidelity --model DIR            # on the task's rows
    python -m benchmarks.fidelity --model DIR --junk 0.5 # half of the rows get another row's answer

Every seed is a job of its own over the same rows, in both modes: its proxy, head map, scores, pool, order of training and
random rows. The arms (faithful, fast, random rows) take turns. Fast mode is fit to ship if its mean held-out loss is above the
faithful mode's by no more than the seed noise, the standard deviation of the faithful mode's own loss over the seeds. Writes
fast_mode.json and fast_mode.md; what is named by model, task, scorer and junk is one entry, the others stay.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from p2d import flops
from p2d.config import (
    DATA_SCORERS,
    DEFAULT_RATIO,
    RECIPES,
    DataConfig,
    HeadsConfig,
    JobConfig,
    TrainingConfig,
    epochs_of,
    heads_ratio,
    top_count,
)
from p2d.evaluation import row_losses
from p2d.head_maps import Head, spearman
from p2d.identify import identify_heads
from p2d.model_info import ModelInfo
from p2d.models import BaseModel, load_base_model
from p2d.registry import load
from p2d.resolution import resolve
from p2d.responses import ResponseInput, Responses
from p2d.rows import Row, read_rows
from p2d.selection import Selection, select_rows
from p2d.slices import HeadSlices
from p2d.training import train

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("faithful", "fast", "random")


@dataclass(frozen=True, slots=True)
class Arm:
    """One trained model."""

    name: str
    seed: int
    loss: float
    """Nats per answer token of the held-out rows."""
    train_s: float
    train_flops: int
    junk: float
    """Share of junk among its rows."""


@dataclass(slots=True)
class Pool:
    """What was found on one pool of rows."""

    rows: int
    kept: int
    junk: float
    base_loss: float
    faithful_s: list[float] = field(default_factory=list)
    """Seconds of scoring, by seed, as are the next three; where no seed decides anything it was done once."""
    faithful_flops: list[int] = field(default_factory=list)
    fast_s: list[float] = field(default_factory=list)
    fast_flops: list[int] = field(default_factory=list)
    rank_correlation: list[float] = field(default_factory=list)
    """Spearman's, of the scores of the rows that both modes scored; one per seed, whose draws the two share."""
    agreement: list[float] = field(default_factory=list)
    """Share of the rows that fast mode kept which faithful mode would keep of the same pool."""
    arms: list[Arm] = field(default_factory=list)

    def losses(self, name: str) -> list[float]:
        """Held-out losses of an arm, by seed."""
        return [arm.loss for arm in self.arms if arm.name == name]

    def verdict(self) -> dict[str, float | bool | int]:
        """Whether fast mode is better than faithful mode, or worse by no more than the noise of the seeds."""
        seeds = len(self.losses("fast"))
        noise = stdev(self.losses("faithful")) if seeds > 1 else float("nan")
        difference = fmean(self.losses("fast")) - fmean(self.losses("faithful"))
        return {"seeds": seeds, "difference": difference, "noise": noise, "ships": difference <= noise}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write the results, print the verdict; 0 if fast mode is fit to ship."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    say = _sayer(started)
    base = load_base_model(options.model, precision=options.precision, device=options.device)
    rows, guide, held_out = _rows(options)
    say(f"{len(rows)} rows, {len(guide)} guide rows, {len(held_out)} held-out rows; {base.info.name} {base.dtype}")
    pool = measure(base, rows, guide, held_out, options, ends=started + 60 * options.minutes, say=say)
    result = write(options.out, pool, base, options, seconds=time.perf_counter() - started)
    print(result["text"])  # noqa: T201 - a command line
    return 0 if pool.verdict()["ships"] else 1


def measure(
    base: BaseModel,
    rows: Sequence[tuple[Row, bool]],
    guide: Sequence[Row],
    held_out: Sequence[Row],
    options: argparse.Namespace,
    *,
    ends: float,
    say: Any,
) -> Pool:
    """For each seed find heads, score in both modes and train all arms, while there is time."""
    texts = [row for row, _ in rows]
    junk_R = np.array([bad for _, bad in rows])
    rendered = [base.renderer.render(row) for row in held_out]
    kept = top_count(options.ratio, len(rows))
    pool = Pool(len(rows), kept, float(junk_R.mean()), row_losses(base, rendered).mean)
    say(f"loss before training {pool.base_loss:.4f}")
    whole, seconds = None, 0.0
    for seed in range(options.seeds):
        began = time.perf_counter()
        faithful, fast = (_config(options, mode, len(rows), base.info, seed) for mode in ("faithful", "fast"))
        head_map = identify_heads(base, texts, guide, faithful, _silent)
        heads = head_map.top(heads_ratio(faithful.heads))
        if whole is None or faithful.data.scorer == "icl":  # whose groups are drawn by the seed
            whole, seconds = _respond(base, texts, guide, faithful)
        pool.faithful_s.append(seconds)
        pool.faithful_flops.append(whole.flops)
        part, fast_seconds = _respond(base, texts, guide, fast)
        pool.fast_s.append(fast_seconds)
        pool.fast_flops.append(part.flops)
        picked = select_rows([whole.shard], heads, options.ratio, texts, seed=seed)
        quick = select_rows([part.shard], heads, options.ratio, texts, seed=seed)
        _compare(pool, picked, quick)
        say(
            f"seed {seed}: {quick.scored} of {len(rows)} rows scored fast, rank correlation {pool.rank_correlation[-1]:.3f}"
        )
        drawn = sorted(random.Random(seed).sample(range(len(rows)), kept))  # noqa: S311 - not a secret
        arms = {"faithful": picked.kept_rows, "fast": quick.kept_rows, "random": drawn}
        for name in ARMS[seed % 3 :] + ARMS[: seed % 3]:
            indices = arms[name]
            arm = _train(
                base, name, [texts[i] for i in indices], heads, faithful, rendered, float(junk_R[indices].mean())
            )
            pool.arms.append(arm)
            say(f"  {name}: {len(indices)} rows, loss {arm.loss:.4f}, trained in {arm.train_s:.0f} s")
        if seed + 1 < options.seeds and time.perf_counter() + (time.perf_counter() - began) > ends:
            say(f"time is up after {seed + 1} of {options.seeds} seeds")
            break
    return pool


def _respond(base: BaseModel, rows: Sequence[Row], guide: Sequence[Row], config: JobConfig) -> tuple[Responses, float]:
    scorer = load(DATA_SCORERS, config.data.scorer, what="data scorer", pointer="/data/scorer")
    assert config.training.slices != "auto"
    given = ResponseInput(
        base=base, rows=rows, guide=guide, span=range(len(rows)), slices=config.training.slices, config=config
    )
    started = time.perf_counter()
    responses: Responses = scorer(given)
    return responses, time.perf_counter() - started


def _compare(pool: Pool, faithful: Selection, fast: Selection) -> None:
    both = np.flatnonzero(~np.isnan(fast.score_R))
    pool.rank_correlation.append(spearman(faithful.score_R[both].tolist(), fast.score_R[both].tolist()))
    best = set(both[np.argsort(faithful.rank_R[both])][: fast.kept].tolist())
    pool.agreement.append(len(best & set(fast.kept_rows)) / fast.kept)


def _train(
    base: BaseModel,
    name: str,
    rows: Sequence[Row],
    heads: Sequence[Head],
    config: JobConfig,
    held_out: Sequence[Any],
    junk: float,
) -> Arm:
    rendered = [base.renderer.render(row) for row in rows]
    result = train(base, rendered, [], heads, config, _silent)
    assert config.training.slices != "auto"
    with HeadSlices(base, heads, config.training.slices) as slices:
        slices.load_masters(result.state)
        loss = row_losses(base, held_out).mean
    work = flops.work_of([(base.renderer.length(row), len(row.answer_ids)) for row in rendered])
    spent = flops.slice_training(base.info, work, heads=heads, projections=config.training.slices)
    again = flops.slice_training(base.info, work, heads=heads, projections=config.training.slices, cached=True)
    operations = spent + again * (epochs_of(config.training) - 1)
    return Arm(name, config.training.seed, loss, result.seconds, round(operations), junk)


# --- what goes in ----------------------------------------------------------------------------------------------------


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description=(__doc__ or "").split("\n", 1)[0]
    )
    parser.add_argument("--model", type=Path, required=True, help="directory of the base model")
    parser.add_argument("--train", type=Path, default=ROOT / "examples/gsm8k/train.jsonl", help="rows to choose from")
    parser.add_argument("--test", type=Path, default=ROOT / "examples/gsm8k/test.jsonl", help="guide and held-out rows")
    parser.add_argument("--rows", type=int, default=240)
    parser.add_argument("--held-out", type=int, default=44)
    parser.add_argument("--guide", type=int, default=16)
    parser.add_argument("--junk", type=float, default=0.0, help="share of rows that get another row's answer")
    parser.add_argument("--recipe", default="default", choices=sorted(RECIPES))
    parser.add_argument("--ratio", type=float, default=0.15, help="share of rows kept")
    parser.add_argument("--proxy-rows", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60.0, help="no further seed is begun that would end later")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results")
    return parser.parse_args(arguments)


def _rows(options: argparse.Namespace) -> tuple[list[tuple[Row, bool]], list[Row], list[Row]]:
    """Rows to choose from, each with whether it is junk; guide; held-out rows."""
    every = _read(options.train)[: options.rows]
    bad = set(random.Random(0).sample(range(len(every)), round(options.junk * len(every))))  # noqa: S311 - not a secret
    order = sorted(bad)
    answer_of = dict(zip(order, order[1:] + order[:1], strict=True))
    rows = [
        (Row(row.prompt, every[answer_of.get(index, index)].answer, row.line), index in bad)
        for index, row in enumerate(every)
    ]
    test = _read(options.test)
    return rows, test[: options.guide], test[options.guide : options.guide + options.held_out]


def _read(path: Path) -> list[Row]:
    return [row for row in read_rows(path, "json" if path.suffix == ".json" else "jsonl") if isinstance(row, Row)]


def _config(options: argparse.Namespace, mode: Any, rows: int, info: ModelInfo, seed: int) -> JobConfig:
    """Whole slices of the best tenth of the heads: by which both modes were compared."""
    config = JobConfig(
        recipe=options.recipe,
        heads=HeadsConfig(
            scorer=RECIPES[options.recipe].head_scorer, ratio=DEFAULT_RATIO, proxy_rows=options.proxy_rows
        ),
        data=DataConfig(ratio=options.ratio, mode=mode),
        training=TrainingConfig(rank=None, epochs=options.epochs, learning_rate=options.learning_rate, seed=seed),
    )
    return resolve(config, rows=rows, context_length=info.context_length, head_dim=info.head_dim).config


def _silent(done: int, total: int, metrics: Mapping[str, float], /) -> None:
    """The lines that `say` prints are enough."""


def _sayer(started: float) -> Any:
    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {line}", file=sys.stderr, flush=True)  # noqa: T201

    return say


# --- what comes out --------------------------------------------------------------------------------------------------


def write(out: Path, pool: Pool, base: BaseModel, options: argparse.Namespace, *, seconds: float) -> dict[str, Any]:
    """Put this pool's entry into fast_mode.json and write fast_mode.md anew."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "fast_mode.json"
    pools: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    name = f"{base.info.name}, {options.train.parent.name}, recipe {options.recipe}"
    name += f", {options.junk:.0%} junk" if options.junk else ""
    pools[name] = asdict(pool) | {
        "verdict": pool.verdict(),
        "command": " ".join(["python -m benchmarks.fidelity", *_shown(options)]),
        "machine": f"{platform.machine()}, {options.threads} threads, {base.device}, {base.dtype}",
        "load_average": os.getloadavg()[0],
        "seconds": seconds,
    }
    path.write_text(json.dumps(pools, indent=1) + "\n")
    text = "\n".join(
        ["# Fast mode against faithful mode", "", *(line for item in pools.items() for line in _page(*item))]
    )
    (out / "fast_mode.md").write_text(text + "\n")
    return {"text": text}


def _shown(options: argparse.Namespace) -> list[str]:
    return [
        f"--{name.replace('_', '-')} {value.name if isinstance(value, Path) else value}"
        for name, value in vars(options).items()
        if name not in ("out", "train", "test")
    ]


def _page(name: str, entry: Mapping[str, Any]) -> list[str]:
    verdict = entry["verdict"]
    by_arm = {arm: [one for one in entry["arms"] if one["name"] == arm] for arm in ARMS}
    stage_2 = fmean(entry["fast_flops"]) / fmean(entry["faithful_flops"])
    stage_3 = fmean(arm["train_flops"] for arm in by_arm["fast"]) / fmean(
        arm["train_flops"] for arm in by_arm["faithful"]
    )
    lines = [
        f"## {name}",
        f"`{entry['command']}`; {entry['machine']}, load {entry['load_average']:.1f}, {entry['seconds']:.0f} s.",
        "",
        f"{entry['kept']} of {entry['rows']} rows kept; held-out loss before training {entry['base_loss']:.4f}.",
        "",
        "| arm | held-out loss by seed | mean | junk kept |",
        "| --- | --- | --- | --- |",
    ]
    for arm, ones in by_arm.items():
        losses = [one["loss"] for one in ones]
        shown = ", ".join(f"{loss:.4f}" for loss in losses)
        lines.append(f"| {arm} | {shown} | {fmean(losses):.4f} | {fmean(one['junk'] for one in ones):.0%} |")
    lines += [
        "",
        f"Rank correlation of fast with faithful scores, on rows that both scored: {_list(entry['rank_correlation'])}; of the "
        f"rows that fast mode kept, faithful mode would keep of the same pool: {_list(entry['agreement'])}.",
        "",
        f"Cost of fast over faithful mode in operations: scoring {stage_2:.2f}, training {stage_3:.2f}; scoring in seconds "
        f"{fmean(entry['fast_s']) / fmean(entry['faithful_s']):.2f}.",
        "",
        f"Fast minus faithful: {verdict['difference']:+.4f}; seed noise {verdict['noise']:.4f} over {verdict['seeds']} seeds: "
        + judgement(verdict),
        "",
    ]
    return lines


def judgement(verdict: Mapping[str, Any]) -> str:
    """What a verdict says in words."""
    if verdict["seeds"] < 2:
        return "**not judged, one seed has no noise**."
    if verdict["difference"] < -verdict["noise"]:
        return "**better by more than the noise, fit to ship**."
    return (
        "**within the noise, fit to ship**."
        if verdict["ships"]
        else "**worse by more than the noise, not fit to ship**."
    )


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    raise SystemExit(main())
