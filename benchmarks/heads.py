"""Part `heads`: scoring every head from base and proxy-trained weights, beside ALPS's own code.

The proxy itself is training like any other and is in part `cost`; here it is stood for by small random moves of q, k and v,
as long as a real proxy's (docs/LOG.md): what a scorer does with them costs the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.findings import Findings, Ratio, Table, Target
from benchmarks.peers import alps
from benchmarks.workbench import Workbench, median_and_range, per_round
from p2d.arch.spec import n_units
from p2d.config import HEAD_SCORERS, Projection
from p2d.model_info import ModelInfo
from p2d.models import BaseModel
from p2d.registry import load
from p2d.scorers import WITH_GRADIENTS, WITHOUT_PROXY, PathPoint, Scorer, ScorerInput

PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v")
"""The paper's."""

BY_GROUP = "ALPS, loaded, k and v by group"

MOVE = 1e-4
"""Standard deviation of the moves; weights of this model have 0.1 or so."""


@dataclass(frozen=True, slots=True)
class MovedProxy:
    """A proxy whose slices are at hand in fp32, as after training (`p2d.scorers.Proxy`)."""

    before: Mapping[tuple[int, Projection], Tensor]
    after: Mapping[tuple[int, Projection], Tensor]

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
        raise AssertionError("only scorers without gradients are timed here")


def moved_proxy(base: BaseModel) -> MovedProxy:
    """Every slice of q, k and v moved a little, the same on every run."""
    generator = torch.Generator().manual_seed(0)
    places = [(layer, name) for layer in range(base.info.n_layers) for name in PROJECTIONS]
    before = {(layer, name): base.units(layer, name).float().clone() for layer, name in places}
    moves = {place: MOVE * torch.randn(values.shape, generator=generator) for place, values in before.items()}
    return MovedProxy(before, {place: before[place] + moves[place].to(before[place].device) for place in places})


def heads(bench: Workbench) -> Findings:
    """Time every scorer that needs no gradients, and ALPS's code with and without loading."""
    base = bench.base
    proxy = moved_proxy(base)
    task = bench.scratch / "task-model"
    _save_task_model(bench, proxy)
    names = [name for name in HEAD_SCORERS if name not in WITH_GRADIENTS | WITHOUT_PROXY]
    scorers: dict[str, Scorer] = {
        name: load(HEAD_SCORERS, name, what="head scorer", pointer="/heads/scorer") for name in names
    }
    given = ScorerInput(base.info, proxy, 0)
    config = AutoConfig.from_pretrained(str(bench.model_dir), local_files_only=True)
    loaded = alps.load_models(bench.model_dir, task, base.device)
    arms: dict[str, Callable[[], object]] = {name: partial(scorer, given) for name, scorer in scorers.items()}
    arms |= {
        "ALPS": lambda: alps.analyse(bench.model_dir, task, base.device),
        "ALPS, loaded": lambda: alps.score(*loaded, config),
        BY_GROUP: lambda: alps.score(*loaded, config, alps.head_weights_by_group),
    }
    theirs = ("ALPS", "ALPS, loaded", BY_GROUP)
    times = bench.take_turns(arms, unwarmed=theirs)
    total = base.info.n_layers * base.info.n_heads
    read = {"bytes read, theirs / ours": bytes_read_by_alps(base) / bytes_read_by_us(base.info)}
    ratios = [
        Ratio(
            name="ALPS's code / `pad`, time for all heads, its loading included",
            rounds=tuple(per_round(times["ALPS"], times["pad"])),
            target=Target(at="least", value=20),
            twin=read,
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
        Ratio(
            name=f"seconds of `pad` for {total} heads",
            rounds=tuple(times["pad"]),
            target=Target(at="most", value=1),
            twin={"GFLOP": pad_flops(base.info) / 1e9},
        ),
    ]
    lines = tuple((name, *median_and_range(times[name])) for name in (*names, *theirs))
    table = Table(title=f"Seconds for {total} heads", columns=("scorer", "median", "lowest", "highest"), lines=lines)
    return Findings(ratios=tuple(ratios), tables=(table,), seconds=times)


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
