"""The matrix: one line for each arm. A new arm is a new line; what was computed for the others is kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from p2d.config import Projection

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
"""Learning rates of adapters and slices."""
FULL_RATES = (1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4)
"""Of full fine-tuning."""

V_O: tuple[Projection, ...] = ("v", "o")
QKV: tuple[Projection, ...] = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What is trained."""

    kind: Literal["slices", "lora", "full"]
    slices: tuple[Projection, ...] = ()
    """Projections; LoRA without any is on all linear layers."""
    rank: int | None = None
    variant: Literal["lora", "rslora", "dora"] = "lora"

    @property
    def rates(self) -> tuple[float, ...]:
        """Rates that may be tried, ascending."""
        return FULL_RATES if self.kind == "full" else RATES

    @property
    def first_rate(self) -> float:
        """Where the search begins: what earlier measurements found near the best (docs/LOG.md)."""
        if self.kind == "full":
            return 4e-5
        return 2e-3 if self.rank is None else 8e-3 if self.rank <= 2 else 4e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to adapt the model."""

    name: str
    weights: Weights
    rows: str = "all"
    """A data scorer, or `all`, `random`, `oracle`: at random among the rows that are known to be clean."""
    ratio: float = 1.0
    """Of rows."""
    heads: str = "all"
    """A head scorer, `all`, or `random`: spread, as many as come nearest to the parameters that 10 % of heads have."""
    heads_ratio: float = 1.0
    epochs: int = 3
    groups: frozenset[str] = field(default=frozenset({"main"}))
    """Tables in which it stands."""


LORA_1 = Weights(kind="lora", rank=1)
LORA_8 = Weights(kind="lora", rank=8)
RANK_8 = Weights(kind="slices", slices=V_O, rank=8)
WHOLE = Weights(kind="slices", slices=V_O)

REFERENCE = "LoRA rank 8, all rows"
"""What people do without P2D: every arm is compared with it."""

ROWS = frozenset({"main", "rows"})
HEADS = frozenset({"main", "heads"})

ARMS = (
    Arm(name=REFERENCE, weights=LORA_8),
    # Rows: the same weights on a quarter of the rows, chosen in every way.
    *(
        Arm(name=f"rank 8 in all heads, {rows} rows", weights=RANK_8, rows=rows, ratio=0.25, groups=ROWS)
        for rows in ("random", "oracle", "alignment", "alignment_likelihood")
    ),
    Arm(name="LoRA rank 8, random rows", weights=LORA_8, rows="random", ratio=0.25),
    Arm(name="LoRA rank 8, alignment rows", weights=LORA_8, rows="alignment", ratio=0.25),
    Arm(name="rank 8 in all heads, all rows", weights=RANK_8, groups=ROWS),
    # Heads: the same rows, a tenth of the heads, chosen in every way.
    *(
        Arm(
            name=f"whole slices, {heads} heads, alignment rows",
            weights=WHOLE,
            rows="alignment",
            ratio=0.25,
            heads=heads,
            heads_ratio=0.10,
            groups=HEADS,
        )
        for heads in ("attribution", "random", "pad", "shift")
    ),
    *(
        Arm(name=f"rank 8 in all heads, {rows} rows", weights=RANK_8, rows=rows, ratio=0.25, groups=ROWS)
        for rows in ("information", "icl")
    ),
    Arm(name="LoRA rank 1, all rows", weights=LORA_1),
    Arm(name="full fine-tuning, all rows", weights=Weights(kind="full")),
)
"""The table, what tells most first: time may run out."""
