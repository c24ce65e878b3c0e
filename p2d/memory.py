"""How much memory each step holds at most, said before it runs: a closed form of what the engine keeps. No torch here.

Counted: the weights; the slices with base values, masters, gradients and AdamW's moments; what autograd saves of one micro-batch;
the pass that is running; the chunk of logits. Rows are taken to be as long as the longest one, and the shallowest chosen
layer to be the first, so it is an upper bound for rows of mixed length. Not counted: what an allocator keeps back.
`tests/p2d/test_memory.py` compares it with what PyTorch saves, docs/LOG.md with whole processes.

Legend: D model width, E head width, H query heads, G KV groups, I width inside the MLP, V vocabulary, b bytes of a number.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from p2d.arch.spec import n_units
from p2d.config import (
    WITHOUT_PROXY,
    WITHOUT_RESPONSES,
    JobConfig,
    Projection,
    alignment_layers,
    alignment_projections,
    epochs_of,
    heads_ratio,
    icl_demos,
    most_kept,
    pool_count,
    proxy_count,
    proxy_guide_rows,
    rank_of,
    rates_guide,
    top_count,
)
from p2d.flops import LORA_RANK, PROJECTIONS, lora_parameters, projection_weights
from p2d.model_info import ModelInfo
from p2d.plans import RowCounts

TOKEN_BUDGET = 4096
"""Tokens of a micro-batch (`p2d.batches.TOKEN_BUDGET`)."""
ALIGNMENT_TOKENS = {False: 1024, True: 16384}
"""Tokens of a batch of `alignment`, on a CPU and on a GPU (`p2d.responses.alignment`)."""
CHUNK_BYTES = {False: 32 << 20, True: 256 << 20}
"""fp32 logits of one chunk, on a CPU and on a GPU (`p2d.loss`)."""
PADDING = 1.25
"""Most that padding widens a batch of `alignment` (`p2d.batches.MAX_PADDING`)."""
SHORT_TOKENS = 384
"""Longest row whose probabilities are kept, on a CPU in bf16 (`p2d.cpu_attention.MAX_TOKENS`)."""
GENERATED_ROWS = 64
"""Rows that write their answers side by side (`p2d.generation.GENERATE_ROWS`)."""

FP32 = 4
MOMENTS = 8
"""Bytes of AdamW's two moments of one number."""

PROCESS_BYTES = {False: 700 << 20, True: 3 << 30}
"""Python, torch and transformers with their caches, on a CPU (measured, docs/LOG.md) and on a GPU (a guess)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What a step runs on, as far as memory goes."""

    on_gpu: bool
    wide: bool
    """fp32 rather than bf16."""

    @property
    def number(self) -> int:
        """Bytes of a weight or an activation."""
        return FP32 if self.wide else 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """Most bytes held at one time."""

    host: int
    device: int
    """0 on a CPU, whose memory is the host's."""


def step_peaks(
    info: ModelInfo,
    config: JobConfig,
    machine: Machine,
    *,
    train: RowCounts,
    guide: RowCounts,
    evaluation: RowCounts,
    shard_rows: int,
) -> dict[str, Peak]:
    """The peak of every step that loads the model; a resolved config is needed.

    Evaluation also times full fine-tuning (`full_peak`) where that much is free, and does without it elsewhere.
    """
    longest = max(train.longest, guide.longest, evaluation.longest)
    slices = _slices(config)
    batch = _micro_batch(config.training.batch_size * longest, longest)
    kept = most_kept(config.data, train.rows) * train.tokens // max(1, train.rows)
    beside = {
        "heads": _heads(info, config, machine, batch, guide, longest),
        "respond": _respond(info, config, machine, train, guide, longest),
        "train": _state(info, machine, config) + _training(info, machine, batch, longest, slices, _answers(train)),
        "evaluate": _evaluate(info, config, machine, batch, evaluation, longest),
    }
    host = {
        # Dot products and norms of the rows of one shard, in fp64.
        "respond": 24 * min(train.rows, shard_rows) * len(alignment_layers(info.n_layers)) * info.n_heads
        + _held_guide(info, config, machine, guide),
        # Checkpoints are written from a copy; frozen layers' outputs of kept rows are remembered, where there is room.
        "train": _units(info, config) * _checkpoint(info, rank_of(config.training))
        + (kept * info.hidden_size * machine.number if epochs_of(config.training) > 1 else 0),
    }
    return {step: _peak(info, machine, beside[step], host.get(step, 0)) for step in beside}


def full_peak(info: ModelInfo, config: JobConfig, machine: Machine, *, train: RowCounts) -> Peak:
    """Full fine-tuning in mixed precision: weights, gradients, fp32 copies and their gradients, AdamW's moments."""
    state = info.parameters * (machine.number + FP32 + FP32 + MOMENTS)
    batch = _micro_batch(config.training.batch_size * train.longest, train.longest)
    saved = info.n_layers * batch * _saved(info, machine, train.longest, whole=True)
    # The head is trained: all logits of the batch, their log-probabilities and both gradients are held at once.
    logits = round(batch * _answers(train)) * info.vocab_size * (2 * machine.number + 3 * FP32)
    return _peak(info, machine, state + saved + max(logits, batch * _behind(info, machine, train.longest)), 0)


def lora_peak(info: ModelInfo, config: JobConfig, machine: Machine, *, train: RowCounts) -> Peak:
    """LoRA on all linear layers, as peft trains it in the model's own type."""
    batch = _micro_batch(config.training.batch_size * train.longest, train.longest)
    return _peak(info, machine, _lora(info, machine, batch, train.longest, _answers(train)), 0)


def _peak(info: ModelInfo, machine: Machine, beside: int, host: int) -> Peak:
    weights = info.parameters * machine.number
    files = info.parameters * (FP32 if info.dtype == "fp32" else 2)  # mapped while the model loads
    process = PROCESS_BYTES[machine.on_gpu]
    if machine.on_gpu:
        return Peak(host=process + weights + max(files, host), device=weights + beside)
    return Peak(host=process + weights + max(files, beside + host), device=0)


# --- steps -----------------------------------------------------------------------------------------------------------


def _heads(info: ModelInfo, config: JobConfig, machine: Machine, batch: int, guide: RowCounts, longest: int) -> int:
    slices, answers = _slices(config), _answers(guide)
    if config.heads.scorer in WITHOUT_PROXY:
        return 0
    # Base values, masters, gradients, moments, two copies to go back to; of attribution the guide's gradients before training,
    # and at the end and in the middle of the first half, which last while the second one is trained.
    copies = 7 if config.heads.scorer == "attribution" else 4
    state = sum(projection_weights(info)[name] for name in slices) * info.n_layers
    state *= machine.number + copies * FP32 + MOMENTS
    trained = _training(info, machine, batch, longest, slices, answers)
    asked = proxy_guide_rows(proxy_count(config.heads), guide.rows)
    judged = _micro_batch(asked * guide.tokens // max(1, guide.rows), longest)
    if config.heads.scorer == "attribution":
        return state + max(trained, _training(info, machine, judged, longest, slices, answers))
    return state + max(trained, _forward(info, machine, judged, answers))


def _respond(
    info: ModelInfo, config: JobConfig, machine: Machine, train: RowCounts, guide: RowCounts, longest: int
) -> int:
    data, answers = config.data, _answers(train)
    if data.scorer in WITHOUT_RESPONSES:
        return 0
    if data.scorer.startswith("alignment"):
        layers, places = alignment_layers(info.n_layers), alignment_projections(_slices(config))
        most = ALIGNMENT_TOKENS[machine.on_gpu]
        batch = max(longest, min(most, (guide.rows + train.rows) * longest))
        saved = len(layers) * batch * _saved(info, machine, longest, whole=False)
        mean = len(layers) * sum(projection_weights(info)[name] for name in places) * FP32
        pairs = batch * longest * max(n_units(info, name) for name in places) * (machine.number + 2 * FP32)
        return (
            mean + saved + max(_loss(info, machine, batch * answers), batch * _behind(info, machine, longest) + pairs)
        )
    if data.scorer == "icl":
        shown = icl_demos(data, pool_count(data, train.rows)) * longest
        tokens = shown + data.n_queries * longest
        masses = info.n_heads * round(data.n_queries * longest * answers) * tokens * FP32
        cached = info.n_layers * 2 * tokens * info.n_kv_groups * info.head_dim * machine.number
        return _forward(info, machine, tokens, answers) + masses + cached
    return _forward(info, machine, _micro_batch(train.rows * longest, longest), answers)


def _held_guide(info: ModelInfo, config: JobConfig, machine: Machine, guide: RowCounts) -> int:
    """The factors of the guide's gradients, where its rows are rated: they wait in the host's memory for the mean of all."""
    if not rates_guide(config.data.scorer, guide.rows):
        return 0
    tapped = sum(
        n_units(info, name) * info.head_dim + info.hidden_size for name in alignment_projections(_slices(config))
    )
    tokens = min(guide.rows * guide.longest, round(PADDING * guide.tokens))
    return tokens * len(alignment_layers(info.n_layers)) * tapped * machine.number


def _evaluate(
    info: ModelInfo, config: JobConfig, machine: Machine, batch: int, evaluation: RowCounts, longest: int
) -> int:
    answers = _answers(evaluation)
    losses = _forward(info, machine, _micro_batch(evaluation.tokens, longest), answers)
    written = min(GENERATED_ROWS, evaluation.rows) * longest
    # The cache of one layer is copied when it grows.
    cache = (info.n_layers + 1) * 2 * written * info.n_kv_groups * info.head_dim * machine.number
    generation = cache + round(written * (1 - answers)) * _running(info, machine)
    controls = _state(info, machine, config) + _training(info, machine, batch, longest, _slices(config), answers)
    return max(losses, generation, _lora(info, machine, batch, longest, answers), controls if config.controls else 0)


def _lora(info: ModelInfo, machine: Machine, batch: int, longest: int, answers: float) -> int:
    adapters = info.n_layers * lora_parameters(info) * (2 * machine.number + 2 * machine.number)  # moments in its type
    inner = (len(PROJECTIONS) + info.mlp_matrices) * LORA_RANK * machine.number
    saved = info.n_layers * batch * (_saved(info, machine, longest, whole=True) + inner)
    return adapters + saved + max(_loss(info, machine, batch * answers), batch * _behind(info, machine, longest))


def _state(info: ModelInfo, machine: Machine, config: JobConfig) -> int:
    """Slices of the chosen heads: base values, masters, gradients, moments, the start of the search and the best epoch."""
    units = _units(info, config)
    rank = rank_of(config.training)
    if rank is None:
        return units * _slice_bytes(info, machine.number + 4 * FP32 + MOMENTS)
    return units * (_slice_bytes(info, machine.number + FP32) + _factor_bytes(info, rank, 4 * FP32 + MOMENTS))


def _checkpoint(info: ModelInfo, rank: int | None) -> int:
    """Of one slice: masters, moments, the best epoch; with a rank those of its factors, and in the end the values themselves."""
    if rank is None:
        return _slice_bytes(info, 3 * FP32 + MOMENTS)
    return _slice_bytes(info, FP32) + _factor_bytes(info, rank, 3 * FP32 + MOMENTS)


def _units(info: ModelInfo, config: JobConfig) -> int:
    """Most slices that the chosen heads have: each in a KV group of its own, while there are such."""
    heads = top_count(heads_ratio(config.heads), info.n_layers * info.n_heads)
    return sum(min(heads, info.n_layers * n_units(info, name)) for name in _slices(config))


def _slice_bytes(info: ModelInfo, per_number: int) -> int:
    return info.head_dim * info.hidden_size * per_number


def _factor_bytes(info: ModelInfo, rank: int, per_number: int) -> int:
    return rank * (info.head_dim + info.hidden_size) * per_number


# --- passes ----------------------------------------------------------------------------------------------------------


def _training(
    info: ModelInfo, machine: Machine, batch: int, longest: int, trained: Collection[Projection], answers: float
) -> int:
    """Forward and backward of one micro-batch with slices as the only parameters."""
    saved = info.n_layers * batch * saved_bytes(info, machine, longest, trained=trained)
    return saved + max(_loss(info, machine, batch * answers), batch * _behind(info, machine, longest))


def _forward(info: ModelInfo, machine: Machine, batch: int, answers: float) -> int:
    """A pass without gradients: one layer at a time."""
    return max(_loss(info, machine, batch * answers), batch * _running(info, machine))


def saved_bytes(info: ModelInfo, machine: Machine, longest: int, *, trained: Collection[Projection]) -> int:
    """What autograd keeps of one token in one layer, where slices of some projections are trained."""
    wide = info.n_heads * info.head_dim
    own = (info.hidden_size if {"q", "k", "v"} & set(trained) else 0) + (wide if "o" in trained else 0)
    return _saved(info, machine, longest, whole=False) + own * machine.number


def _saved(info: ModelInfo, machine: Machine, longest: int, *, whole: bool) -> int:
    """The same where no weight of the layer is trained, or (`whole`) where every matrix is."""
    b, d = machine.number, info.hidden_size
    wide, groups, inner = info.n_heads * info.head_dim, info.n_kv_groups * info.head_dim, info.intermediate_size
    norms = 2 * FP32 * d  # normed in fp32
    attention = b * (2 * wide + 2 * groups)
    if not machine.on_gpu and not machine.wide:  # short rows keep their probabilities
        attention += b * info.n_heads * min(longest, SHORT_TOKENS)
    mlp = b * inner * (3 if info.mlp_matrices == 3 else 4)
    inputs = b * (4 * d + wide + inner) if whole else 0
    return norms + attention + mlp + inputs


def _running(info: ModelInfo, machine: Machine) -> int:
    """Bytes of one token inside the layer that is being computed."""
    return machine.number * (4 * info.hidden_size + 4 * info.intermediate_size) + 2 * FP32 * info.hidden_size


def _behind(info: ModelInfo, machine: Machine, longest: int) -> int:
    """The same of a pass with gradients: short rows on a CPU in bf16 hold their scores in fp32 twice."""
    if machine.on_gpu or machine.wide:
        return _running(info, machine)
    scores = 2 * FP32 * info.n_heads * min(longest, SHORT_TOKENS)
    return max(_running(info, machine), scores + 4 * info.hidden_size * machine.number)


def _loss(info: ModelInfo, machine: Machine, answer_tokens: float) -> int:
    """Logits of one chunk as numbers, fp32, probabilities and their gradient; hidden states of all and their gradient."""
    chunk = min(round(answer_tokens), max(1, CHUNK_BYTES[machine.on_gpu] // (FP32 * info.vocab_size)))
    return chunk * info.vocab_size * (2 * machine.number + 2 * FP32) + round(
        2 * answer_tokens * info.hidden_size * machine.number
    )


def _micro_batch(tokens: int, longest: int) -> int:
    return max(longest, min(TOKEN_BUDGET, tokens))


def _answers(counts: RowCounts) -> float:
    """Share of answer tokens."""
    return counts.answer_tokens / max(1, counts.tokens)


def _slices(config: JobConfig) -> tuple[Projection, ...]:
    assert config.training.slices != "auto", "resolve the config first"
    return config.training.slices
