"""The probe reads exactly the attention that the model pays, changes nothing, and never stays silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from p2d.arch import ARCHS
from p2d.batches import collate
from p2d.branches import branching, plant
from p2d.models import BaseModel, load_base_model
from p2d.probe import ProbePlan, Reader, probe_attention, span_mass
from p2d.rendering import RenderedRow
from tests.factories import tiny_model_dir

SPANS = ((2, 5), (5, 9))
READ = [(10, 13), (14, 15)]
"""Tokens whose attention is read, of each line."""


def plan_for(base: BaseModel, width: int, layers: range | None = None) -> ProbePlan:
    readers = tuple(Reader(line, tokens, ((0, width),)) for line, tokens in enumerate(READ))
    return ProbePlan(readers=readers, spans=SPANS, layers=layers or range(base.info.n_layers))


@pytest.fixture(scope="module", params=sorted(ARCHS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of one family."""
    return tiny_model_dir(tmp_path_factory.mktemp("models") / request.param, family=request.param)


def eager_mass(directory: Path, ids_BT: Tensor, read: list[tuple[int, int]]) -> Tensor:
    """Masses [L, N, H, S] out of full attention matrices, as transformers alone computes them; one reader per line."""
    loader: Any = AutoModelForCausalLM
    module = loader.from_pretrained(directory, attn_implementation="eager").eval()
    with torch.no_grad():
        attentions = module(ids_BT, output_attentions=True, use_cache=False).attentions
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack([prob_BHTT[n, :, slice(*tokens), slice(*span)].sum(-1).mean(-1) for span in SPANS], -1)
                    for n, tokens in enumerate(read)
                ]
            )
            for prob_BHTT in attentions
        ]
    )


def test_the_mass_is_that_of_eager_attention_in_every_family(directory: Path) -> None:
    base = load_base_model(directory, precision="fp32", device="cpu")
    ids_BT = torch.randint(5, 200, (2, 40), generator=torch.Generator().manual_seed(0))  # longer than tiny windows
    read = [(10, 13), (35, 40)]
    readers = tuple(Reader(n, tokens, ((0, 40),)) for n, tokens in enumerate(read))
    with torch.no_grad(), probe_attention() as probe:
        probe.plan = ProbePlan(readers=readers, spans=SPANS, layers=range(base.info.n_layers))
        base.hidden(ids_BT)
        mass_LNHS = probe.take()

    torch.testing.assert_close(mass_LNHS, eager_mass(directory, ids_BT, read), rtol=1e-5, atol=1e-6)


def test_a_branch_is_the_end_of_its_whole_sequence_in_every_family(directory: Path) -> None:
    base = load_base_model(directory, precision="fp32", device="cpu")
    ids_T = torch.randint(5, 200, (40,), generator=torch.Generator().manual_seed(0))
    tree = plant(21, [12, 7])
    read = [(28, 33), (36, 40)]
    with torch.no_grad(), probe_attention() as probe:
        readers = tuple(Reader(0, tokens, tree.sees(branch)) for branch, tokens in enumerate(read))
        probe.plan = ProbePlan(readers=readers, spans=SPANS, layers=range(base.info.n_layers))
        with branching(tree):
            h_TD = base.hidden(ids_T[None], position_ids=tree.positions(base.device))[0]
        mass_LNHS = probe.take()

        for branch, (start, stop) in enumerate(tree.branches):
            alone_T = torch.cat([ids_T[: tree.trunk], ids_T[start:stop]])
            tokens = (read[branch][0] - start + tree.trunk, read[branch][1] - start + tree.trunk)

            torch.testing.assert_close(
                h_TD[start:stop], base.hidden(alone_T[None])[0, tree.trunk :], rtol=1e-4, atol=1e-5
            )
            expected_L1HS = eager_mass(directory, alone_T[None], [tokens])
            torch.testing.assert_close(mass_LNHS[:, branch], expected_L1HS[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [1, 4, 6, 9, 30])
def test_the_mass_respects_a_sliding_window(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q_BHTE, k_BGTE = (torch.randn(1, n, 16, 8, generator=generator) for n in (4, 2))
    tree = plant(9, [7])

    mass_HS = span_mass(q_BHTE, k_BGTE, 0.3, window, Reader(0, (11, 14), tree.sees(0)), SPANS)

    torch.testing.assert_close(mass_HS, by_hand(q_BHTE, k_BGTE, window, (11, 14)))


def by_hand(q_BHTE: Tensor, k_BGTE: Tensor, window: int, tokens: tuple[int, int]) -> Tensor:
    score_HTT = (q_BHTE[0] @ k_BGTE[0].repeat_interleave(2, dim=0).mT) * 0.3
    place_T = torch.arange(16)
    back_TT = place_T[:, None] - place_T
    prob_HTT = score_HTT.masked_fill((back_TT < 0) | (back_TT >= window), float("-inf")).softmax(-1)
    return torch.stack([prob_HTT[:, slice(*tokens), slice(*span)].sum(-1).mean(-1) for span in SPANS], dim=-1)


def test_probing_changes_no_bit_of_the_output(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    batch = collate(tiny.renderer, rendered, [0, 1, 2])
    with torch.no_grad():
        plain = tiny.hidden(batch.input_ids_BT)
        with probe_attention() as probe:
            probe.plan = plan_for(tiny, batch.input_ids_BT.shape[1])
            probed = tiny.hidden(batch.input_ids_BT)

    assert torch.equal(plain, probed)


def test_only_the_layers_of_the_plan_are_read(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    ids_BT = collate(tiny.renderer, rendered, [0, 1]).input_ids_BT
    with torch.no_grad(), probe_attention() as probe:
        probe.plan = plan_for(tiny, ids_BT.shape[1])
        tiny.hidden(ids_BT)
        every_LNHS = probe.take()
        probe.plan = plan_for(tiny, ids_BT.shape[1], range(1, 2))
        tiny.hidden(ids_BT)

        assert torch.equal(probe.take(), every_LNHS[1:2])


def test_a_probe_without_a_plan_reads_nothing(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    with torch.no_grad(), probe_attention() as probe:
        tiny.hidden(collate(tiny.renderer, rendered, [0]).input_ids_BT)

        with pytest.raises(AssertionError, match="no plan"):
            probe.take()


def test_a_model_that_never_calls_the_probe_is_noticed(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    with torch.no_grad(), probe_attention() as probe:
        probe.plan = plan_for(tiny, 20)
        tiny.module.set_attn_implementation("sdpa")  # as a family would that keeps its own function
        tiny.hidden(collate(tiny.renderer, rendered, [0]).input_ids_BT)

        with pytest.raises(AssertionError, match="the probe saw layers"):
            probe.take()
