"""What an architecture spec says: where a family keeps its projections and which weights of them belong to one head.

Data, not code: no torch, no model object. A *unit* is what a slice is cut by: a query head in q and o, a KV group in k
and v (the group's slices are shared by its heads and counted once).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from p2d.config import Projection
from p2d.model_info import ModelInfo

HEAD_WISE: frozenset[Projection] = frozenset({"q", "o"})
"""Projections cut by query head; the others are cut by KV group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchSpec:
    """Module paths of one model family whose q, k, v and o are separate linear layers."""

    backbone: str
    """Path of the module that maps token ids to the last hidden state."""
    lm_head: str
    """Path of the module that maps hidden states to logits."""
    q: str
    k: str
    v: str
    o: str
    """Paths of the projections; `{}` stands for the layer."""

    def path(self, layer: int, projection: Projection) -> str:
        """Module path of one projection of one layer."""
        paths: dict[Projection, str] = {"q": self.q, "k": self.k, "v": self.v, "o": self.o}
        return paths[projection].format(layer)

    def weight_name(self, layer: int, projection: Projection) -> str:
        """Name of its weight in the checkpoint files."""
        return f"{self.path(layer, projection)}.weight"


def group_of(info: ModelInfo, head: int) -> int:
    """KV group of a query head."""
    return head * info.n_kv_groups // info.n_heads


def heads_per_group(info: ModelInfo) -> int:
    """Query heads that share one KV group."""
    return info.n_heads // info.n_kv_groups


def axis(projection: Projection) -> int:
    """Axis of the weight [out, in] that heads are cut along: rows of q, k and v, columns of o."""
    return 1 if projection == "o" else 0


def units_of(info: ModelInfo, projection: Projection, heads: Iterable[int]) -> list[int]:
    """Units of one projection that the heads of one layer own: the heads themselves, or their KV groups, each once."""
    if projection in HEAD_WISE:
        return sorted(set(heads))
    return sorted({group_of(info, head) for head in heads})


def n_units(info: ModelInfo, projection: Projection) -> int:
    """Units of one projection in one layer."""
    return info.n_heads if projection in HEAD_WISE else info.n_kv_groups


def head_rows(info: ModelInfo, projection: Projection, unit: int) -> range:
    """Weight rows (q, k, v) or columns (o) of one unit."""
    assert 0 <= unit < n_units(info, projection), (projection, unit)
    return range(unit * info.head_dim, (unit + 1) * info.head_dim)
