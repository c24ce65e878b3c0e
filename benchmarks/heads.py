"""Part `heads`: what every registered scorer takes to score all heads of a trained proxy, beside ALPS's own code.

The proxy itself is training like any other and is in part `cost`; here it is stood for by small random moves of q, k and v,
as long as a real proxy's (docs/LOG.md): what a scorer does with them costs the same. `attribution` asks for gradients too: its
arithmetic is timed with gradients given, its passes over held-out rows apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.findings import Findings, Ratio, Table, Target
from benchmarks.peers import alps
from benchmarks.peers.training import backward
from benchmarks.workbench import Times, Workbench, median_and_range, per_round
from p2d import flops
from p2d.arch.spec import every_head, n_units
from p2d.batches import mean_answer_nll, pack
from p2d.config import HEAD_SCORERS, Projection
from p2d.model_info import ModelInfo
from p2d.models import BaseModel
from p2d.registry import load
from p2d.rendering import RenderedRow
from p2d.scorers import WITH_GRADIENTS, PathPoint, Scorer, ScorerInput
from p2d.slices import HeadSlices, all_heads, slice_key
from p2d.step_flops import work_of_rendered

PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v")
"""The paper's."""

BY_GROUP = "ALPS, loaded, k and v by group"

LOOK, GRADIENT = "a look: losses of held-out rows", "a look with gradients"

GUIDE_ROWS = 32
"""Held-out rows that a proxy of the default size is judged on (`p2d.config.proxy_guide_rows`)."""
TIMED_ROWS = 4
"""Of them that a look is timed on, at once; the seconds are told for all."""

MOVE = 1e-4
"""Standard deviation of the moves; weights of this model have 0.1 or so."""


@dataclass(frozen=True, slots=True)
class MovedProxy:
    """A proxy whose slices are at hand in fp32, as after training (`p2d.scorers.Proxy`)."""

    before: Mapping[tuple[int, Projection], Tensor]
    after: Mapping[tuple[int, Projection], Tensor]
    gradients: Mapping[str, Tensor]
    """Given for every point of the path."""
    asked: set[float] = field(default_factory=set)
    """Points of the path that scorers asked for."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        return PROJECTIONS

    def base(self, layer: int, projection: Projection) -> Tensor:
        return self.before[layer, projection]

    def trained(self, layer: int, projection: Projection) -> Tensor:
        return self.after[layer, projection]

    def moved(self, layer: int, projection: Projection, start: float, end: float) -> Tensor:
        return (end - start) * (self.trained(layer, projection) - self.base(layer, projection))

    def at(self, fraction: float) -> PathPoint:
        # No loss falls, so no sum explains it: a scorer that looks again where it explains too little looks as often as it may.
        self.asked.add(fraction)
        return PathPoint(0.0, self.gradients)


def moved_proxy(base: BaseModel) -> MovedProxy:
    """Every slice of q, k and v moved a little, the same on every run."""
    generator = torch.Generator().manual_seed(0)
    places = [(layer, name) for layer in range(base.info.n_layers) for name in PROJECTIONS]
    before = {(layer, name): base.units(layer, name).float().clone() for layer, name in places}
    noise = {
        place: torch.randn(values.shape, generator=generator).to(values.device) for place, values in before.items()
    }
    after = {place: before[place] + MOVE * noise[place] for place in places}
    return MovedProxy(before, after, {slice_key(*place): noise[place] for place in places})


def heads(bench: Workbench) -> Findings:
    """Time every scorer, the passes that gradients take, and ALPS's code with and without loading."""
    base = bench.base
    proxy = moved_proxy(base)
    task = bench.scratch / "task-model"
    _save_task_model(bench, proxy)
    scorers: dict[str, Scorer] = {
        name: load(HEAD_SCORERS, name, what="head scorer", pointer="/heads/scorer") for name in HEAD_SCORERS
    }
    given = ScorerInput(base.info, proxy, 0)
    config = AutoConfig.from_pretrained(str(bench.model_dir), local_files_only=True)
    loaded = alps.load_models(bench.model_dir, task, base.device)
    guide = [base.renderer.render(row) for row in bench.rows[:TIMED_ROWS]]
    slices = HeadSlices(base, all_heads(base), PROJECTIONS)
    arms: dict[str, Callable[[], object]] = {name: partial(scorer, given) for name, scorer in scorers.items()}
    arms |= {
        "ALPS": lambda: alps.analyse(bench.model_dir, task, base.device),
        "ALPS, loaded": lambda: alps.score(*loaded, config),
        BY_GROUP: lambda: alps.score(*loaded, config, alps.head_weights_by_group),
        LOOK: lambda: mean_answer_nll(base, guide),
        GRADIENT: lambda: look_with_gradients(base, slices, guide),
    }
    theirs = ("ALPS", "ALPS, loaded", BY_GROUP)
    times = dict(bench.take_turns(arms, unwarmed=theirs, inside={GRADIENT: lambda: slices}))
    for look in (LOOK, GRADIENT):
        times[look] = [seconds * GUIDE_ROWS / len(guide) for seconds in times[look]]
    total = base.info.n_layers * base.info.n_heads
    lines = tuple((name, *median_and_range(times[name])) for name in (*scorers, *theirs, LOOK, GRADIENT))
    title = f"Seconds for {total} heads of a trained proxy; looks at {GUIDE_ROWS} rows, from {len(guide)}"
    return Findings(
        ratios=(*_against_alps(base, times), *_seconds(base, times, guide, scorers)),
        tables=(
            Table(title=title, columns=("what", "median", "lowest", "highest"), lines=lines),
            _looks(times, sorted(proxy.asked)),
        ),
        seconds=times,
    )


def look_with_gradients(base: BaseModel, slices: HeadSlices, guide: list[RenderedRow]) -> dict[str, Tensor]:
    """What `p2d.identify` does at a point of the path for a scorer in WITH_GRADIENTS; the slices are installed."""
    slices.zero_grad()
    backward(base, pack(base.renderer, guide, range(len(guide))))
    gradients = slices.gradients()
    slices.zero_grad()
    return gradients


def look_flops(base: BaseModel, guide: list[RenderedRow]) -> tuple[float, float]:
    """Operations of a look, and of one with gradients."""
    work = work_of_rendered(base, guide)
    heads = every_head(base.info)
    return flops.forward(base.info, work), flops.slice_training(base.info, work, heads=heads, projections=PROJECTIONS)


def _against_alps(base: BaseModel, times: Times) -> list[Ratio]:
    return [
        Ratio(
            name="ALPS's code / `pad`, time for all heads, its loading included",
            rounds=tuple(per_round(times["ALPS"], times["pad"])),
            target=Target(at="least", value=20),
            twin={"bytes read, theirs / ours": bytes_read_by_alps(base) / bytes_read_by_us(base.info)},
            note="what its command line does; ours scores weights that the proxy left in memory",
        ),
        Ratio(
            name="ALPS's code / `pad`, both models loaded before",
            rounds=tuple(per_round(times["ALPS, loaded"], times["pad"])),
            note="its softmax over concatenated q, k, v is another score than the paper's, which `pad` is",
        ),
        Ratio(
            name="the same with the k and v of each head's group, which ALPS's code misses",
            rounds=tuple(per_round(times[BY_GROUP], times["pad"])),
            note="as many weights per head as `pad` reads",
        ),
    ]


def _seconds(base: BaseModel, times: Times, guide: list[RenderedRow], scorers: Mapping[str, Scorer]) -> list[Ratio]:
    """Seconds of each scorer for all heads: one second is the target, whatever the scorer."""
    total, target = base.info.n_layers * base.info.n_heads, Target(at="most", value=1)
    ratios = [
        Ratio(
            name=f"seconds of `{name}` for {total} heads" + (", gradients given" if name in WITH_GRADIENTS else ""),
            rounds=tuple(times[name]),
            target=target,
            twin={"GFLOP": pad_flops(base.info) / 1e9} if name == "pad" else {},
        )
        for name in scorers
    ]
    plain, full = (count * GUIDE_ROWS / len(guide) / 1e9 for count in look_flops(base, guide))
    for name in sorted(WITH_GRADIENTS):
        own = zip(times[name], times[LOOK], times[GRADIENT], strict=True)
        ratios.append(
            Ratio(
                name=f"seconds of `{name}` for {total} heads, with the gradients at both ends",
                rounds=tuple(seconds + 2 * (gradient - look) for seconds, look, gradient in own),
                target=target,
                twin={"GFLOP": 2 * (full - plain)},
                note="the backward passes alone: losses at both ends are looked at for every scorer",
            )
        )
    return ratios


def _looks(times: Times, asked: list[float]) -> Table:
    """Which passes a head map of two half-proxies takes, and whose they are."""
    look, gradient = median(times[LOOK]), median(times[GRADIENT])
    between = len(asked) - 2
    return Table(
        title=f"Seconds of a head map's looks at {GUIDE_ROWS} held-out rows",
        columns=("look", "how often", "for every scorer", "more for `attribution`"),
        lines=(
            ("at the base", "once, for both half-proxies", look, gradient - look),
            ("at the end of a half-proxy, to judge its rate", "twice", 2 * look, 2 * (gradient - look)),
            ("half-way, where scores miss the decrease by a tenth", f"0 to {2 * between}", 0.0, 2 * between * gradient),
        ),
    )


def _save_task_model(bench: Workbench, proxy: MovedProxy) -> None:
    """The moved model as a directory, for code that reads directories."""
    loader: Any = AutoModelForCausalLM
    model = loader.from_pretrained(str(bench.model_dir), dtype=torch.bfloat16, local_files_only=True)
    base = bench.base
    with torch.no_grad():
        for (layer, name), values_UED in proxy.after.items():
            model.get_submodule(base.spec.path(layer, name)).weight.copy_(values_UED.flatten(0, 1))
    model.save_pretrained(bench.scratch / "task-model")


def bytes_read_by_us(info: ModelInfo) -> int:
    """q, k and v of both models, fp32 in memory."""
    units = sum(n_units(info, name) for name in PROJECTIONS)
    return 2 * 4 * info.n_layers * units * info.head_dim * info.hidden_size


def bytes_read_by_alps(base: BaseModel) -> int:
    """Both models whole, bf16, from disk."""
    return 2 * 2 * sum(weight.numel() for weight in base.module.parameters())


def pad_flops(info: ModelInfo) -> int:
    """Associated right to left: `k^T v` and its two changes once per group, `q^T` times them and its own change per head."""
    e, d = info.head_dim, info.hidden_size
    return info.n_layers * 3 * 2 * e * e * d * (info.n_kv_groups + info.n_heads)
