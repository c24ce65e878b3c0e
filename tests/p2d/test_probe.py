"""The probe reads exactly the attention that the model pays, changes nothing, and never stays silent."""

from __future__ import annotations

import pytest
import torch

from p2d.batches import collate
from p2d.models import BaseModel
from p2d.probe import ProbePlan, probe_attention
from p2d.rendering import RenderedRow

SPANS = ((2, 5), (5, 9))


def plan_for(positions: list[list[int]]) -> ProbePlan:
    longest = max(map(len, positions))
    position_BQ = torch.tensor([row + [0] * (longest - len(row)) for row in positions])
    valid_BQ = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in positions])
    return ProbePlan(position_BQ=position_BQ, valid_BQ=valid_BQ, past=0, spans=SPANS)


def test_the_mass_is_that_of_the_full_attention_matrix(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    batch = collate(tiny.renderer, rendered, [0, 1])
    positions = [[10, 11, 12], [14]]
    with torch.no_grad(), probe_attention(tiny.info.n_layers) as probe:
        probe.plan = plan_for(positions)
        tiny.hidden(batch.input_ids_BT)
        mass_LBHS = probe.take()

    tiny.module.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = tiny.module(batch.input_ids_BT, output_attentions=True).attentions
    for layer, prob_BHTT in enumerate(attentions):
        for b, wanted in enumerate(positions):
            for s, (start, stop) in enumerate(SPANS):
                expected_H = prob_BHTT[b, :, wanted, start:stop].sum(-1).mean(-1)
                torch.testing.assert_close(mass_LBHS[layer, b, :, s], expected_H, rtol=1e-5, atol=1e-7)


def test_probing_changes_no_bit_of_the_output(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    batch = collate(tiny.renderer, rendered, [0, 1, 2])
    with torch.no_grad():
        plain = tiny.hidden(batch.input_ids_BT)
        with probe_attention(tiny.info.n_layers) as probe:
            probe.plan = plan_for([[10], [11], [12]])
            probed = tiny.hidden(batch.input_ids_BT)

    assert torch.equal(plain, probed)


def test_a_probe_without_a_plan_reads_nothing(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    with torch.no_grad(), probe_attention(tiny.info.n_layers) as probe:
        tiny.hidden(collate(tiny.renderer, rendered, [0]).input_ids_BT)

        with pytest.raises(AssertionError, match="the probe saw layers"):
            probe.take()


def test_a_model_that_never_calls_the_probe_is_noticed(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    with torch.no_grad(), probe_attention(tiny.info.n_layers) as probe:
        probe.plan = plan_for([[10]])
        tiny.module.set_attn_implementation("sdpa")  # as a family would that keeps its own function
        tiny.hidden(collate(tiny.renderer, rendered, [0]).input_ids_BT)

        with pytest.raises(AssertionError, match="the probe saw layers"):
            probe.take()
