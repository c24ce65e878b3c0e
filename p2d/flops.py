"""Floating point operations of a job's matrix products, in closed form from the model's shape and the rows' lengths. No torch.

Counted: products of weights with activations, and attention's products of queries with keys and of probabilities with
values; a multiply-add is two operations. Not counted: norms, softmax, rotary embeddings, the optimizer, and padding, on
either side of a ratio. Attention is causal: a token meets itself and what stands before it. Sliding windows are counted as
full attention. Backward is what the chain rule needs: nothing below the shallowest trained layer, no gradient of a frozen
weight. Flash kernels compute scores twice in backward: not counted.

Legend: D model width, E head width, H query heads, G KV groups, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from p2d.arch.spec import every_head, n_units, units_of
from p2d.config import Projection
from p2d.model_info import ModelInfo

PROJECTIONS: tuple[Projection, ...] = ("q", "k", "v", "o")

PARALLEL = frozenset({"gpt_neox"})
"""Families whose MLP reads the layer's own input, beside attention: in the shallowest trained layer it gets no gradient."""

LORA_RANK = 8
"""Of the baseline, LoRA on all linear layers. Its cost hardly depends on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What passes through a model once, in tokens of rows, padding left out."""

    tokens: float
    pairs: float
    """(query, key) pairs that attention meets, of one head."""
    logits: float
    """Positions at which logits are computed."""

    def __add__(self, other: Work) -> Work:
        return Work(
            tokens=self.tokens + other.tokens, pairs=self.pairs + other.pairs, logits=self.logits + other.logits
        )

    def times(self, factor: float) -> Work:
        """As much of it `factor` times."""
        return Work(tokens=self.tokens * factor, pairs=self.pairs * factor, logits=self.logits * factor)


NOTHING = Work(tokens=0, pairs=0, logits=0)


def causal_pairs(tokens: int, past: int = 0) -> int:
    """Pairs of `tokens` new tokens, each of which meets `past` earlier ones, those before it and itself."""
    return tokens * past + tokens * (tokens + 1) // 2


def work_of(rows: Iterable[tuple[int, int]]) -> Work:
    """The work of rows that attend to themselves only, from their (tokens, answer tokens)."""
    total = NOTHING
    for length, answer in rows:
        total += Work(tokens=length, pairs=causal_pairs(length), logits=answer)
    return total


def typical_work(*, rows: int, tokens: float, answer_tokens: float) -> Work:
    """The same where only sums are known: every row is taken to be of the mean length."""
    return Work(tokens=tokens, pairs=tokens * (tokens / max(1, rows) + 1) / 2, logits=answer_tokens)


# --- one pass --------------------------------------------------------------------------------------------------------


def projection_weights(info: ModelInfo) -> dict[Projection, int]:
    """Weights of each projection of one layer."""
    return {name: n_units(info, name) * info.head_dim * info.hidden_size for name in PROJECTIONS}


def layer_weights(info: ModelInfo) -> int:
    """Weights of one layer's matrices."""
    mlp = info.mlp_matrices * info.hidden_size * info.intermediate_size
    return sum(projection_weights(info).values()) + mlp


def forward(info: ModelInfo, work: Work, *, from_layer: int = 0, to_layer: int | None = None) -> float:
    """One forward pass through the layers [from_layer, to_layer), and the head where logits are wanted."""
    layers = (info.n_layers if to_layer is None else to_layer) - from_layer
    return layers * (2 * work.tokens * layer_weights(info) + _products(info, work, 2)) + _head(info, work)


def backward(info: ModelInfo, work: Work, *, shallowest: int, trained: Collection[Projection]) -> float:
    """Gradients of activations from the loss down to what `trained` projections of the layer `shallowest` ask for.

    Inside that layer the inputs of q, k and v want no gradient, and attention's backward makes only what its own trained
    projections want. No gradient of a weight is in here: see `weight_gradients`.
    """
    whole = info.n_layers - shallowest - 1
    linear, own = 2 * work.tokens * layer_weights(info), projection_weights(info)
    last = linear - 2 * work.tokens * (own["q"] + own["k"] + own["v"])
    if info.model_type in PARALLEL:
        last -= 2 * work.tokens * (layer_weights(info) - sum(own.values()))
    if not {"q", "k", "v"} & set(trained):
        last -= 2 * work.tokens * own["o"]
    return (
        whole * (linear + _products(info, work, 4)) + last + _products(info, work, _needed(trained)) + _head(info, work)
    )


def weight_gradients(tokens: float, weights: float) -> float:
    """Gradients of this many weights, each met by all tokens."""
    return 2 * tokens * weights


def slice_weights(info: ModelInfo, heads: Iterable[tuple[int, int]], projections: Collection[Projection]) -> int:
    """Weights in the slices of some heads; a KV group's k and v are shared by its heads and counted once."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    units = sum(len(units_of(info, name, chosen)) for chosen in by_layer.values() for name in projections)
    return units * info.head_dim * info.hidden_size


def _products(info: ModelInfo, work: Work, count: int) -> float:
    """`count` of attention's products in one layer."""
    return count * 2 * work.pairs * info.n_heads * info.head_dim


def _needed(trained: Collection[Projection]) -> int:
    """Products of attention's backward: v wants one, q and k one each and one between them."""
    return len({"q", "k", "v"} & set(trained)) + bool({"q", "k"} & set(trained))


def _head(info: ModelInfo, work: Work) -> float:
    return 2 * work.logits * info.hidden_size * info.vocab_size


# --- training --------------------------------------------------------------------------------------------------------


def slice_training(
    info: ModelInfo,
    work: Work,
    *,
    heads: Sequence[tuple[int, int]],
    projections: Collection[Projection],
    cached: bool = False,
) -> float:
    """Forward and backward over `work` with these heads' slices as the only parameters.

    Args:   cached: whether the frozen activations below the shallowest chosen layer are kept from an earlier epoch.
    """
    shallowest = min(layer for layer, _ in heads)
    return (
        forward(info, work, from_layer=shallowest if cached else 0)
        + backward(info, work, shallowest=shallowest, trained=projections)
        + weight_gradients(work.tokens, slice_weights(info, heads, projections))
    )


def masked_training(info: ModelInfo, work: Work, *, projections: Collection[Projection]) -> float:
    """The same as ALPS describes it: full gradients of the projections in every layer, masked afterwards."""
    return slice_training(info, work, heads=every_head(info), projections=projections)


def full_fine_tuning(info: ModelInfo, work: Work) -> float:
    """Forward and backward over `work` with every weight trained; logits at answer tokens only."""
    layers = info.n_layers * (6 * work.tokens * layer_weights(info) + _products(info, work, 6))
    return layers + 3 * _head(info, work)


def lora_training(
    info: ModelInfo, work: Work, *, rank: int = LORA_RANK, projections: Collection[Projection] | None = None
) -> float:
    """Forward and backward over `work` with LoRA on all linear layers, or on some projections of every layer.

    Both factors cost a forward, a gradient of their input and one of their weight. The first layer's inputs want no
    gradient, as below the shallowest slice.
    """
    targets = PROJECTIONS if projections is None else projections
    adapters = info.n_layers * lora_parameters(info, rank=rank, projections=projections)
    # Of the first layer's q, k and v the factor that meets the layer's input passes no gradient on.
    first = sum(rank * info.hidden_size for name in targets if name != "o")
    return (
        forward(info, work)
        + backward(info, work, shallowest=0, trained=targets)
        + 2 * work.tokens * (3 * adapters - first)
    )


def lora_parameters(
    info: ModelInfo, *, rank: int = LORA_RANK, projections: Collection[Projection] | None = None
) -> int:
    """Trained weights of LoRA in one layer."""
    wide, d = {name: n_units(info, name) * info.head_dim for name in PROJECTIONS}, info.hidden_size
    count = sum(rank * (wide[name] + d) for name in (PROJECTIONS if projections is None else projections))
    if projections is None:
        count += info.mlp_matrices * rank * (d + info.intermediate_size)
    return count


# --- row responses ---------------------------------------------------------------------------------------------------


def alignment(
    info: ModelInfo,
    *,
    guide: Sequence[tuple[int, int]],
    rows: Sequence[tuple[int, int]],
    projections: Collection[Projection],
    from_layer: int = 0,
    rate_guide: bool = False,
) -> float:
    """Gradients of guide rows and of rows from the layer `from_layer` up, and the products made of them.

    Args:   guide, rows: (tokens, answer tokens) of each. rate_guide: whether products are made of the guide's rows, too.
    """
    both, rated = work_of([*guide, *rows]), [*rows, *(guide if rate_guide else ())]
    tapped = (info.n_layers - from_layer) * sum(projection_weights(info)[name] for name in projections)
    through = forward(info, both) + backward(info, both, shallowest=from_layer, trained=projections)
    # The guide's mean gradient, and each row's part along it.
    along = weight_gradients(sum(length for length, _ in [*guide, *rated]), tapped)
    layers = info.n_layers - from_layer
    return through + along + layers * sum(_squares(info, name, length) for name in projections for length, _ in rated)


def _squares(info: ModelInfo, projection: Projection, tokens: int) -> float:
    """Squared gradient norms of one row: all pairs of tokens, or a unit's whole gradient, whichever is less."""
    units, e, d = n_units(info, projection), info.head_dim, info.hidden_size
    if tokens * (units * e + d) <= units * e * d:
        return 2 * tokens**2 * (d + units * e)
    return 2 * tokens * units * e * d


def icl_group(info: ModelInfo, *, shown: int, queries: Sequence[tuple[int, int]], judged: bool) -> float:
    """One group of in-context scoring: demonstrations once, then each query after them; masses of all heads.

    Args:   shown: tokens of prefix and demonstrations. queries: (tokens, answer tokens) of each, without the prefix.
            judged: whether logits at the answers are wanted.
    """
    answers = sum(answer for _, answer in queries)
    asked = Work(
        tokens=sum(length for length, _ in queries),
        pairs=sum(causal_pairs(length, past=shown) for length, _ in queries),
        logits=answers if judged else 0,
    )
    work = Work(tokens=shown, pairs=causal_pairs(shown), logits=0) + asked
    probed = sum(answer * (shown + length) for length, answer in queries)
    return forward(info, work) + info.n_layers * 2 * probed * info.n_heads * info.head_dim
