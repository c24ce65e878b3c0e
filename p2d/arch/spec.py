"""What an architecture spec says: where a family keeps its projections and which weights of them belong to one head.

Data, not code: no torch, no model object. A *unit* is what a slice is cut by: a query head in q and o, a KV group in k
and v (the group's slices are shared by its heads and counted once).

Families differ in three ways only: the module paths, how q, k and v share a module (`Layout`), and whether weights are
stored [out, in] or, as GPT-2's Conv1D does, [in, out]. `unit_view` hides all three.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from p2d.config import Projection
from p2d.model_info import ModelInfo, ModelShape

if TYPE_CHECKING:
    from torch import Tensor

HEAD_WISE: frozenset[Projection] = frozenset({"q", "o"})
"""Projections cut by query head; the others are cut by KV group."""

Layout = Literal["separate", "stacked", "interleaved"]
"""How a layer's q, k and v share modules: one each; one whose outputs are all of q, then k, then v (Phi-3, GPT-2); one
whose outputs are q, k, v of the first head, then of the second (GPT-NeoX)."""

FUSED_ORDER: tuple[Projection, ...] = ("q", "k", "v")

Windows = Literal["none", "every_layer", "late_layers", "pattern", "layers_without_rope"]
"""Which layers attend to a sliding window where config.json lists no `layer_types`: none; all, if it gives a window (Mistral,
Phi-3); those from `max_window_layers` on (Qwen); all but every n-th (Gemma 3); those without rotary positions (SmolLM3)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigKeys:
    """How a family's config.json names the sizes of the model, and what it means where it is silent."""

    n_layers: str = "num_hidden_layers"
    n_heads: str = "num_attention_heads"
    hidden_size: str = "hidden_size"
    intermediate_size: str = "intermediate_size"
    context_length: str = "max_position_embeddings"
    longrope: tuple[str, ...] = ("longrope",)
    """Types of `rope_scaling` with other rotary factors for long texts than for short ones."""
    short_context: int | None = None
    """Tokens up to which the factors for short texts hold where none are given; None: the whole context."""
    head_dim: int | None = None
    """Head width where none is given; None: hidden size over heads."""
    mlp_ratio: int | None = None
    """Intermediate over hidden size where none is given; None: it must be."""
    windows: Windows = "none"
    window: int | None = None
    """Tokens in the sliding window where none is given."""
    tied: bool = False
    """Whether embedding and head are one matrix where config.json does not say."""
    refused: tuple[str, ...] = ()
    """Settings that change the arithmetic in a way this engine does not follow: a model that sets one is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchSpec:
    """Module paths of one model family, and how its projections are stored."""

    backbone: str
    """Path of the module that maps token ids to the last hidden state."""
    layers: str
    """Path of the list of decoder layers."""
    lm_head: str
    """Path of the module that maps hidden states to logits."""
    q: str
    k: str
    v: str
    o: str
    """Paths of the modules that hold the projections; `{}` stands for the layer. Equal where they share one."""
    layout: Layout = "separate"
    transposed: bool = False
    """Whether weights are stored [in, out] (Conv1D)."""
    lm_head_in_files: str | None = None
    """What the family's own files call the head, if not by its path."""
    embedding: str = "model.embed_tokens"
    """Path of the token embedding."""
    positions: str | None = None
    """Path of the embedding of positions, where they are learnt."""
    mlp_in: tuple[str, ...] = ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj")
    """Paths of what widens in a layer's MLP, the gate too; one path where both share a module."""
    mlp_out: str = "model.layers.{}.mlp.down_proj"
    """Path of what narrows again."""
    mlp_matrices: Literal[2, 3] = 3
    """Matrices of intermediate times hidden size in one MLP: 3 with a gate (fused with another or not), 2 without."""
    config: ConfigKeys = ConfigKeys()

    def path(self, layer: int, projection: Projection) -> str:
        """Path of the module that holds one projection of one layer."""
        paths: dict[Projection, str] = {"q": self.q, "k": self.k, "v": self.v, "o": self.o}
        return paths[projection].format(layer)

    def weight_name(self, layer: int, projection: Projection) -> str:
        """Name of its weight in the model."""
        return f"{self.path(layer, projection)}.weight"

    def stored_names(self, layer: int, projection: Projection) -> tuple[str, str]:
        """Names of its weight in checkpoint files: as in the model or, as GPT-2's own files have it, from the backbone on."""
        return self.names_in_files(self.weight_name(layer, projection))

    def names_in_files(self, name: str) -> tuple[str, str]:
        """Names of one of the model's weights in checkpoint files, see `stored_names`."""
        return name, name.removeprefix(f"{self.backbone}.")

    def head_names(self) -> list[str]:
        """Names of the head's weight in checkpoint files, which need none where it is tied to the embedding."""
        return [f"{path}.weight" for path in (self.lm_head_in_files, self.lm_head) if path is not None]

    def matrices(self, shape: ModelShape) -> Iterator[tuple[str, tuple[int, int]]]:
        """Name in the model and shape, as stored, of the embeddings and of every matrix of attention and MLPs."""
        D, I = shape.hidden_size, shape.intermediate_size  # noqa: E741
        yield f"{self.embedding}.weight", (shape.vocab_size, D)
        if self.positions is not None:
            yield f"{self.positions}.weight", (shape.context_length, D)
        wide = I * (self.mlp_matrices - 1) // len(self.mlp_in)
        attention: tuple[Projection, ...] = ("q", "k", "v", "o") if self.layout == "separate" else ("q", "o")
        for layer in range(shape.n_layers):
            for projection in attention:
                yield self.weight_name(layer, projection), weight_shape(self, shape, projection)
            for path, (out, into) in [*((path, (wide, D)) for path in self.mlp_in), (self.mlp_out, (D, I))]:
                yield f"{path.format(layer)}.weight", (into, out) if self.transposed else (out, into)


def every_head(info: ModelInfo) -> list[tuple[int, int]]:
    """All (layer, query head) of a model, in order."""
    return [(layer, head) for layer in range(info.n_layers) for head in range(info.n_heads)]


def group_of(info: ModelInfo, head: int) -> int:
    """KV group of a query head."""
    return head * info.n_kv_groups // info.n_heads


def heads_per_group(info: ModelInfo) -> int:
    """Query heads that share one KV group."""
    return info.n_heads // info.n_kv_groups


def units_of(info: ModelInfo, projection: Projection, heads: Iterable[int]) -> list[int]:
    """Units of one projection that the heads of one layer own: the heads themselves, or their KV groups, each once."""
    if projection in HEAD_WISE:
        return sorted(set(heads))
    return sorted({group_of(info, head) for head in heads})


def n_units(info: ModelShape, projection: Projection) -> int:
    """Units of one projection in one layer."""
    return info.n_heads if projection in HEAD_WISE else info.n_kv_groups


def unit_rows(spec: ArchSpec, info: ModelInfo, projection: Projection, unit: int) -> range:
    """Places of one unit among its module's outputs (q, k, v) or inputs (o)."""
    assert 0 <= unit < n_units(info, projection), (projection, unit)
    width = info.head_dim
    if projection == "o" or spec.layout == "separate":
        start = unit * width
    elif spec.layout == "stacked":
        before = FUSED_ORDER[: FUSED_ORDER.index(projection)]
        start = (sum(n_units(info, name) for name in before) + unit) * width
    else:
        start = (3 * unit + FUSED_ORDER.index(projection)) * width
    return range(start, start + width)


def weight_shape(spec: ArchSpec, info: ModelShape, projection: Projection) -> tuple[int, int]:
    """Shape of the weight that holds one projection, as stored."""
    shared: tuple[Projection, ...] = (projection,) if spec.layout == "separate" or projection == "o" else FUSED_ORDER
    width = sum(n_units(info, name) for name in shared) * info.head_dim
    rows, columns = (info.hidden_size, width) if projection == "o" else (width, info.hidden_size)
    return (columns, rows) if spec.transposed else (rows, columns)


def unit_view(spec: ArchSpec, info: ModelInfo, projection: Projection, weight: Tensor) -> Tensor:
    """The weight of one projection as [unit, head width, model width], a view: what is written there changes the weight.

    q, k and v: element [u, e, d] multiplies input d into output e of unit u. o: it multiplies input e of unit u into
    output d. `weight` is the module's, as stored; a gradient of that shape works as well.
    """
    weight_OI = weight.t() if spec.transposed else weight
    E, U = info.head_dim, n_units(info, projection)
    if projection == "o":
        view_UED: Tensor = weight_OI.unflatten(1, (U, E)).permute(1, 2, 0)
    elif spec.layout == "interleaved":
        view_UED = weight_OI.unflatten(0, (U, 3, E))[:, FUSED_ORDER.index(projection)]
    else:
        start = unit_rows(spec, info, projection, 0).start
        view_UED = weight_OI.narrow(0, start, U * E).unflatten(0, (U, E))
    return view_UED
