"""Loading a model: every weight is accounted for, nothing is executed, GGUF is converted once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from p2d.config import Precision
from p2d.device import pick_device, pick_dtype
from p2d.errors import ConfigError, ModelError, ModelNotFound, ModelUnsupported, OutOfMemory
from p2d.models import convert_gguf, load_base_model
from p2d.rendering import load_renderer
from tests.factories import CHAT_TEMPLATE, some_rows, tiny_model_dir


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_loaded_model_is_frozen_in_the_asked_type(tiny_dir: Path, precision: Precision, dtype: torch.dtype) -> None:
    base = load_base_model(tiny_dir, precision=precision, device="cpu")

    assert {weight.dtype for weight in base.module.parameters()} == {dtype}
    assert not any(weight.requires_grad for weight in base.module.parameters())
    assert not base.module.training
    assert (base.info.n_heads, base.info.n_kv_groups) == (6, 2)
    assert base.weight(2, "k").shape == (32, 96)
    assert base.load_s > 0


LOADED: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "a missing weight": (
        {"model.layers.1.input_layernorm.weight": None}, r"model\.layers\.1\.input_layernorm\.weight is missing"),
    "a misshapen weight": (
        {"model.norm.weight": torch.ones(7)}, r"model\.norm\.weight has the shape \(7,\), expected \(96,\)"),
    "a bias that the config does not ask for": (
        {"model.layers.0.self_attn.q_proj.bias": torch.ones(96), "model.layers.1.self_attn.q_proj.bias": torch.ones(96)},
        r"layers\.0\.self_attn\.q_proj\.bias belongs to no part of the model \(and 1 more weight\)"),
    "a layer too many": (
        {"model.layers.3.self_attn.q_proj.weight": torch.ones(96, 96)}, r"layers\.3\.self_attn\.q_proj\.weight belongs"),
}  # fmt: skip
"""What is wrong with a weight file -> how its tensors change (None: gone), and what the refusal says."""


@pytest.mark.parametrize("what", LOADED)
def test_a_load_refuses_by_name(tmp_path: Path, what: str) -> None:
    changes, said = LOADED[what]
    change_weights(directory := tiny_model_dir(tmp_path / "tiny"), changes)

    with pytest.raises(ModelError, match=said):
        load_base_model(directory, device="cpu")


def test_the_tables_and_masks_of_older_files_are_no_weights_left_over(tmp_path: Path) -> None:
    for family, names in (
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
    ):
        directory = tiny_model_dir(tmp_path / family, family=family)
        held = load_base_model(directory, device="cpu").info.parameters
        change_weights(directory, {name: torch.ones(8) for name in names})

        assert load_base_model(directory, device="cpu").info.parameters == held


def change_weights(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors: dict[str, Any] = load_file(directory / "model.safetensors") | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_no_numbers_are_named_before_anything_is_computed(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "tiny")
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"not finite: model\.layers\.1\.mlp\.up_proj\.weight\."):
        load_base_model(directory, device="cpu")


def test_pickled_weights_and_code_from_the_model_are_never_used(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "tiny")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        load_base_model(directory, device="cpu")

    directory = tiny_model_dir(tmp_path / "coded")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_base_model(directory, device="cpu")
    assert not (tmp_path / "ran").exists()


def test_heads_that_stand_elsewhere_than_described_are_refused(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "neox", family="gpt_neox")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 2}))  # which GPT-NeoX ignores

    with pytest.raises(ModelError, match="query_key_value"):
        load_base_model(directory, device="cpu")


def test_an_unsupported_family_is_named(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "tiny")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))

    with pytest.raises(ModelUnsupported, match="mamba"):
        load_base_model(directory, device="cpu")


@pytest.mark.parametrize(
    "raised",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("unable to mmap 269060552 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
        OSError("Cannot allocate memory (os error 12)"),
    ],
    ids=["allocator", "torch's mmap", "safetensors' mmap"],
)
def test_a_model_that_does_not_fit_in_memory_is_not_called_broken(
    tmp_path: Path, raised: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise raised

    directory = tiny_model_dir(tmp_path / "tiny")
    monkeypatch.setattr("p2d.models.AutoModelForCausalLM.from_pretrained", full)
    with pytest.raises(OutOfMemory, match="ran out of memory while loading 'tiny'") as caught:
        load_base_model(directory, device="cpu")
    assert caught.value.retryable

    monkeypatch.setattr("p2d.models.AutoTokenizer.from_pretrained", lambda *_, **__: None)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(OutOfMemory, match=r"while loading 'tiny\.gguf'"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "converted")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rms_norm_eps", "1e-5", "rms_norm_eps"),
        ("hidden_act", 5, "hidden_act"),
        ("hidden_act", "nosuch", "'nosuch' \\(KeyError\\)"),
        ("eos_token_id", "x", "eos_token_id"),
        ("pad_token_id", 9999, "Padding_idx"),
        ("rms_norm_eps", math.nan, "its logits are not finite"),  # which only a pass shows
    ],
)
def test_a_value_in_the_config_that_transformers_cannot_use_is_the_files_fault(
    tmp_path: Path, key: str, value: object, said: str
) -> None:
    directory = tiny_model_dir(tmp_path / "tiny")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {key: value}))

    with pytest.raises(ModelError, match=said):
        load_base_model(directory, device="cpu")


def test_a_chat_template_that_jinja_cannot_read_is_the_files_fault(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "tiny")
    (directory / "chat_template.jinja").write_text("{% if")

    with pytest.raises(ModelError, match="unexpected 'end of template'"):
        load_base_model(directory, device="cpu")


def test_a_device_that_is_not_there_is_the_users_fault() -> None:
    for name in ("cuda:99", "no-such-device"):
        with pytest.raises(ConfigError):
            pick_device(name)
    assert pick_dtype("fp32", pick_device("cpu")) == torch.float32


@pytest.mark.parametrize(
    ("has", "expected"), [("amx_bf16", "bfloat16"), ("bf16", "bfloat16"), ("avx512_bf16", "float32")]
)
def test_a_cpu_uses_bf16_only_where_it_has_matrix_units_for_it(
    has: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {has: True})

    assert pick_dtype("auto", pick_device("cpu")) is getattr(torch, expected)


def write_gguf(path: Path, directory: Path) -> None:
    """The tiny model as llama.cpp would store it: other names, rotary halves of q and k interleaved."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    writer: Any = gguf.GGUFWriter(str(path), "llama")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges(["a t"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, tensor in tensors.items():
        stored = name.replace("model.layers", "blk").replace("model.embed_tokens", "token_embd")
        stored = stored.replace("model.norm", "output_norm")
        for theirs, gguf_name in names.items():
            stored = stored.replace(theirs, gguf_name)
        for part, count in (("attn_q.", heads), ("attn_k.", groups)):
            if part in stored:
                rows, columns = tensor.shape
                tensor = tensor.reshape(count, 2, rows // count // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(stored, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_same_model_in_safetensors(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "tiny", dtype=torch.bfloat16)
    as_fp32 = tiny_model_dir(tmp_path / "fp32")
    rounded = {name: tensor.bfloat16().float() for name, tensor in load_file(as_fp32 / "model.safetensors").items()}
    save_file(rounded, as_fp32 / "model.safetensors", metadata={"format": "pt"})
    write_gguf(tmp_path / "tiny.gguf", as_fp32)

    info = convert_gguf(tmp_path / "tiny.gguf", tmp_path / "models" / "converted")

    converted = load_file(tmp_path / "models" / "converted" / "model.safetensors")
    original = load_file(directory / "model.safetensors")
    assert [name for name in original if not torch.equal(original[name], converted[name])] == []
    assert (info.name, info.dtype, info.model_type) == ("converted", "bf16", "llama")
    source = json.loads((tmp_path / "models" / "converted" / "p2d-conversion.json").read_text())
    assert len(source["source_sha256"]) == 64
    assert convert_gguf(tmp_path / "gone.gguf", tmp_path / "models" / "converted") == info  # once
    theirs, ours = (load_renderer(path) for path in (tmp_path / "models" / "converted", directory))
    assert theirs.prefix_ids == ours.prefix_ids
    assert [theirs.render(row) for row in some_rows(5)] == [ours.render(row) for row in some_rows(5)]


def test_a_broken_gguf_file_leaves_no_directory(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))

    with pytest.raises(ModelError):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "models" / "bad")
    with pytest.raises(ModelNotFound):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "models" / "bad")

    assert list((tmp_path / "models").iterdir()) == []
