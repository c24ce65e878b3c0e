"""How fast a device multiplies matrices of a model's width, in 0.2 s: what `p2d.estimate` turns into seconds."""

from __future__ import annotations

import time

import torch

from p2d.estimate import Speed
from p2d.model_info import ModelInfo


def calibrate(info: ModelInfo, *, device: str, dtype: str) -> Speed:
    """Time one matrix product of the model's own width."""
    where, kind = torch.device(device), torch.bfloat16 if dtype == "bf16" else torch.float32
    x = torch.randn(512, info.hidden_size, device=where).to(kind)
    weight = torch.randn(info.intermediate_size, info.hidden_size, device=where).to(kind)
    times: list[float] = []
    ends = time.perf_counter() + 0.2
    while len(times) < 5 or (time.perf_counter() < ends and len(times) < 1000):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        times.append(time.perf_counter() - started)
    typical = sorted(times)[len(times) // 2]
    return Speed(2 * x.shape[0] * weight.numel() / typical)
