"""Load a base model: safetensors only, no remote code, every weight accounted for; convert GGUF files once.

What a directory *is* (name, digest, sizes, family) is `p2d.model_info`, without torch. Training never happens here.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from p2d.arch import ARCHS
from p2d.arch.spec import ArchSpec, unit_view
from p2d.attention import use_attention
from p2d.config import Precision, Projection
from p2d.device import pick_device, pick_dtype
from p2d.errors import ModelError, ModelNotFound
from p2d.files import sha256_of
from p2d.memory_guard import memory_guard
from p2d.model_files import opening
from p2d.model_info import ModelInfo, is_weight, read_model_info
from p2d.registry import load
from p2d.rendering import Renderer, load_renderer
from p2d.wording import counted

CONVERSION_FILE = "p2d-conversion.json"
"""Says where a converted model came from: name and sha256 of the GGUF file."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base model: frozen, in evaluation mode, with the spec that finds its heads."""

    info: ModelInfo
    spec: ArchSpec
    module: PreTrainedModel
    renderer: Renderer
    device: torch.device
    dtype: torch.dtype
    """Type of all weights and activations."""
    load_s: float
    """Seconds that loading took."""

    def projection(self, layer: int, name: Projection) -> nn.Module:
        """The module that holds one projection: a Linear or Conv1D, shared by q, k and v in some families."""
        return self.module.get_submodule(self.spec.path(layer, name))

    def units(self, layer: int, name: Projection) -> Tensor:
        """The weight of one projection as a view [unit, head width, model width], see `p2d.arch.spec.unit_view`."""
        return unit_view(self.spec, self.info, name, self.weight(layer, name).detach())

    def weight(self, layer: int, name: Projection) -> Tensor:
        """The weight of the module that holds one projection, as it is stored."""
        weight = self.projection(layer, name).weight
        assert isinstance(weight, Tensor)
        return weight

    def hidden(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None, **kwargs: object) -> Tensor:
        """Last hidden states h_BTD, after the final norm, without the head. No mask = plain causal attention."""
        backbone = self.module.get_submodule(self.spec.backbone)
        output = backbone(input_ids=input_ids_BT, attention_mask=attention_mask_BT, use_cache=False, **kwargs)
        h_BTD: Tensor = output.last_hidden_state
        return h_BTD

    def logits(self, h_ND: Tensor) -> Tensor:
        """Logits [N, V] at chosen positions only."""
        logits_NV: Tensor = self.module.get_submodule(self.spec.lm_head)(h_ND)
        return logits_NV


def load_base_model(directory: Path, *, precision: Precision = "auto", device: str = "auto") -> BaseModel:
    """Load the model of a directory, frozen.

    Raises:  ModelNotFound, ModelUnsupported, ModelError (`model.invalid`) if a weight is missing, misshapen or unreadable:
             transformers alone would fill missing weights with random numbers. Also if one is left over, such as a bias
             that config.json does not ask for: transformers alone would compute another function than the model's. Also if
             transformers finds a value in config.json that it cannot use, in loading or in a pass over two tokens.
             OutOfMemory if the model does not fit.
    """
    started = time.perf_counter()
    info = read_model_info(directory)
    spec: ArchSpec = load(ARCHS, info.model_type, what="model family", pointer="/base_model")
    where = pick_device(device)
    dtype = pick_dtype(precision, where)
    renderer = load_renderer(directory)
    failed = f"The model {info.name!r} cannot be loaded"
    module = _load_weights(
        directory, failed, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, use_safetensors=True
    )
    with memory_guard(f"loading {info.name!r}"):
        module.to(where)  # type: ignore[arg-type]
        _check_finite(info, module)
    use_attention(module)
    _check_computes(info, module, where)
    return BaseModel(info, spec, module, renderer, where, dtype, load_s=time.perf_counter() - started)


def _check_computes(info: ModelInfo, module: PreTrainedModel, device: torch.device) -> None:
    """Raise ModelError unless two tokens give finite logits: some values of config.json are only used by a pass."""
    ids_BT = torch.zeros((1, 2), dtype=torch.long, device=device)
    failed = f"The model {info.name!r} cannot compute, probably for a value in config.json"
    with opening(f"trying {info.name!r}", failed=failed, model=info.name), torch.no_grad():
        finite = bool(torch.isfinite(module(input_ids=ids_BT, use_cache=False).logits).all())
    if not finite:
        raise ModelError(f"{failed}: its logits are not finite.", model=info.name)


def _check_finite(info: ModelInfo, module: PreTrainedModel) -> None:
    """Raise ModelError if a weight is not a number: else the first loss that is none would be blamed on data or rate."""
    bad = [name for name, weight in module.named_parameters() if not torch.isfinite(weight.sum(dtype=torch.float32))]
    if bad:
        text = f"Weights of {info.name!r} are not finite: {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}."
        raise ModelError(text, model=info.name)


def convert_gguf(gguf: Path, out: Path) -> ModelInfo:
    """Turn a GGUF file into a safetensors model directory with tokenizer, once; an existing directory is left alone.

    Weights are dequantised and kept as bf16: quantisation to 4 bits has lost far more than bf16 rounds away. The
    directory appears under its name only when it is complete.
    """
    if out.exists():
        return read_model_info(out)
    if not gguf.is_file():
        raise ModelNotFound(f"There is no file {gguf.name!r} to convert.")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_converted(gguf, unfinished)
        read_model_info(unfinished)  # refuses unsupported families before the directory gets its name
        for file in (unfinished, *unfinished.iterdir()):  # mkdtemp and safetensors write for the owner alone
            file.chmod(0o755 if file.is_dir() else 0o644)
        (unfinished / "p2d-model.json").unlink(missing_ok=True)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return read_model_info(out)


def _write_converted(gguf: Path, out: Path) -> None:
    folder, file = os.fspath(gguf.parent), gguf.name
    failed = f"{gguf.name!r} cannot be converted"
    with opening(f"converting {gguf.name!r}", failed=failed, model=gguf.name):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
    plain = GgufConfig(dequantize=True)
    module = _load_weights(gguf.parent, failed, gguf_file=file, dtype=torch.bfloat16, quantization_config=plain)
    module.save_pretrained(out)
    # The template goes into tokenizer_config.json, so that the model's digest covers it.
    tokenizer.save_pretrained(out, save_jinja_files=False)
    facts = {"source": gguf.name, "source_sha256": sha256_of(gguf), "dtype": "bfloat16"}
    (out / CONVERSION_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _load_weights(directory: Path, failed: str, **kwargs: Any) -> PreTrainedModel:
    """The frozen model in evaluation mode. Raises ModelError if a weight is missing, misshapen or left over, with its name.

    Args:    failed: how an error begins that names another cause.
    """
    logging: Any = transformers_logging
    logging.set_verbosity_error()  # its load report is checked below, its bars would fill the worker's log
    logging.disable_progress_bar()
    loader: Any = AutoModelForCausalLM
    # Misshapen weights are let through here, to be refused by name below: its own error points to the muted report.
    with opening(f"loading {kwargs.get('gguf_file', directory.name)!r}", failed=failed, model=directory.name):
        module, report = loader.from_pretrained(
            os.fspath(directory),
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    assert isinstance(module, PreTrainedModel)
    if wrong := _wrong_weights(report):
        more = f" (and {counted(len(wrong) - 1, 'more weight', 'more weights')})" if len(wrong) > 1 else ""
        raise ModelError(
            f"The weights of {directory.name!r} do not fit its config.json: {wrong[0]}{more}.", model=directory.name
        )
    module.requires_grad_(False)
    module.train(False)
    return module


def _wrong_weights(report: Mapping[str, Any]) -> list[str]:
    """What transformers' account of a load says against it, weight by weight; buffers of older files are no weights."""
    misshapen = [
        f"{name} has the shape {tuple(found)}, expected {tuple(expected)}"
        for name, found, expected in sorted(report["mismatched_keys"])
    ]
    missing = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    left_over = [
        f"{name} belongs to no part of the model" for name in sorted(report["unexpected_keys"]) if is_weight(name)
    ]
    return [*misshapen, *missing, *left_over, *map(str, report["error_msgs"])]
