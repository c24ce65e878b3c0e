"""Laws of describing a model: from headers alone, by name alone, and every way to be broken has a sentence."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from p2d.errors import ModelError, ModelNotFound, ModelUnsupported
from p2d.model_info import DIGEST_CACHE, find_model, list_models, model_digest, read_model_info

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}


def safetensors(*shapes: list[int], dtype: str = "F32") -> bytes:
    header, end = {}, 0
    for number, shape in enumerate(shapes):
        size = 4
        for length in shape:
            size *= length
        header[f"w{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(end)


def write_model(directory: Path, **config: Any) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(safetensors([2, 3], [4]))
    return directory


def test_a_model_is_described_without_reading_weights(tmp_path: Path) -> None:
    info = read_model_info(write_model(tmp_path / "tiny"))

    assert (info.name, info.n_layers, info.n_heads, info.n_kv_groups, info.head_dim) == ("tiny", 2, 4, 2, 4)
    assert (info.context_length, info.parameters, info.dtype) == (128, 10, "fp32")


def test_a_model_without_groups_has_one_per_head(tmp_path: Path) -> None:
    assert read_model_info(write_model(tmp_path / "m", num_key_value_heads=None, head_dim=8)).n_kv_groups == 4


def test_the_digest_knows_contents_and_names_but_not_times(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other")
    assert model_digest(one) == model_digest(other)
    (other / "README.md").write_text("not part of it")
    assert model_digest(one) == model_digest(other)

    (other / "tokenizer.json").write_text('{"x": 1}')

    assert model_digest(one) != model_digest(other)


def test_the_digest_is_kept_and_a_broken_note_is_made_again(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "m")
    digest = model_digest(directory)
    note = json.loads((directory / DIGEST_CACHE).read_text())
    (directory / DIGEST_CACHE).write_text(json.dumps({**note, "digest": "kept"}))
    assert model_digest(directory) == "kept"

    (directory / DIGEST_CACHE).write_text("{")

    assert model_digest(directory) == digest


def index(directory: Path, name: str) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))


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
    "an index with a path": (lambda d: index(d, "../other/model.safetensors"), ModelError, "outside"),
    "an index with a missing file": (lambda d: index(d, "model-2.safetensors"), ModelError, "is missing"),
    "quantised weights": (
        lambda d: (d / "model.safetensors").write_bytes(safetensors([4], dtype="I8")), ModelUnsupported, "I8"),
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
        ({"quantization_config": {"bits": 4}}, ModelUnsupported),
        ({"num_attention_heads": 0}, ModelError),
        ({"num_attention_heads": "4"}, ModelError),
        ({"hidden_size": True}, ModelError),
        ({"num_key_value_heads": 3}, ModelError),
        ({"max_position_embeddings": None}, ModelError),
    ],
)
def test_a_config_is_refused_with(tmp_path: Path, config: dict[str, Any], error: type[ModelError]) -> None:
    with pytest.raises(error):
        read_model_info(write_model(tmp_path / "m", **config))


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
