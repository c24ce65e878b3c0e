"""How long each step will take, said before it runs: operations counted from tokens, over a speed measured in 0.2 s.

An estimate, not a promise: other work on the machine is not foreseen. The arithmetic needs no torch; `calibrate` does.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from p2d.config import JobConfig, Projection, proxy_guide_rows, top_count
from p2d.model_info import ModelInfo
from p2d.plans import RowCounts

EFFICIENCY = 0.55
"""Share of the calibrated speed that a whole pass reaches; measured on SmolLM2-135M, two CPU cores, bf16."""

DECODE_EFFICIENCY = 0.15
"""The same for generation, a few dozen rows at a time."""

ICL_SHARE = 1.6
"""What attention over long contexts, the probe and the queries without demos add to `icl`. Measured as above."""

LOAD_S = 8.0
"""Starting Python, torch and transformers once, in a fresh process. Measured on two CPU cores."""

LOAD_BYTES_PER_S = 5e8
"""Reading weights. A guess for an ordinary disk."""

TRIALS = 4.0
"""Learning-rate search in trials, held-out looks counted as part of one. See `p2d.learning_rates`."""

BASELINE_STEPS = 4
"""Real steps of each of the two baselines that evaluation times."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What the device multiplies, in floating point operations per second, at the width of the model."""

    flop_per_s: float


def calibrate(info: ModelInfo, *, device: str, dtype: str) -> Speed:
    """Time one matrix product of the model's own width."""
    import torch

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


def estimate_seconds(
    info: ModelInfo, config: JobConfig, speed: Speed, *, train: RowCounts, guide: RowCounts, evaluation: RowCounts
) -> dict[str, float]:
    """Seconds of every step of an `adapt` job, validation aside; a resolved config is needed."""
    work = _Work(info, config)
    share = top_count(_ratio(config), train.rows) / train.rows
    proxy = min(1.0, config.heads.proxy_rows / train.rows)
    one_epoch = work.train(train) * share
    judging = proxy_guide_rows(config.heads.proxy_rows, guide.rows) / max(1, guide.rows)
    # Held-out loss before and after each half; attribution needs gradients there, and mostly halfway as well.
    looks = 5 * work.backward(guide) if config.heads.scorer == "attribution" else 3 * work.forward(guide)
    flops = {
        "heads": work.train(train) * proxy + judging * looks,
        "respond": _respond(work, config, train, guide),
        "train": one_epoch * (config.training.epochs + _search_epochs(config, share * train.rows)),
        "evaluate": 2 * work.forward(evaluation) + 2 * _baseline_steps(work, config, train),
    }
    if config.heads.scorer == "random":
        flops["heads"] = 0.0
    seconds = {step: count / (speed.flop_per_s * EFFICIENCY) for step, count in flops.items()}
    answer = evaluation.answer_tokens / max(1, evaluation.rows) * min(evaluation.rows, 200)
    # Most rows write until the limit, a little over the longest reference: twice the mean.
    seconds["evaluate"] += 2 * 2 * answer * work.forward_flop / (speed.flop_per_s * DECODE_EFFICIENCY)
    seconds["heads"] += LOAD_S + info.parameters * 2 / LOAD_BYTES_PER_S
    seconds |= {"select": 0.5 + train.rows * 2e-5, "package": 0.5}
    return {step: round(s, 1) for step, s in seconds.items()}


def _search_epochs(config: JobConfig, rows: float) -> float:
    """Passes over the selected rows that the learning-rate search amounts to."""
    if config.training.learning_rate != "auto":
        return 0.0
    steps = max(1.0, rows / config.training.batch_size * config.training.epochs)
    return TRIALS * max(4.0, min(16.0, steps / 8)) / steps * config.training.epochs


def _ratio(config: JobConfig) -> float:
    assert config.data.ratio != "auto", "resolve the config first"
    return config.data.ratio


class _Work:
    """Floating point operations of passes over rows."""

    def __init__(self, info: ModelInfo, config: JobConfig) -> None:
        e, d = info.head_dim, info.hidden_size
        weights: dict[Projection, int] = {"q": info.n_heads * e * d, "o": info.n_heads * e * d}
        weights |= {"k": info.n_kv_groups * e * d, "v": info.n_kv_groups * e * d}
        assert config.training.slices != "auto", "resolve the config first"
        body = info.n_layers * (sum(weights.values()) + 3 * d * info.intermediate_size)
        self.sliced = 2 * info.n_layers * sum(weights[name] for name in config.training.slices)
        self.body = 2 * body
        self.head = 2 * d * info.vocab_size
        self.forward_flop = self.body + self.head
        """Of one generated token."""

    def forward(self, rows: RowCounts) -> float:
        return self.body * rows.tokens + self.head * rows.answer_tokens

    def backward(self, rows: RowCounts) -> float:
        """Forward, backward to activations, and the gradient of the trained projections."""
        return 2 * self.forward(rows) + self.sliced * rows.tokens

    train = backward


def _respond(work: _Work, config: JobConfig, train: RowCounts, guide: RowCounts) -> float:
    if config.data.scorer == "alignment":
        return work.backward(train) + work.backward(guide) + work.sliced * train.tokens
    if config.data.scorer == "icl":
        queries = config.data.n_queries / config.data.n_demos
        return ICL_SHARE * (work.body * train.tokens * (1 + queries) + work.head * train.answer_tokens * queries)
    return 0.0


def _baseline_steps(work: _Work, config: JobConfig, train: RowCounts) -> float:
    batch = config.training.batch_size / train.rows
    return 3 * work.forward(train) * min(1.0, batch) * BASELINE_STEPS
