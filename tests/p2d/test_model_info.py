"""Laws of describing a model: from headers alone, by name alone, and every way to be broken has a sentence."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from p2d.arch import ARCHS
from p2d.arch.spec import ArchSpec
from p2d.errors import ModelError, ModelNotFound, ModelUnsupported
from p2d.model_info import (
    find_model,
    list_models,
    read_model_info,
    read_outline,
    shape_of,
    weight_files,
)
from p2d.registry import load
from tests.factories import tiny_model_dir

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


SHAPES: dict[str, list[int]] = {"model.embed_tokens.weight": [64, 16], "model.norm.weight": [16]} | {
    f"model.layers.{layer}.{name}.weight": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": [16, 16],
        "self_attn.k_proj": [8, 16],
        "self_attn.v_proj": [8, 16],
        "self_attn.o_proj": [16, 16],
        "mlp.gate_proj": [32, 16],
        "mlp.up_proj": [32, 16],
        "mlp.down_proj": [16, 32],
    }.items()
}
"""Weights that a model of CONFIG has."""

PARAMETERS = sum(math.prod(shape) for shape in SHAPES.values())


def safetensors(shapes: dict[str, list[int]], dtype: str = "F32") -> bytes:
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(end)


def write_model(directory: Path, **config: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(safetensors(SHAPES))
    return directory


def test_a_model_is_described_without_reading_weights(tmp_path: Path) -> None:
    info = read_model_info(write_model(tmp_path / "tiny"))

    assert (info.name, info.n_layers, info.n_heads, info.n_kv_groups, info.head_dim) == ("tiny", 2, 4, 2, 4)
    assert (info.context_length, info.parameters, info.dtype) == (128, PARAMETERS, "fp32")


def test_a_model_without_groups_has_one_per_head() -> None:
    assert shape_of({**CONFIG, "num_key_value_heads": None, "head_dim": 8}, name="m").n_kv_groups == 4


PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, int | None]]] = {
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
         "num_hidden_layers": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": 4096,
         "vocab_size": 32000},
        {"n_kv_groups": 8, "head_dim": 128, "window": 4096, "n_windowed_layers": 32}),
    "Mistral-Nemo": (
        {"model_type": "mistral", "head_dim": 128, "hidden_size": 5120, "intermediate_size": 14336,
         "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "sliding_window": None,
         "max_position_embeddings": 1024000, "vocab_size": 131072},
        {"head_dim": 128, "window": None, "n_windowed_layers": 0}),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
         "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
         "sliding_window": 32768, "use_sliding_window": False, "vocab_size": 151936},
        {"n_heads": 14, "n_kv_groups": 2, "head_dim": 64, "window": None, "n_windowed_layers": 0}),
    "Qwen2 with late windows": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
         "max_window_layers": 21, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
         "sliding_window": 4096, "use_sliding_window": True, "vocab_size": 151936},
        {"window": 4096, "n_windowed_layers": 3}),
    "Qwen3-0.6B": (
        {"model_type": "qwen3", "head_dim": 128, "hidden_size": 1024, "intermediate_size": 3072,
         "max_position_embeddings": 40960, "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28,
         "num_key_value_heads": 8, "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936},
        {"head_dim": 128, "n_kv_groups": 8, "mlp_matrices": 3, "n_windowed_layers": 0}),
    "gemma-3-1b": (
        {"model_type": "gemma3_text", "head_dim": 256, "hidden_size": 1152, "intermediate_size": 6912,
         "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
         "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144},
        {"head_dim": 256, "n_kv_groups": 1, "window": 512, "n_windowed_layers": 22}),
    "Phi-3-mini-4k": (
        {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "sliding_window": 2047,
         "vocab_size": 32064},
        {"n_kv_groups": 32, "head_dim": 96, "mlp_matrices": 3, "window": 2047, "n_windowed_layers": 32}),
    "gpt2": (
        {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
        {"n_layers": 12, "n_heads": 12, "n_kv_groups": 12, "head_dim": 64, "hidden_size": 768,
         "intermediate_size": 3072, "context_length": 1024, "mlp_matrices": 2, "n_windowed_layers": 0}),
    "pythia-160m": (
        {"model_type": "gpt_neox", "hidden_size": 768, "intermediate_size": 3072, "max_position_embeddings": 2048,
         "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 50304},
        {"n_kv_groups": 12, "head_dim": 64, "mlp_matrices": 2, "n_windowed_layers": 0}),
    "OLMo-2-7B": (
        {"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
         "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 100352},
        {"n_kv_groups": 32, "head_dim": 128, "mlp_matrices": 3, "n_windowed_layers": 0}),
    "SmolLM3-3B": (
        {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536,
         "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "sliding_window": None,
         "use_sliding_window": False, "vocab_size": 128256},
        {"n_kv_groups": 4, "head_dim": 128, "n_windowed_layers": 0}),
    "SmolLM3 with windows": (
        {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536,
         "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "sliding_window": 1024,
         "use_sliding_window": True, "vocab_size": 128256},
        {"window": 1024, "n_windowed_layers": 9}),
}  # fmt: skip
"""Sizes as published in the config.json of each family, and what must be read from them."""


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_family_is_described_by_its_own_names_as_transformers_reads_them(model: str) -> None:
    config, expected = PUBLISHED[model]

    info = shape_of(config, name=model)

    assert {name: getattr(info, name) for name in expected} == expected
    theirs: Any = AutoConfig.for_model(**config)
    assert (info.n_layers, info.n_heads) == (theirs.num_hidden_layers, theirs.num_attention_heads)
    assert (info.hidden_size, info.context_length) == (theirs.hidden_size, theirs.max_position_embeddings)
    if hasattr(theirs, "layer_types"):
        assert info.n_windowed_layers == theirs.layer_types.count("sliding_attention")


def test_a_config_without_a_window_means_the_familys_own() -> None:
    config = {key: value for key, value in PUBLISHED["Mistral-7B-v0.1"][0].items() if key != "sliding_window"}

    assert shape_of(config, name="m").window == AutoConfig.for_model(**config).sliding_window == 4096


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 32}, 32),
        ({"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 32}}, 32),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 32}}},
            32,
        ),
        ({"rope_scaling": {"type": "longrope"}}, 128),
        ({"rope_scaling": {"type": "su"}, "model_type": "phi3", "max_position_embeddings": 131072}, 4096),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}, "original_max_position_embeddings": 32}, 128),
        ({"rope_scaling": {"type": "llama3", "original_max_position_embeddings": 32}}, 128),
        ({"rope_scaling": None, "original_max_position_embeddings": 32}, 128),
    ],
)
def test_the_context_ends_where_rotary_factors_would_change(config: dict[str, Any], expected: int) -> None:
    assert shape_of({**CONFIG, **config}, name="m").context_length == expected


def test_causal_masks_in_an_older_file_are_no_parameters(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m")
    (directory / "model.safetensors").write_bytes(safetensors(SHAPES | {"h.0.attn.bias": [1, 1, 64, 64]}))

    assert read_model_info(directory).parameters == PARAMETERS


@pytest.mark.parametrize("family", sorted(ARCHS))
def test_a_matrix_that_is_missing_or_misshapen_is_named_with_its_shapes(tmp_path: Path, family: str) -> None:
    directory = tiny_model_dir(tmp_path / family, family=family)
    whole = load_file(directory / "model.safetensors")
    matrices = {name: tuple(tensor.shape) for name, tensor in whole.items() if tensor.ndim == 2}
    spec: ArchSpec = load(ARCHS, family, what="", pointer="")
    of_spec = dict(spec.matrices(read_model_info(directory)))
    if not AutoConfig.from_pretrained(directory).tie_word_embeddings:
        of_spec[spec.head_names()[0]] = of_spec[f"{spec.embedding}.weight"]
    assert of_spec == matrices

    for name, shape in [(name, shape) for name, shape in matrices.items() if ".0." not in name and ".2." not in name]:
        turned = whole[name].flatten().unflatten(0, (2, -1))
        for changed, said in (
            (
                {each: tensor for each, tensor in whole.items() if each != name},
                f"{name} is missing, expected with the shape {shape}",
            ),
            (whole | {name: turned}, f"{name} has the shape {tuple(turned.shape)}, expected {shape}"),
        ):
            save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(ModelError, match=re.escape(said)):
                read_model_info(directory)


@pytest.mark.parametrize("family", sorted(ARCHS))
def test_a_head_of_its_own_is_looked_for_where_the_family_unties_it(tmp_path: Path, family: str) -> None:
    directory = tiny_model_dir(tmp_path / family, family=family)
    spec: ArchSpec = load(ARCHS, family, what="", pointer="")
    config, tensors = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    head = spec.head_names()[0]
    tensors.pop(head, None)
    shape = tuple(tensors[f"{spec.embedding}.weight"].shape)
    assert spec.config.tied == AutoConfig.for_model(family).tie_word_embeddings

    def check(tied: bool | None, **more: torch.Tensor) -> None:
        told = {"tie_word_embeddings": tied} if tied is not None else {}
        silent = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
        (directory / "config.json").write_text(json.dumps(silent | told))
        save_file(tensors | more, directory / "model.safetensors", metadata={"format": "pt"})
        read_model_info(directory)

    check(True)
    check(False, **{head: torch.zeros(shape)})
    for tied in [False] if spec.config.tied else [False, None]:
        with pytest.raises(ModelError, match=rf"{head} is missing, expected with the shape \({shape[0]}, {shape[1]}\)"):
            check(tied)
    if spec.config.tied:
        check(None)
    for tied in (True, False):
        with pytest.raises(ModelError, match=rf"{head} has the shape \(7, {shape[1]}\), expected"):
            check(tied, **{head: torch.zeros(7, shape[1])})


def test_the_weight_files_are_those_that_transformers_reads(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m")
    whole, shard = directory / "model.safetensors", directory / "model-00001-of-00001.safetensors"
    shard.write_bytes(safetensors({"model.norm.weight": [16]}))
    index(directory, shard.name)
    assert weight_files(directory) == [whole]
    assert read_model_info(directory).parameters == PARAMETERS

    whole.replace(shard)
    assert weight_files(directory) == [shard]
    assert read_model_info(directory).parameters == PARAMETERS

    (directory / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=f"neither model.safetensors nor .* without which {shard.name} is not read"):
        read_model_info(directory)


def test_one_weight_of_codes_among_numbers_is_refused_by_name(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "m")
    tensors, name = load_file(directory / "model.safetensors"), "model.layers.1.self_attn.q_proj.weight"
    for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn):
        save_file(tensors | {name: tensors[name].to(dtype)}, directory / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelUnsupported, match=name):
            read_model_info(directory)

    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        save_file(tensors | {name: tensors[name].to(dtype)}, directory / "model.safetensors", metadata={"format": "pt"})
        assert read_model_info(directory).dtype == "fp32"


def test_other_names_that_files_have_for_the_same_weights_are_known(tmp_path: Path) -> None:
    for family, old, new in (
        ("gpt2", "transformer.", ""),
        ("llama", "model.embed_tokens.", "lm_head."),
    ):  # the second: tied
        directory = tiny_model_dir(tmp_path / family, family=family)
        told = read_model_info(directory).parameters
        renamed = {
            name.replace(old, new): tensor for name, tensor in load_file(directory / "model.safetensors").items()
        }
        save_file(renamed, directory / "model.safetensors", metadata={"format": "pt"})

        assert read_model_info(directory).parameters == told


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_outline_tells_the_same_as_the_whole_model(tmp_path: Path, family: str) -> None:
    whole, outline = tiny_model_dir(tmp_path / "whole", family=family), tmp_path / "outline" / "m"
    outline.mkdir(parents=True)
    for path in whole.iterdir():
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            header = content[: 8 + struct.unpack("<Q", content[:8])[0]]
            content = header + bytes(len(content) - len(header))
        (outline / path.name).write_bytes(content)

    told = read_outline(outline, "d" * 64)

    assert told == replace(read_model_info(whole), name="m", digest="d" * 64)
    with (outline / "model.safetensors").open("r+b") as weights:
        weights.truncate(100)
    with pytest.raises(ModelError):
        read_outline(outline, "d" * 64)


def index(directory: Path, name: str) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))


def only_index(directory: Path, name: str) -> None:
    index(directory, name)
    (directory / "model.safetensors").unlink()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


BROKEN: dict[str, tuple[Callable[[Path], Any], type[ModelError], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), ModelError, "config.json is missing"),
    "a config that is no JSON": (lambda d: (d / "config.json").write_text("{"), ModelError, "not JSON"),
    "a config that is a list": (lambda d: (d / "config.json").write_text("[]"), ModelError, "not an object"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ModelError, "tokenizer.json"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), ModelError, "no safetensors"),
    "weights as pickle": (
        lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), ModelError, "no safetensors"),
    "weights cut off": (lambda d: cut(d / "model.safetensors"), ModelError, "cut off"),
    "an empty weight file": (lambda d: (d / "model.safetensors").write_bytes(b""), ModelError, "not a safetensors"),
    "a header larger than the file": (
        lambda d: (d / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}"), ModelError, "not a safetensors"),
    "a header that is no JSON": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{["), ModelError, "header"),
    "an index with a path": (lambda d: only_index(d, "../other/model.safetensors"), ModelError, "outside"),
    "an index with a missing file": (lambda d: only_index(d, "model-2.safetensors"), ModelError, "is missing"),
    "quantised weights": (
        lambda d: (d / "model.safetensors").write_bytes(safetensors(SHAPES, dtype="I8")), ModelUnsupported, "I8"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_model_is_refused_for(tmp_path: Path, what: str) -> None:
    spoil, error, text = BROKEN[what]
    directory = write_model(tmp_path / "m")
    spoil(directory)

    with pytest.raises(error, match=text):
        read_model_info(directory)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"model_type": "mamba"}, ModelUnsupported),
        ({"model_type": None}, ModelUnsupported),
        ({"model_type": ["llama"]}, ModelUnsupported),
        ({"model_type": "gemma3_text", "final_logit_softcapping": 30.0}, ModelUnsupported),
        ({"model_type": "mistral", "sliding_window": 0}, ModelError),
        ({"quantization_config": {"bits": 4}}, ModelUnsupported),
        ({"num_attention_heads": 0}, ModelError),
        ({"num_attention_heads": "4"}, ModelError),
        ({"hidden_size": True}, ModelError),
        ({"num_key_value_heads": 3}, ModelError),
        ({"max_position_embeddings": None}, ModelError),
        ({"tie_word_embeddings": "yes"}, ModelError),
        ({"layer_types": ["x"]}, ModelError),
        ({"layer_types": "full_attention"}, ModelError),
    ],
)
def test_a_config_is_refused_with(tmp_path: Path, config: dict[str, Any], error: type[ModelError]) -> None:
    with pytest.raises(error):
        read_model_info(write_model(tmp_path / "m", **config))


def test_the_hint_for_a_quantised_model_does_not_speak_of_a_list_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="take the model from which it was made") as caught:
        read_model_info(write_model(tmp_path / "m", quantization_config={"bits": 4}))

    assert "plain weights" in caught.value.hint
    assert "in the message" not in caught.value.hint


@pytest.mark.parametrize("family", ["falcon", "mamba", "gemma3"])
def test_another_family_is_refused_by_name_with_those_there_are(tmp_path: Path, family: str) -> None:
    wrapped = {"text_config": {"model_type": "gemma3_text"}} if family == "gemma3" else {}

    with pytest.raises(ModelUnsupported, match=f"'{family}'") as caught:
        read_model_info(write_model(tmp_path / "m", model_type=family, **wrapped))

    assert all(name in caught.value.text for name in ARCHS)
    assert caught.value.facts["supported"] == sorted(ARCHS)
    assert ("family 'gemma3_text'): install that model alone" in caught.value.text) == bool(wrapped)


@pytest.mark.parametrize("name", ["", ".", "..", "../m", "m/..", "/etc", "m\x00", ".hidden", "M", "x" * 300])
def test_only_an_installed_name_finds_a_model(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "models" / "m")
    (tmp_path / "models" / ".hidden").mkdir()

    with pytest.raises(ModelNotFound):
        find_model(tmp_path / "models", name)


def test_a_near_name_is_suggested(tmp_path: Path) -> None:
    write_model(tmp_path / "smollm2-135m")
    with pytest.raises(ModelNotFound, match="smollm2-135m"):
        find_model(tmp_path, "smollm-135m")


def test_all_models_are_listed_the_broken_ones_with_their_reason(tmp_path: Path) -> None:
    write_model(tmp_path / "b")
    (tmp_path / "a").mkdir()
    (tmp_path / "file").write_text("")

    listed = dict(list_models(tmp_path))

    assert list(listed) == ["a", "b"]
    assert isinstance(listed["a"], ModelError)
    assert listed["b"] == read_model_info(tmp_path / "b")
    assert list_models(tmp_path / "nowhere") == []


def test_a_config_nested_without_end_is_the_files_fault(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "tiny")
    (directory / "config.json").write_text('{"a":' * 100_000)

    with pytest.raises(ModelError, match="not JSON"):
        read_model_info(directory)


def test_a_folder_named_like_weights_is_not_read(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "tiny")
    (directory / "more.safetensors").mkdir()

    assert read_model_info(directory).n_layers > 0
