"""How long each step will take, said before it runs: operations by `p2d.flops`, over a speed measured in 0.2 s.

An estimate, not a promise: other work on the machine is not foreseen. No torch here: `p2d.calibration` measures the speed.
"""

from __future__ import annotations

from dataclasses import dataclass

from p2d.arch.spec import every_head
from p2d.config import (
    FAST_ANSWER_TOKENS,
    LEXICAL,
    RANKING_NOTHING,
    WITHOUT_PROXY,
    JobConfig,
    alignment_layers,
    alignment_projections,
    epochs_of,
    heads_ratio,
    icl_demos,
    look_count,
    most_kept,
    pool_count,
    proxy_count,
    proxy_guide_rows,
    rates_guide,
    samples_first,
    top_count,
)
from p2d.flops import (
    Work,
    alignment,
    forward,
    full_fine_tuning,
    icl_group,
    lora_training,
    slice_training,
    typical_work,
    work_of,
)
from p2d.model_info import ModelInfo
from p2d.pipeline import SHARD_ROWS, shard_count
from p2d.plans import RowCounts

EFFICIENCY = 0.55
"""Share of the calibrated speed that a whole pass reaches; measured on SmolLM2-135M, two CPU cores, bf16."""

DECODE_EFFICIENCY = 0.15
"""The same for generation, a few dozen rows at a time."""

ICL_SHARE = 1.33
"""How much slower `icl` computes than whole rows do, as its passes are many and small; queries without demos included.
Measured as above."""

BARE_PROMPT = 10
"""Tokens of prefix and empty prompt that `information` puts before an answer. A guess."""

LOAD_S = 8.0
"""Starting Python, torch and transformers once, in a fresh process. Measured on two CPU cores."""

LOAD_BYTES_PER_S = 5e8
"""Reading weights. A guess for an ordinary disk."""

COMPARE_ROW_S, COMPARE_TOKEN_S = 5e-5, 8e-7
"""Looking for a better row that a row repeats. Measured on one CPU core, rows of 8 to 1,250 words (docs/LOG.md)."""

MATCH_ROW_S = 1.5e-3
"""Setting prompts and answers beside others, by words. Measured on one busy core: 0.9 to 2.6 ms a row."""

TRIALS = 4.0
"""Learning-rate search in trials, held-out looks counted as part of one. See `p2d.learning_rates`."""

BASELINE_STEPS = 4
"""Real steps of each of the two baselines that evaluation times."""


@dataclass(frozen=True, slots=True)
class Speed:
    """What the device multiplies, in floating point operations per second, at the width of the model."""

    flop_per_s: float


def estimate_seconds(
    info: ModelInfo,
    config: JobConfig,
    speed: Speed,
    *,
    train: RowCounts,
    guide: RowCounts,
    evaluation: RowCounts,
    shard_rows: int = SHARD_ROWS,
) -> dict[str, float]:
    """Seconds of every step of an `adapt` job, validation aside; a resolved config is needed."""
    flops = estimate_flops(info, config, train=train, guide=guide, shard_rows=shard_rows)
    flops["evaluate"] = evaluation_cost(info, config, train=train, evaluation=evaluation).total(config)
    if config.data.scorer == "icl":
        written = _written(info, config, train)
        flops["respond"] = ICL_SHARE * (flops["respond"] - written) + written * EFFICIENCY / DECODE_EFFICIENCY
    seconds = {step: count / (speed.flop_per_s * EFFICIENCY) for step, count in flops.items()}
    seconds["heads"] += LOAD_S + info.parameters * 2 / LOAD_BYTES_PER_S
    compared = 0.0 if config.data.scorer in RANKING_NOTHING else pool_count(config.data, train.rows) / train.rows
    seconds["select"] = (
        0.5 + train.rows * 2e-5 + compared * (train.rows * COMPARE_ROW_S + train.tokens * COMPARE_TOKEN_S)
    )
    if config.data.scorer == LEXICAL:
        seconds["respond"] += train.rows * MATCH_ROW_S
    seconds["package"] = 0.5
    return {step: round(s, 1) for step, s in seconds.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationCost:
    """What each part of an evaluation costs, in operations that run at EFFICIENCY; its progress goes by it."""

    loss: float
    """Of all rows, once."""
    generation: float
    """Of all answers, once."""
    full_step: float
    """One timed step of full fine-tuning."""
    lora_step: float
    control: float
    """Training one control of the job's own size; its loss comes on top."""
    lora: float
    """Training LoRA on all rows; its loss comes on top."""

    def total(self, config: JobConfig) -> float:
        """Of all parts: losses and answers before and after, the baselines, the controls."""
        steps = BASELINE_STEPS * (self.full_step + self.lora_step)
        controls = sum(self.lora if name == "lora" else self.control for name in config.controls)
        return 2 * (self.loss + self.generation) + steps + controls + len(config.controls) * self.loss


def evaluation_cost(info: ModelInfo, config: JobConfig, *, train: RowCounts, evaluation: RowCounts) -> EvaluationCost:
    """The parts of an evaluation; a resolved config is needed."""
    answer = evaluation.answer_tokens / max(1, evaluation.rows) * min(evaluation.rows, 200)
    token = forward(info, Work(tokens=1, pairs=evaluation.longest, logits=1))
    batch = _work(train).times(min(1.0, config.training.batch_size / train.rows))
    share = most_kept(config.data, train.rows) / train.rows
    return EvaluationCost(
        loss=forward(info, _work(evaluation)),
        # Most rows write until the limit, a little over the longest reference: twice the mean.
        generation=2 * answer * token * EFFICIENCY / DECODE_EFFICIENCY,
        full_step=full_fine_tuning(info, batch),
        lora_step=lora_training(info, batch),
        control=_train(info, config, _work(train).times(share), rows=share * train.rows),
        lora=lora_training(info, _work(train).times(epochs_of(config.training) + _trial_epochs(config, train.rows))),
    )


def estimate_flops(
    info: ModelInfo, config: JobConfig, *, train: RowCounts, guide: RowCounts, shard_rows: int = SHARD_ROWS
) -> dict[str, float]:
    """Operations of the steps that multiply matrices and count in AER; rows are taken to be of mean length.

    Args:   shard_rows: most rows of one `respond` shard, each of which passes over the guide.
    """
    every, asked = _work(train), _work(guide)
    slices = config.training.slices
    assert slices != "auto", "resolve the config first"
    heads = every_head(info)
    share = most_kept(config.data, train.rows) / train.rows
    proxy = every.times(min(1.0, proxy_count(config.heads) / train.rows))
    judging = asked.times(proxy_guide_rows(proxy_count(config.heads), guide.rows) / max(1, guide.rows))
    # Held-out loss before and after each half; attribution needs gradients there, and mostly halfway as well.
    looks = (
        slice_training(info, judging.times(5), heads=heads, projections=slices)
        if config.heads.scorer == "attribution"
        else forward(info, judging.times(3))
    )
    proxies = slice_training(info, proxy, heads=heads, projections=slices) + looks
    return {
        "heads": 0.0 if config.heads.scorer in WITHOUT_PROXY else proxies,
        "respond": _respond(info, config, train, guide, shard_count(train.rows, shard_rows)),
        "train": _train(info, config, every.times(share), rows=share * train.rows),
    }


def _train(info: ModelInfo, config: JobConfig, kept: Work, *, rows: float) -> float:
    """All epochs and the search; looks at held-out rows are a part of its trials, see TRIALS."""
    slices = config.training.slices
    assert slices != "auto", "resolve the config first"
    heads = every_head(info)
    # Chosen heads at even distances: the lowest layer has one, as it nearly always has in a random choice.
    chosen = heads[:: max(1, len(heads) // top_count(heads_ratio(config.heads), len(heads)))]
    passes = epochs_of(config.training) + _search_epochs(config, rows)
    return slice_training(info, kept.times(passes), heads=chosen, projections=slices)


def _search_epochs(config: JobConfig, rows: float) -> float:
    """Passes over the selected rows that the learning-rate search amounts to."""
    return _trial_epochs(config, rows) if config.training.learning_rate == "auto" else 0.0


def _trial_epochs(config: JobConfig, rows: float) -> float:
    steps = max(1.0, rows / config.training.batch_size * epochs_of(config.training))
    return TRIALS * max(4.0, min(16.0, steps / 8)) / steps * epochs_of(config.training)


def _work(counts: RowCounts) -> Work:
    return typical_work(rows=counts.rows, tokens=counts.tokens, answer_tokens=counts.answer_tokens)


def _typical(counts: RowCounts) -> tuple[int, int]:
    """(tokens, answer tokens) of a row of mean length."""
    return round(counts.tokens / max(1, counts.rows)), round(counts.answer_tokens / max(1, counts.rows))


def _respond(info: ModelInfo, config: JobConfig, train: RowCounts, guide: RowCounts, shards: int) -> float:
    row, data = _typical(train), config.data
    rows = pool_count(data, train.rows)
    if samples_first(config):
        # As if all were like the guide: a sample is scored, and all rows are trained on. Otherwise fewer are trained on and
        # perhaps all scored, for less or about as much in sum (docs/decisions/0034, 0037).
        rows = min(rows, shards * look_count(rows // shards))
    slices = config.training.slices
    assert slices != "auto", "resolve the config first"
    total = 0.0
    if data.scorer.startswith("alignment"):
        read, first = alignment_projections(slices), alignment_layers(info.n_layers).start
        kinds = [_typical(guide), row]
        if data.mode == "fast":
            kinds = [
                (length - max(0, answer - FAST_ANSWER_TOKENS), min(answer, FAST_ANSWER_TOKENS))
                for length, answer in kinds
            ]
        guided, row = kinds
        rated = rates_guide(data.scorer, guide.rows)
        once = alignment(info, guide=[guided], rows=[], projections=read, from_layer=first, rate_guide=rated)
        total += shards * guide.rows * once
        total += rows * alignment(info, guide=[], rows=[row], projections=read, from_layer=first)
    if data.scorer in ("information", "alignment_information"):
        bare = (min(row[0], row[1] + BARE_PROMPT), row[1])
        total += rows * forward(info, work_of([bare] if "alignment" in data.scorer else [bare, row]))
    if data.scorer == "icl":
        demos = icl_demos(data, rows)
        judged = data.mode == "faithful"
        group = icl_group(info, shown=demos * row[0], queries=[row] * data.n_queries, judged=judged)
        total += rows / demos * group + _written(info, config, train)
    return total


def _written(info: ModelInfo, config: JobConfig, train: RowCounts) -> float:
    """Of the answers that `icl` lets the model write, where the metric wants them."""
    row, data = _typical(train), config.data
    if data.metric not in ("exact_match", "rouge_l"):
        return 0.0
    token = forward(info, Work(tokens=1, pairs=data.n_demos * row[0], logits=1))
    return pool_count(data, train.rows) / data.n_demos * data.n_queries * row[1] * token
