"""An adapter is the trained model, bit for bit, on its own base; on any other it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from p2d.adapters import load_adapter, merge, save_adapter
from p2d.batches import collate
from p2d.config import JobConfig, Projection, TrainingConfig
from p2d.errors import AdapterMismatch, ModelError
from p2d.models import BaseModel, load_base_model
from p2d.slices import HeadSlices
from tests.factories import some_rows, tiny_model_dir
from tests.p2d.test_slices import HEADS, assert_same, weights_of

PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v", "o")


def trained_adapter(base: BaseModel, directory: Path) -> dict[str, torch.Tensor]:
    """Write an adapter of some change, and return all weights of the model that it came from."""
    generator = torch.Generator().manual_seed(5)
    with HeadSlices(base, HEADS, PROJECTIONS) as slices:
        with torch.no_grad():
            for master in slices.parameters():
                master.add_(torch.randn(master.shape, generator=generator), alpha=0.1)
        slices.sync()
        save_adapter(
            directory,
            base=base,
            heads=HEADS,
            projections=PROJECTIONS,
            state=slices.state(),
            config=JobConfig(training=TrainingConfig(rank=None)),
            learning_rate=1e-3,
        )
        return weights_of(base)


def logits(base: BaseModel) -> torch.Tensor:
    batch = collate(base.renderer, [base.renderer.render(row) for row in some_rows(3)], range(3))
    with torch.no_grad():
        return base.logits(base.hidden(batch.input_ids_BT))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_base_plus_adapter_is_the_trained_model_and_minus_adapter_the_base(
    tiny_dir: Path, tmp_path: Path, precision: Literal["fp32", "bf16"]
) -> None:
    trained = trained_adapter(load_base_model(tiny_dir, precision=precision, device="cpu"), tmp_path)
    base = load_base_model(tiny_dir, precision=precision, device="cpu")
    before = weights_of(base)
    adapter = load_adapter(tmp_path)

    previous = adapter.apply(base)
    assert_same(weights_of(base), trained)
    adapter.revert(base, previous)
    assert_same(weights_of(base), before)


def test_the_manifest_names_base_heads_units_and_hash(tiny: BaseModel, tmp_path: Path) -> None:
    trained_adapter(tiny, tmp_path)

    manifest = load_adapter(tmp_path).manifest

    assert (manifest.base_model, manifest.base_digest) == (tiny.info.name, tiny.info.digest)
    assert list(manifest.heads) == HEADS
    units = {entry.key: entry.units for entry in manifest.slices}
    assert units["layers.1.q"] == units["layers.1.o"] == (0, 4)
    assert units["layers.1.k"] == units["layers.1.v"] == (0, 1)
    assert units["layers.2.v"] == (1,)
    assert manifest.parameters == (2 + 2 + 2 + 2 + 1 + 1 + 1 + 1) * 16 * 96


def test_an_adapter_of_another_base_is_refused_before_anything_changes(tiny: BaseModel, tmp_path: Path) -> None:
    trained_adapter(tiny, tmp_path / "adapter")
    other = load_base_model(tiny_model_dir(tmp_path / "other", seed=1), precision="fp32", device="cpu")
    before = weights_of(other)

    with pytest.raises(AdapterMismatch) as caught:
        load_adapter(tmp_path / "adapter").apply(other)

    assert caught.value.facts["found"] == other.info.digest
    assert_same(weights_of(other), before)


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "gone"])
def test_a_damaged_adapter_is_refused(tiny: BaseModel, tmp_path: Path, damage: str) -> None:
    trained_adapter(tiny, tmp_path)
    weights = tmp_path / "heads.safetensors"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(content[:-8])
    elif damage == "manifest":
        (tmp_path / "manifest.json").write_text("{}")
    else:
        weights.unlink()

    with pytest.raises(ModelError):
        load_adapter(tmp_path)


def test_a_merged_model_is_an_ordinary_model_that_computes_the_same_bits(tiny_dir: Path, tmp_path: Path) -> None:
    base = load_base_model(tiny_dir, precision="fp32", device="cpu")
    trained = trained_adapter(base, tmp_path / "adapter")
    load_adapter(tmp_path / "adapter").apply(base)

    merged_dir = merge(tiny_dir, tmp_path / "adapter", tmp_path / "merged")
    merged = load_base_model(merged_dir, precision="fp32", device="cpu")

    assert_same(weights_of(merged), trained)
    assert torch.equal(logits(merged), logits(base))
    assert merged.info.digest != base.info.digest
    with pytest.raises(ModelError, match="exists"):
        merge(tiny_dir, tmp_path / "adapter", tmp_path / "merged")


def test_merging_a_model_in_several_files_changes_only_the_files_with_chosen_layers(
    tiny_dir: Path, tmp_path: Path
) -> None:
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    for file in tiny_dir.iterdir():
        if file.suffix != ".safetensors" and not file.name.startswith("p2d-"):
            (sharded / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tiny_dir / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    second = {name: tensor for name, tensor in tensors.items() if name not in first}
    save_file(first, sharded / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file(second, sharded / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    places = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in tensors}
    (sharded / "model.safetensors.index.json").write_text(
        f'{{"metadata": {{}}, "weight_map": {places}}}'.replace("'", '"')
    )
    base = load_base_model(sharded, precision="fp32", device="cpu")
    trained = trained_adapter(base, tmp_path / "adapter")

    merged = load_base_model(merge(sharded, tmp_path / "adapter", tmp_path / "merged"), precision="fp32", device="cpu")

    assert_same(weights_of(merged), trained)


def leave_stale_shard(base_dir: Path) -> None:
    """A weight file that no load reads, because model.safetensors goes first."""
    stale = {name: tensor * 0 for name, tensor in load_file(base_dir / "model.safetensors").items()}
    save_file(stale, base_dir / "model-00001-of-00001.safetensors", metadata={"format": "pt"})


def test_a_weight_file_that_no_load_reads_is_not_merged(tmp_path: Path) -> None:
    leave_stale_shard(base_dir := tiny_model_dir(tmp_path / "base"))
    trained = trained_adapter(load_base_model(base_dir, precision="fp32", device="cpu"), tmp_path / "adapter")

    merged = merge(base_dir, tmp_path / "adapter", tmp_path / "merged")

    assert [path.name for path in merged.glob("*.safetensors")] == ["model.safetensors"]
    assert_same(weights_of(load_base_model(merged, precision="fp32", device="cpu")), trained)


def test_a_merged_model_has_no_other_form_of_the_weights_from_before(tmp_path: Path) -> None:
    base_dir = tiny_model_dir(tmp_path / "base")
    for name in (
        "onnx/model.onnx",
        "pytorch_model.bin",
        "LICENSE",
        "additional_chat_templates/tools.jinja",
        ".secret.json",
    ):
        (base_dir / name).parent.mkdir(exist_ok=True)
        (base_dir / name).write_text("from before")
    trained_adapter(load_base_model(base_dir, precision="fp32", device="cpu"), tmp_path / "adapter")

    merged = merge(base_dir, tmp_path / "adapter", tmp_path / "merged")

    assert {path.relative_to(merged).as_posix() for path in merged.rglob("*") if path.is_file()} == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("model.safetensors", "LICENSE", "additional_chat_templates/tools.jinja"),
    }
