"""The closed form of every pass agrees with PyTorch's own counter, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from p2d import flops
from p2d.batches import answer_nll, collate
from p2d.config import DataConfig, JobConfig, Projection
from p2d.flops import Work
from p2d.models import BaseModel, load_base_model
from p2d.probe import probe_attention
from p2d.rendering import RenderedRow
from p2d.responses import ResponseInput
from p2d.responses.alignment import align
from p2d.responses.icl import METRICS, read_masses, set_scene
from p2d.rows import Row
from p2d.slices import Head, HeadSlices
from tests.factories import TINY, tiny_model_dir

ROWS, LENGTH, ANSWER = 3, 40, 12
SQUARE = Work(tokens=ROWS * LENGTH, pairs=ROWS * LENGTH**2, logits=ROWS * ANSWER)
"""Without a kernel that knows what causal means, every token meets every other: that is what the counter sees."""

TOLERANCE = 0.002
"""Far below the 2 % that a closed form may miss by: rotary embeddings are all that is left out here."""


def counted(work: Callable[[], object]) -> int:
    """Operations by the counter; it does not know the CPU's own attention kernel, so that is switched off."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form counts what the counter sees: every token meets every other."""
    monkeypatch.setattr(flops, "causal_pairs", lambda tokens, past=0: tokens * (past + tokens))


def loss(base: BaseModel) -> torch.Tensor:
    row = RenderedRow(
        prompt_ids=list(range(5, 5 + LENGTH - ANSWER - len(base.renderer.prefix_ids))), answer_ids=[7] * ANSWER
    )
    nll_B, _ = answer_nll(base, collate(base.renderer, [row] * ROWS, range(ROWS)))
    return nll_B.sum()


def test_a_forward_pass(tiny: BaseModel) -> None:
    with torch.no_grad():
        found = counted(lambda: loss(tiny))

    assert flops.forward(tiny.info, SQUARE) == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("projections", [("q", "k", "v"), ("v", "o"), ("o",), ("q",), ("q", "k", "v", "o")])
@pytest.mark.parametrize("heads", [[(0, 1)], [(1, 0), (1, 4), (2, 5)], [(2, 2)]], ids=["all layers", "two", "last"])
def test_training_slices_down_to_the_shallowest_chosen_layer(
    tiny: BaseModel, heads: list[Head], projections: tuple[Projection, ...]
) -> None:
    with HeadSlices(tiny, heads, projections):
        found = counted(lambda: loss(tiny).backward())

    closed = flops.slice_training(tiny.info, SQUARE, heads=heads, projections=projections)
    assert closed == pytest.approx(found, rel=TOLERANCE)


def test_full_fine_tuning(tiny: BaseModel) -> None:
    tiny.module.requires_grad_(True)

    found = counted(lambda: loss(tiny).backward())

    assert flops.full_fine_tuning(tiny.info, SQUARE) == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about peft
@pytest.mark.parametrize("targets", [None, ("q", "k", "v")])
def test_lora(tiny: BaseModel, targets: tuple[Projection, ...] | None) -> None:
    names = "all-linear" if targets is None else [f"{name}_proj" for name in targets]
    wrapped = get_peft_model(tiny.module, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))

    found = counted(lambda: loss(tiny).backward())

    closed = flops.lora_training(tiny.info, SQUARE, rank=4, projections=targets)
    assert closed == pytest.approx(found, rel=TOLERANCE)
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert trained == tiny.info.n_layers * flops.lora_parameters(tiny.info, rank=4, projections=targets)


def test_cached_activations_save_the_layers_below_the_shallowest(tiny: BaseModel) -> None:
    heads: list[Head] = [(1, 0)]
    v: tuple[Projection, ...] = ("v",)
    plain = flops.slice_training(tiny.info, SQUARE, heads=heads, projections=v)
    cached = flops.slice_training(tiny.info, SQUARE, heads=heads, projections=v, cached=True)

    assert plain - cached == flops.forward(tiny.info, replace(SQUARE, logits=0), to_layer=1)


def test_slices_of_a_group_are_counted_once(tiny: BaseModel) -> None:
    heads: list[Head] = [(0, 0), (0, 1), (2, 5)]
    slices = HeadSlices(tiny, heads, ("q", "v", "o"))

    assert flops.slice_weights(tiny.info, heads, ("q", "v", "o")) == slices.n_parameters


def test_a_causal_row_meets_half_of_its_square() -> None:
    assert flops.work_of([(4, 1), (3, 2)]) == Work(tokens=7, pairs=10 + 6, logits=3)
    assert flops.causal_pairs(2, past=10) == 11 + 12


@pytest.mark.usefixtures("squares")
@pytest.mark.parametrize("projections", [("v",), ("q", "k", "v"), ("v", "o")])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("rated", [False, True])
def test_alignment_scoring(tiny: BaseModel, projections: tuple[Projection, ...], first: int, rated: bool) -> None:
    # One prompt and one length: nothing is padded.
    row, config = (
        Row(prompt="What is 2 plus 2?", answer="It is 4.", line=1),
        JobConfig(data=DataConfig(mode="faithful")),
    )
    given = ResponseInput(base=tiny, rows=[row] * 4, guide=[row] * 2, span=range(4), slices=projections, config=config)
    rendered = tiny.renderer.render(row)
    size = (tiny.renderer.length(rendered), len(rendered.answer_ids))

    found = counted(lambda: align(given, range(first, 3), projections, rate_guide=rated))

    closed = flops.alignment(
        tiny.info, guide=[size] * 2, rows=[size] * 4, projections=projections, from_layer=first, rate_guide=rated
    )
    assert closed == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.usefixtures("squares")
def test_a_group_of_in_context_scoring(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    scene = set_scene(tiny, rendered[:3], [rendered[5]] * 2)
    every = range(tiny.info.n_layers)

    def read_and_judge() -> None:
        _, h_TD = read_masses(tiny, probe, scene, every)
        METRICS["token_accuracy"](tiny)(scene, [], h_TD)

    with torch.no_grad(), probe_attention() as probe:
        found = counted(read_and_judge)
        found_alone = counted(lambda: read_masses(tiny, probe, scene, every))

    assert scene.flops(tiny.info, judged=True) == pytest.approx(found, rel=TOLERANCE)
    assert scene.flops(tiny.info, judged=False) == pytest.approx(found_alone, rel=TOLERANCE)


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_family_costs_what_its_sizes_say(family: str, tmp_path: Path) -> None:
    base = load_base_model(tiny_model_dir(tmp_path / family, family=family), precision="fp32", device="cpu")
    heads: list[Head] = [(1, 0), (1, base.info.n_heads - 1)]

    with torch.no_grad():
        passed = counted(lambda: loss(base))
    with HeadSlices(base, heads, ("q", "k", "v", "o")):
        trained = counted(lambda: loss(base).backward())

    assert flops.forward(base.info, SQUARE) == pytest.approx(passed, rel=0.02)
    closed = flops.slice_training(base.info, SQUARE, heads=heads, projections=("q", "k", "v", "o"))
    assert closed == pytest.approx(trained, rel=0.02)
