"""An independent reference for attention masses: eager attention, one forward pass for every query, nothing shared.

Slow and plain on purpose: it shares no code with the engine's probe.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from p2d.models import BaseModel
from p2d.probe import Span
from p2d.responses.icl import Scene


@lru_cache(maxsize=1)
def _eager_model(directory: Path, device: torch.device) -> Any:
    load: Any = AutoModelForCausalLM
    model = load.from_pretrained(
        os.fspath(directory), dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model.to(device).eval()


@torch.no_grad()
def demo_masses(directory: Path, base: BaseModel, scene: Scene) -> npt.NDArray[np.float64]:
    """Mean attention of the queries' answer tokens to each demonstration, per demonstration token: [demo, head], fp32."""
    model = _eager_model(directory, base.device)
    total = np.zeros((len(scene.demos), base.info.n_layers * base.info.n_heads))
    for query in scene.queries:
        ids = [*scene.trunk_ids, *query.prompt_ids, *query.answer_ids]
        answer = slice(len(ids) - len(query.answer_ids), len(ids))
        total += _one_query(model, torch.tensor([ids], device=base.device), answer, scene.demos)
    return total / len(scene.queries)


def _one_query(model: Any, ids_BT: Tensor, answer: slice, spans: Sequence[Span]) -> npt.NDArray[np.float64]:
    by_layer: list[Tensor] = []

    def read(module: Any, args: Any, output: Any) -> None:
        mean_HT = output[1][0, :, answer].mean(dim=1)
        by_layer.append(torch.stack([mean_HT[:, start:stop].sum(1) / (stop - start) for start, stop in spans]))

    hooks = [layer.self_attn.register_forward_hook(read) for layer in model.model.layers]
    try:
        model.model(input_ids=ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    mass_SN: npt.NDArray[np.float64] = torch.cat(by_layer, dim=1).double().cpu().numpy()
    return mass_SN
