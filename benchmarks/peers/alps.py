"""ALPS's head scorer as its repository has it (VoiceBeer/ALPS, alps.py at 70bce03), port in our words.

Kept: two whole models are loaded in bf16 although only q, k and v are read; k and v are cut at the query head's number, which
runs past their end in models with grouped queries; one softmax, one copy to the host and one general Wasserstein distance
for every head. Left out: its plots and text files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor
from transformers import AutoConfig, AutoModel

Vector = npt.NDArray[np.float32]
HeadWeights = Callable[[Any, int, int], dict[str, Tensor]]


def load_models(base: Path, task: Path, device: torch.device) -> tuple[Any, Any]:
    """Both models, whole, in bf16; `AutoModel`: without their heads."""
    load: Any = AutoModel
    base_model, task_model = (
        load.from_pretrained(os.fspath(folder), dtype=torch.bfloat16, local_files_only=True).to(device)
        for folder in (base, task)
    )
    return base_model, task_model


def head_weights(model: Any, layers: int, heads: int, share: int = 1) -> dict[str, Tensor]:
    """Concatenated q, k and v of every head, by the head's name.

    Args: share: query heads whose k and v are one group's; the code knows nothing of them.
    """
    found: dict[str, Tensor] = {}
    for layer in range(layers):
        attention = model.layers[layer].self_attn
        q, k, v = attention.q_proj.weight.data, attention.k_proj.weight.data, attention.v_proj.weight.data
        width = q.shape[0] // heads
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            group = slice(head // share * width, (head // share + 1) * width)
            parts = [q[own].flatten(), k[group].flatten(), v[group].flatten()]
            found[f"layer_{layer}_head_{head}"] = torch.cat(parts)
    return found


def head_weights_by_group(model: Any, layers: int, heads: int) -> dict[str, Tensor]:
    """The same with the k and v of each head's own group, so that every head has all three: what the code was meant to do."""
    attention = model.layers[0].self_attn
    return head_weights(model, layers, heads, attention.q_proj.weight.shape[0] // attention.k_proj.weight.shape[0])


def distribution(weights: Tensor) -> Vector:
    """Softmax over all weights of a head, on the host."""
    found: Vector = torch.softmax(weights.flatten().float(), dim=0).cpu().numpy()
    return found


def distance(one: Vector, other: Vector) -> float:
    """Wasserstein distance over index positions scaled to [0, 1]."""
    support = np.linspace(0, 1, len(one))
    return float(wasserstein_distance(support, support, one, other))


def score(base_model: Any, task_model: Any, config: Any, weights: HeadWeights = head_weights) -> dict[str, float]:
    """The distance of every head."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    before, after = weights(base_model, layers, heads), weights(task_model, layers, heads)
    return {name: distance(distribution(before[name]), distribution(after[name])) for name in before if name in after}


def analyse(base: Path, task: Path, device: torch.device) -> dict[str, float]:
    """Load both and score every head: what its command line does."""
    config = AutoConfig.from_pretrained(os.fspath(base), local_files_only=True)
    AutoConfig.from_pretrained(os.fspath(task), local_files_only=True)
    base_model, task_model = load_models(base, task, device)
    return score(base_model, task_model, config)
