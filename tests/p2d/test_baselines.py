"""Timing the alternatives never changes the base model, and the projection is the measured step times the work."""

from __future__ import annotations

import gc

import pytest
import torch

from p2d import baselines
from p2d.baselines import Baseline, project_full_fine_tuning, project_lora
from p2d.config import TrainingConfig
from p2d.models import BaseModel
from p2d.rendering import RenderedRow
from tests.p2d.test_training import Memory, no_room_for_moments

SETTINGS = TrainingConfig(epochs=3, batch_size=4)


def both(base: BaseModel, rendered: list[RenderedRow]) -> list[Baseline]:
    return [
        project(base, rendered, SETTINGS, on_step=lambda: None) for project in (project_full_fine_tuning, project_lora)
    ]


def test_the_base_weights_are_bit_identical_afterwards(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    before = {key: value.clone() for key, value in tiny.module.state_dict().items()}
    modules = [type(module) for module in tiny.module.modules()]

    both(tiny, rendered)

    after = tiny.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value.view(torch.int32), before[key].view(torch.int32)) for key, value in after.items())
    assert [type(module) for module in tiny.module.modules()] == modules
    assert not any(p.requires_grad or p.grad is not None for p in tiny.module.parameters())


def test_nothing_of_a_projection_stays_behind(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    both(tiny, rendered)
    before = tensors()
    both(tiny, rendered)

    assert tensors() == before


def test_a_projection_says_that_it_is_one_and_counts_all_steps(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    full, lora = both(tiny, rendered)

    for found in (full, lora):
        assert found.projected
        assert found.steps == 3 * 3
        assert found.seconds is not None
        assert found.step_s is not None
        assert found.seconds == pytest.approx(found.steps * found.step_s)
    assert full.trained_parameters == sum(p.numel() for p in tiny.module.parameters())
    assert lora.trained_parameters < full.trained_parameters


def test_too_little_memory_gives_no_number_but_the_reason(
    tiny: BaseModel, rendered: list[RenderedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "free_memory_bytes", lambda device: 1000)

    full, _ = both(tiny, rendered)

    assert full.seconds is None
    assert "1000 are free" in (full.reason or "")


def test_base_weights_survive_a_cancel_in_the_middle(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    before = {key: value.clone() for key, value in tiny.module.state_dict().items()}

    def cancel() -> None:
        raise KeyboardInterrupt

    for project in (project_full_fine_tuning, project_lora):
        with pytest.raises(KeyboardInterrupt):
            project(tiny, rendered, SETTINGS, on_step=cancel)
        after = tiny.module.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_memory_that_runs_out_on_the_way_gives_no_number_but_the_reason(
    tiny: BaseModel, rendered: list[RenderedRow]
) -> None:
    before = {key: value.clone() for key, value in tiny.module.state_dict().items()}
    Memory(positions=1).attach(tiny)  # as where training fits only in smaller micro-batches

    for found in both(tiny, rendered):
        assert (found.seconds, found.measured_steps, found.steps) == (None, 0, 9)
        assert found.trained_parameters > 0
        assert "memory while timing a baseline" in (found.reason or "")

    after = tiny.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert not any(p.requires_grad or p.grad is not None for p in tiny.module.parameters())


def test_no_room_for_the_optimizers_state_gives_no_number_either(
    tiny: BaseModel, rendered: list[RenderedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_room_for_moments(monkeypatch)

    for found in both(tiny, rendered):
        assert found.seconds is None
        assert "memory while timing a baseline" in (found.reason or "")
    assert not any(p.requires_grad or p.grad is not None for p in tiny.module.parameters())


def test_a_sample_of_many_rows_stands_for_all(
    tiny: BaseModel, rendered: list[RenderedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = baselines._workload(tiny, rendered, SETTINGS)
    monkeypatch.setattr(baselines, "SAMPLED_ROWS", 9)

    sample = baselines._workload(tiny, rendered, SETTINGS)

    assert (len(rendered), len(whole.batches), whole.scale) == (12, 3, 1.0)
    assert (len(sample.batches), sample.scale, sample.steps) == (2, 12 / 8, whole.steps)
    assert sample.batches == whole.batches[:2]
