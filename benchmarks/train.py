"""Part `train`: one optimizer step on head slices, beside masked gradients, LoRA and full fine-tuning of the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import Context, copy_context
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from benchmarks.counters import bytes_of, peak_extra_bytes, saved_for_backward
from benchmarks.findings import Findings, Ratio, Table, Target
from benchmarks.peers.training import Lora, Masters, backward, full, masked, trainable_state
from benchmarks.workbench import Times, Workbench, per_round
from p2d import flops
from p2d.activation_cache import remember_below
from p2d.arch.spec import every_head
from p2d.batches import Batch, pack
from p2d.config import RECIPES, Projection, top_count
from p2d.flops import Work
from p2d.model_info import ModelInfo
from p2d.models import BaseModel, load_base_model
from p2d.optimization import Schedule, SliceTrainer
from p2d.rendering import RenderedRow
from p2d.slices import Head, HeadSlices
from p2d.step_flops import work_of_rendered

PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v")
"""The paper's."""
DEFAULT_PROJECTIONS = RECIPES["default"].slices

BATCH = 4
"""Rows of a step."""

LORA_RANK = 128
"""Of LoRA on q, k and v: LESS's warm-up, and about the trained state of ten per cent of the heads."""

HEAD_RATIO = 0.10

RATE = Schedule(peak=1e-6, steps=1_000_000)
"""So small that nothing drifts: only what a step costs is of interest."""


UPPER = "slices, upper half"
CACHED = "slices, upper half, cached"
DEFAULT = "slices, default recipe"
MASKED_DEFAULT = "masked, default recipe"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to train."""

    step: Callable[[], object]
    """Forward, backward and update."""
    backward: Callable[[], object]
    """Without the update."""
    inside: Callable[[], AbstractContextManager[object]]
    """What holds during a step: which weights ask for gradients, which slices are installed."""
    state: Callable[[], list[Tensor]]
    """What is kept for the parameters, after a step: themselves, a gradient each, and two moments."""
    flops: float
    weights: list[Tensor]
    """The model's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes of a step."""

    state: int
    saved: int
    """Activations kept for backward."""
    peak: int
    """Most at once, the model's own weights included."""


def chosen_heads(info: ModelInfo, from_layer: int) -> list[Head]:
    """A tenth of all heads at even distances from the layer `from_layer` up, that layer included."""
    every = [head for head in every_head(info) if head[0] >= from_layer]
    count = top_count(HEAD_RATIO, info.n_layers * info.n_heads)
    return [every[i * len(every) // count] for i in range(count)]


def train(bench: Workbench) -> Findings:
    """All ratios of stage 3."""
    base = bench.base
    # From the middle of the file: its first rows stand in the other parts.
    rendered = [base.renderer.render(row) for row in bench.rows[len(bench.rows) // 2 :][:BATCH]]
    with made_arms(bench, rendered) as arms:
        times = bench.take_turns(
            {name: arm.step for name, arm in arms.items()}, inside={name: arm.inside for name, arm in arms.items()}
        )
        bench.say("  counting bytes")
        held = {name: bytes_held(base, arm) for name, arm in arms.items()}
    tokens = sum(base.renderer.length(row) for row in rendered)
    table = Table(
        title=f"One step of {BATCH} rows, {tokens} tokens",
        columns=("arm", "GFLOP", "activations kept, MB", "trained state, MB", "peak with the model, MB"),
        lines=tuple(
            (name, arm.flops / 1e9, held[name].saved / 1e6, held[name].state / 1e6, held[name].peak / 1e6)
            for name, arm in arms.items()
        ),
    )
    ratios = (*_of_times(times, arms), *_of_bytes(held))
    return Findings(ratios=ratios, tables=(table,), seconds=times)


@contextmanager
def made_arms(bench: Workbench, rendered: list[RenderedRow]) -> Iterator[dict[str, Arm]]:
    """Every way to train, on the same rows."""
    base, half = bench.base, bench.base.info.n_layers // 2
    batch = pack(base.renderer, rendered, range(len(rendered)))
    work = work_of_rendered(base, rendered)
    heads, upper = chosen_heads(base.info, 0), chosen_heads(base.info, half)
    with remembering(base, half) as context:
        cached = _slices(base, rendered, upper, work, cached=True)
        yield {
            "full fine-tuning": _with_masters(base, batch, full(base), flops.full_fine_tuning(base.info, work)),
            "masked": _masked(base, batch, heads, work, PROJECTIONS),
            "LoRA": _lora(bench, batch, work),
            "slices": _slices(base, rendered, heads, work),
            MASKED_DEFAULT: _masked(base, batch, heads, work, DEFAULT_PROJECTIONS),
            DEFAULT: _slices(base, rendered, heads, work, projections=DEFAULT_PROJECTIONS),
            UPPER: _slices(base, rendered, upper, work),
            CACHED: replace(
                cached, step=partial(context.run, cached.step), backward=partial(context.run, cached.backward)
            ),
        }


@contextmanager
def remembering(base: BaseModel, layer: int) -> Iterator[Context]:
    """A context in which the layers below `layer` are remembered: other arms do not see it, and it outlasts a round."""
    context, remembered = copy_context(), remember_below(base, layer)
    context.run(remembered.__enter__)
    try:
        yield context
    finally:
        context.run(remembered.__exit__, None, None, None)


def _with_masters(base: BaseModel, batch: Batch, masters: Masters, operations: float) -> Arm:
    def step() -> None:
        backward(base, batch)
        masters.update()

    return Arm(
        step=step,
        backward=lambda: backward(base, batch),
        inside=masters.trainable,
        state=masters.state_tensors,
        flops=operations,
        weights=list(base.module.parameters()),
    )


def _masked(base: BaseModel, batch: Batch, heads: list[Head], work: Work, projections: tuple[Projection, ...]) -> Arm:
    operations = flops.masked_training(base.info, work, projections=projections)
    return _with_masters(base, batch, masked(base, heads, projections), operations)


def _lora(bench: Workbench, batch: Batch, work: Work) -> Arm:
    own = load_base_model(bench.model_dir, precision=bench.precision, device=bench.device)
    weights: list[Tensor] = list(own.module.parameters())
    lora = Lora(own, rank=LORA_RANK, projections=PROJECTIONS)

    def step() -> None:
        backward(own, batch)
        lora.update()

    return Arm(
        step=step,
        backward=lambda: backward(own, batch),
        inside=nullcontext,
        state=lora.state_tensors,
        flops=flops.lora_training(own.info, work, rank=LORA_RANK, projections=PROJECTIONS),
        weights=weights,
    )


def _slices(
    base: BaseModel,
    rendered: list[RenderedRow],
    heads: list[Head],
    work: Work,
    *,
    projections: tuple[Projection, ...] = PROJECTIONS,
    cached: bool = False,
) -> Arm:
    slices = HeadSlices(base, heads, projections)
    trainer = SliceTrainer(base, slices, rendered, batch_size=len(rendered), seed="0")

    @contextmanager
    def installed() -> Iterator[None]:
        with slices:
            slices.sync()
            yield

    return Arm(
        step=lambda: trainer.advance(RATE),
        backward=lambda: backward(base, pack(base.renderer, rendered, range(len(rendered)))),
        inside=installed,
        state=lambda: trainable_state(slices.parameters(), trainer.optimizer),
        flops=flops.slice_training(base.info, work, heads=heads, projections=projections, cached=cached),
        weights=list(base.module.parameters()),
    )


def bytes_held(base: BaseModel, arm: Arm) -> Held:
    """What a step holds; the arm has made steps before."""
    with arm.inside():
        with saved_for_backward([*arm.weights, *arm.state()]) as saved:
            arm.backward()
        peak = peak_extra_bytes(base.device, arm.step)
    state = bytes_of(arm.state())
    # The gradients in `state` are made during the step: they are in its peak already.
    return Held(state=state, saved=saved[0], peak=bytes_of(arm.weights) + state * 3 // 4 + peak)


def _of_times(times: Times, arms: dict[str, Arm]) -> Iterator[Ratio]:
    def against(one: str, other: str, target: float | None, note: str = "") -> Ratio:
        return Ratio(
            name=f"time of a step, {one} / {other}",
            rounds=tuple(per_round(times[one], times[other])),
            target=None if target is None else Target(at="least", value=target),
            twin={"FLOP": arms[one].flops / arms[other].flops},
            note=note,
        )

    yield against("masked", "slices", 1.1)
    yield against("masked", CACHED, 2, "heads chosen from the middle layer up; every epoch after the first")
    yield against("LoRA", "slices", 1.05, f"rank {LORA_RANK} on q, k, v")
    yield against("LoRA", CACHED, 2)
    yield against(MASKED_DEFAULT, DEFAULT, None, "v and o")
    yield against("full fine-tuning", "slices", None)
    yield against("full fine-tuning", DEFAULT, None)
    yield against("full fine-tuning", UPPER, None)
    yield against("full fine-tuning", CACHED, None)


def _of_bytes(held: dict[str, Held]) -> Iterator[Ratio]:
    def against(
        what: str, one: str, of: Callable[[Held], int], target: float | None, other: str = "slices", note: str = ""
    ) -> Ratio:
        return Ratio(
            name=f"{what}, {one} / {other}",
            rounds=(of(held[one]) / of(held[other]),),
            target=None if target is None else Target(at="least", value=target),
            note=note,
        )

    spread = "q, k, v: heads at even distances touch a larger share of the KV groups than they are of all heads"
    for one, target in (("full fine-tuning", 50), ("masked", 6), ("LoRA", 4)):
        yield against("bytes of the trained state", one, lambda at: at.state, target, note=spread)
    yield against("bytes of the trained state", "full fine-tuning", lambda at: at.state, 50, DEFAULT, "v and o")
    yield against(
        "bytes of the trained state", MASKED_DEFAULT, lambda at: at.state, 6, DEFAULT, "v and o on both sides"
    )
    yield against("peak memory of a step", "full fine-tuning", lambda at: at.peak, 4)
    for one in ("full fine-tuning", "masked", "LoRA"):
        yield against("activations kept for backward", one, lambda at: at.saved, None)
    yield against("activations kept for backward", "full fine-tuning", lambda at: at.saved, None, DEFAULT)
