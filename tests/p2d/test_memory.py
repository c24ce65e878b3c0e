"""The closed form of memory against what PyTorch holds: every tensor that lives while a step computes is counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from p2d import baselines, batches, cpu_attention, generation, loss
from p2d.arch.spec import every_head
from p2d.config import DataConfig, HeadsConfig, JobConfig, TrainingConfig, heads_ratio, top_count
from p2d.identify import identify_heads
from p2d.memory import (
    ALIGNMENT_TOKENS,
    CHUNK_BYTES,
    GENERATED_ROWS,
    PADDING,
    PROCESS_BYTES,
    SHORT_TOKENS,
    TOKEN_BUDGET,
    Machine,
    full_peak,
    lora_peak,
    step_peaks,
)
from p2d.models import BaseModel, load_base_model
from p2d.pipeline import no_progress
from p2d.plans import RowCounts
from p2d.rendering import RenderedRow
from p2d.resolution import resolve
from p2d.responses import ResponseInput, alignment
from p2d.responses.alignment_likelihood import alignment_likelihood
from p2d.rows import Row
from p2d.training import train
from tests.factories import tiny_model_dir

ROWS = [Row(f"How much is {n} and {n}? " + "Think. " * 12, f"It is {n} " * 4, n) for n in range(100, 112)]
"""All of one length: the closed form takes every row to be as long as the longest."""

Precision = Literal["fp32", "bf16"]


class Live(TorchDispatchMode):
    """Adds up the storages of tensors that were made inside and still live; remembers the most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and look at what it gave."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def measured(run: Callable[[], object]) -> int:
    """Most bytes of tensors that lived at one time while something ran, without those from before."""
    with Live() as live:
        run()
    return int(live.peak)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that activations and slices outweigh all else, with a SmolLM2's proportions."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return tiny_model_dir(folder, n_layers=3, n_heads=6, n_kv_groups=2, head_dim=32)


@pytest.fixture(params=["fp32", "bf16"])
def base(request: pytest.FixtureRequest, model_dir: Path) -> BaseModel:
    """The model in each precision."""
    return load_base_model(model_dir, precision=request.param, device="cpu")


def counts(base: BaseModel, rows: Sequence[Row]) -> RowCounts:
    rendered = [base.renderer.render(row) for row in rows]
    lengths = [base.renderer.length(row) for row in rendered]
    answers = sum(len(row.answer_ids) for row in rendered)
    return RowCounts(rows=len(rows), tokens=sum(lengths), answer_tokens=answers, longest=max(lengths))


def machine(base: BaseModel) -> Machine:
    return Machine(on_gpu=False, wide=base.dtype == torch.float32)


def config(base: BaseModel, **heads: Any) -> JobConfig:
    asked = JobConfig(
        heads=HeadsConfig(proxy_rows=8, **heads),
        data=DataConfig(scorer="alignment"),
        training=TrainingConfig(epochs=1, learning_rate=1e-3),
    )
    return resolve(asked, rows=8, context_length=base.info.context_length, head_dim=base.info.head_dim).config


def foreseen(
    base: BaseModel, config: JobConfig, step: str, rows: Sequence[Row] = ROWS[:8], held_out: Sequence[Row] = ROWS[8:]
) -> int:
    """What the closed form says, without process and weights."""
    train_, guide = counts(base, rows), counts(base, held_out)
    peaks = step_peaks(base.info, config, machine(base), train=train_, guide=guide, evaluation=guide, shard_rows=2000)
    return beside(base, peaks[step].host)


def beside(base: BaseModel, host: int) -> int:
    return host - PROCESS_BYTES[False] - base.info.parameters * machine(base).number


def rendered(base: BaseModel, rows: Sequence[Row]) -> list[RenderedRow]:
    return [base.renderer.render(row) for row in rows]


def assert_tight(foreseen: int, measured: int) -> None:
    """An upper bound, and not one that could mean anything."""
    assert measured <= foreseen <= 1.6 * measured, f"{foreseen / 1e6:.1f} MB foreseen, {measured / 1e6:.1f} MB held"


@pytest.mark.parametrize("heads", [{}, {"ratio": 0.1}], ids=["a rank in all heads", "whole slices of some"])
def test_a_training_holds_what_was_foreseen(base: BaseModel, heads: dict[str, float]) -> None:
    asked = config(base, **heads)
    some = every_head(base.info)[: top_count(heads_ratio(asked.heads), len(every_head(base.info)))]

    held = measured(lambda: train(base, rendered(base, ROWS[:8]), rendered(base, ROWS[8:]), some, asked, no_progress))

    assert_tight(foreseen(base, asked, "train"), held)


@pytest.mark.parametrize("scorer", ["attribution", "shift"])
def test_proxies_hold_what_was_foreseen(base: BaseModel, scorer: str) -> None:
    asked = config(base, scorer=scorer)

    held = measured(lambda: identify_heads(base, ROWS[:8], ROWS[8:], asked, no_progress))

    assert_tight(foreseen(base, asked, "heads"), held)


def test_scoring_rows_holds_what_was_foreseen(base: BaseModel) -> None:
    asked = config(base)
    given = ResponseInput(
        base=base,
        rows=ROWS[:8],
        guide=ROWS[8:],
        span=range(8),
        slices=("v", "o"),
        config=asked,
        progress=no_progress,
    )

    held = measured(lambda: alignment.alignment(given))

    assert_tight(foreseen(base, asked, "respond"), held)


def test_a_guide_that_is_rated_is_held_meanwhile(base: BaseModel) -> None:
    asked = config(base)
    asked = replace(asked, data=replace(asked.data, scorer="alignment_likelihood"))
    guide = [Row(f"{row.prompt} Why?", row.answer, row.line) for row in ROWS] * 4  # several batches
    given = ResponseInput(base=base, rows=ROWS[:1], guide=guide, span=range(1), slices=("v", "o"), config=asked)

    held = measured(lambda: alignment_likelihood(given))

    assert_tight(foreseen(base, asked, "respond", ROWS[:1], guide), held)


def test_the_baselines_hold_what_was_foreseen(base: BaseModel) -> None:
    asked, rows, all_rows = config(base), rendered(base, ROWS[:8]), counts(base, ROWS[:8])

    full = measured(lambda: baselines.project_full_fine_tuning(base, rows, asked.training, on_step=lambda: None))
    lora = measured(lambda: baselines.project_lora(base, rows, asked.training, on_step=lambda: None))

    assert_tight(beside(base, full_peak(base.info, asked, machine(base), train=all_rows).host), full)
    assert_tight(beside(base, lora_peak(base.info, asked, machine(base), train=all_rows).host), lora)


def test_its_numbers_are_those_of_the_engine() -> None:
    assert TOKEN_BUDGET == batches.TOKEN_BUDGET
    assert ALIGNMENT_TOKENS == {False: alignment.CPU_TOKENS, True: alignment.GPU_TOKENS}
    assert {False: loss.CHUNK_BYTES["cpu"], True: loss.OTHER_CHUNK_BYTES} == CHUNK_BYTES
    assert PADDING == batches.MAX_PADDING
    assert SHORT_TOKENS == cpu_attention.MAX_TOKENS
    assert GENERATED_ROWS == generation.GENERATE_ROWS


def test_on_a_gpu_the_weights_lie_on_the_device_and_the_process_on_the_host(base: BaseModel) -> None:
    asked, few = config(base), counts(base, ROWS)

    peaks = step_peaks(
        base.info, asked, Machine(on_gpu=True, wide=False), train=few, guide=few, evaluation=few, shard_rows=2000
    )

    assert all(peak.host >= PROCESS_BYTES[True] for peak in peaks.values())
    assert all(peak.device >= 2 * base.info.parameters for peak in peaks.values())
