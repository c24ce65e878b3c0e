"""peft itself reads the export, and base + LoRA is base + head adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from p2d.adapters import load_adapter, merge
from p2d.arch import ARCHS
from p2d.errors import AdapterMismatch, ModelError
from p2d.models import load_base_model
from p2d.peft_export import export_peft
from tests.factories import tiny_model_dir
from tests.p2d.test_adapters import leave_stale_shard, logits, trained_adapter
from tests.p2d.test_slices import assert_same, weights_of

# peft asks transformers in words that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def with_lora(base_dir: Path, lora_dir: Path, dtype: torch.dtype | str = "auto") -> Any:
    """The base as transformers loads it, in the type of its files or another, with the LoRA as peft loads it."""
    loader: Any = AutoModelForCausalLM
    return PeftModel.from_pretrained(loader.from_pretrained(base_dir, dtype=dtype), lora_dir)


@pytest.mark.parametrize("family", sorted(ARCHS))
def test_merged_by_peft_a_bf16_base_has_the_adapters_bits(tmp_path: Path, family: str) -> None:
    base_dir = tiny_model_dir(tmp_path / family, family=family, dtype=torch.bfloat16)
    trained = trained_adapter(load_base_model(base_dir, precision="bf16", device="cpu"), tmp_path / "adapter")

    export_peft(base_dir, tmp_path / "adapter", tmp_path / "lora")
    merged = with_lora(base_dir, tmp_path / "lora").merge_and_unload()

    assert_same(merged.state_dict(), trained)


def test_a_weight_file_that_no_load_reads_is_not_exported_from(tmp_path: Path) -> None:
    leave_stale_shard(base_dir := tiny_model_dir(tmp_path / "base", dtype=torch.bfloat16))
    trained = trained_adapter(load_base_model(base_dir, precision="bf16", device="cpu"), tmp_path / "adapter")

    export_peft(base_dir, tmp_path / "adapter", tmp_path / "lora")

    assert_same(with_lora(base_dir, tmp_path / "lora").merge_and_unload().state_dict(), trained)


def changed(tmp_path: Path, stored: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Base weights of a `stored` model, and those after training in fp32; base, adapter and LoRA are in `tmp_path`."""
    base_dir = tiny_model_dir(tmp_path / "base", dtype=stored)
    base = load_base_model(base_dir, precision="fp32", device="cpu")
    before = weights_of(base)
    trained = trained_adapter(base, tmp_path / "adapter")
    export_peft(base_dir, tmp_path / "adapter", tmp_path / "lora")
    return before, trained


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_an_adapter_trained_in_fp32_comes_back_within_two_fp32_roundings(tmp_path: Path, stored: torch.dtype) -> None:
    before, trained = changed(tmp_path, stored)

    merged = with_lora(tmp_path / "base", tmp_path / "lora", torch.float32).merge_and_unload().state_dict()

    moved = 0
    for name, value in trained.items():
        bound = ((value - before[name]).abs().double() + value.abs().double()) / 2**24
        assert bool(((merged[name].double() - value.double()).abs() <= bound).all()), name
        moved += int((value != before[name]).sum())
    assert moved > 1000


def test_merged_into_a_bf16_base_it_is_at_most_one_bf16_step_from_our_own_merge(tmp_path: Path) -> None:
    changed(tmp_path, torch.bfloat16)
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    own = weights_of(load_base_model(tmp_path / "merged", precision="bf16", device="cpu"))

    merged = with_lora(tmp_path / "base", tmp_path / "lora").merge_and_unload().state_dict()

    apart = 0
    for name, value in own.items():
        steps = (merged[name].view(torch.int16).int() - value.view(torch.int16).int()).abs()  # neighbours differ by one
        assert int(steps.max()) <= 1, name
        apart += int((steps > 0).sum())
    assert apart <= 5  # near ties alone


@pytest.mark.parametrize("family", sorted(ARCHS))
def test_base_plus_lora_computes_what_base_plus_adapter_computes(tmp_path: Path, family: str) -> None:
    base_dir = tiny_model_dir(tmp_path / family, family=family)
    base = load_base_model(base_dir, precision="fp32", device="cpu")
    untrained_BTV = logits(base)
    trained_adapter(base, tmp_path / "adapter")
    load_adapter(tmp_path / "adapter").apply(base)
    expected_BTV = logits(base)

    export_peft(base_dir, tmp_path / "adapter", tmp_path / "lora")
    base.module.load_state_dict(load_base_model(base_dir, precision="fp32", device="cpu").module.state_dict())
    wrapped = PeftModel.from_pretrained(base.module, tmp_path / "lora")

    torch.testing.assert_close(logits(base), expected_BTV, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected_BTV, untrained_BTV, atol=1e-2)
    with wrapped.disable_adapter():
        torch.testing.assert_close(logits(base), untrained_BTV, rtol=1e-4, atol=1e-4)


def test_files_that_hold_the_backbone_alone_are_understood(tmp_path: Path) -> None:
    base_dir = tiny_model_dir(tmp_path / "gpt2", family="gpt2", dtype=torch.bfloat16)
    file = base_dir / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    trained = trained_adapter(load_base_model(base_dir, precision="bf16", device="cpu"), tmp_path / "adapter")

    merge(base_dir, tmp_path / "adapter", tmp_path / "merged")
    export_peft(base_dir, tmp_path / "adapter", tmp_path / "lora")

    assert_same(weights_of(load_base_model(tmp_path / "merged", precision="bf16", device="cpu")), trained)
    assert_same(with_lora(base_dir, tmp_path / "lora").merge_and_unload().state_dict(), trained)


def test_another_base_or_a_place_that_is_taken_is_refused(tiny_dir: Path, tmp_path: Path) -> None:
    trained_adapter(load_base_model(tiny_dir, precision="fp32", device="cpu"), tmp_path / "adapter")
    other = tiny_model_dir(tmp_path / "other", seed=1)

    with pytest.raises(AdapterMismatch):
        export_peft(other, tmp_path / "adapter", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    export_peft(tiny_dir, tmp_path / "adapter", tmp_path / "lora")
    with pytest.raises(ModelError, match="exists"):
        export_peft(tiny_dir, tmp_path / "adapter", tmp_path / "lora")
