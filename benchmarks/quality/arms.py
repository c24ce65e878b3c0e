"""The matrix: one line for each arm. A new arm is a new line; what was computed for the others is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from p2d.config import HEAD_SCORERS, LEXICAL, RECIPES, UNIFORM, Auto, Projection

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
"""Learning rates of adapters and slices."""
FULL_RATES = (1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4)
"""Of full fine-tuning."""

V_O: tuple[Projection, ...] = ("v", "o")
Q_K_V_O: tuple[Projection, ...] = ("q", "k", "v", "o")

RANDOM = "random"
"""Rows or heads by no score."""

UPPER = "upper"
"""All heads of the upper layers, so that backward ends above the others."""

SPREAD, GROUPED = "spread over layers", "in whole KV groups"
"""After a head scorer: equally many heads of every layer, or KV groups as a whole (OV circuits that share one v slice)."""


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
        if self.rank is None or (self.kind == "lora" and self.rank > 2):
            return 2e-3
        return 8e-3 if self.rank <= 2 else 4e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One way to adapt the model."""

    name: str
    weights: Weights
    rows: str = "all"
    """A data scorer, or `all`, `random`, `oracle`: at random among the rows that are known to be clean."""
    ratio: float | Auto = 1.0
    """Of rows; `auto` = as many as the data scorer finds to be like the validation rows, or to pass."""
    mode: Literal["faithful", "fast"] = "faithful"
    """Of the data scorer: fast scores a random part of the pool, and the beginning of long answers (`p2d.config`)."""
    rows_for: str = ""
    """A head scorer or `random`: rows are chosen for these heads instead of those that are trained."""
    heads: str = "all"
    """A head scorer, alone or with `SPREAD` or `GROUPED`; `all`, `upper`, or `random`: spread, as many as come nearest to the
    parameters that the ratio of heads has."""
    heads_ratio: float = 1.0
    guide: int | None = None
    """Validation rows that heads and rows are chosen by, drawn by the seed; None = all that the run has."""
    epochs: int = 0
    """0 = as many as the run says."""
    draws: int = 1
    """Fewest seeds: a random choice is not one choice."""
    groups: frozenset[str] = field(default=frozenset())
    """Tables in which it stands beside the main one; `core` = computed first, on every pool."""

    @property
    def head_scorer(self) -> str:
        """What its heads are chosen by: `heads` without the way in which that is done."""
        return self.heads.partition(" ")[0]


LORA_8 = Weights(kind="lora", rank=8)
RANK_8 = Weights(kind="slices", slices=V_O, rank=8)
WHOLE = Weights(kind="slices", slices=V_O)

REFERENCE = "LoRA rank 8, all rows"
"""What people do without P2D: every arm is compared with it."""
REFERENCE_ONCE = "LoRA rank 8, all rows, 1 epoch"
"""What people do who want it cheaper, without choosing anything; compared with where the other was not computed."""
FULL = "full fine-tuning, all rows"
DEFAULT = "default recipe: rank 8 in all heads, rows like the validation rows, 1 epoch"
"""As a job without any setting is run on 2,000 rows, with a validation dataset."""
UNGUIDED = "default recipe, no validation dataset: rank 8 in all heads, rows by their words, 1 epoch"
"""The same without one."""
FORMER_DEFAULT = "former default recipe"
"""As it was before the first table (docs/decisions/0032)."""
PAPER = "paper recipe"

CORE = frozenset({"core"})
ROWS = frozenset({"rows"})
HEADS = frozenset({"heads"})
OTHER_HEADS = [name for name in HEAD_SCORERS if name not in ("attribution", RANDOM, UNIFORM)]
"""Scorers that stand beside the two which every table of heads has."""
WEIGHTS = frozenset({"weights"})


def _lora(rows: str, ratio: float, **more: Any) -> Arm:
    """LoRA on all linear layers, on a part of the rows."""
    return Arm(name=f"LoRA rank 8, {_part(rows, ratio, more)}", weights=LORA_8, rows=rows, ratio=ratio, **more)


def _low_rank(rows: str, ratio: float, **more: Any) -> Arm:
    """A low rank inside every head, on a part of the rows."""
    return Arm(name=f"rank 8 in all heads, {_part(rows, ratio, more)}", weights=RANK_8, rows=rows, ratio=ratio, **more)


def _like_the_guide(name: str, weights: Weights, **more: Any) -> Arm:
    """As many rows as there are like those of the guide, once: how the default recipe chooses."""
    return Arm(name=name, weights=weights, rows="alignment_likelihood", ratio="auto", mode="fast", epochs=1, **more)


def _part(rows: str, ratio: float, more: Mapping[str, Any]) -> str:
    fast = ", fast" if more.get("mode") == "fast" else ""
    return f"{ratio:.0%} {rows} rows{fast}" + (", 1 epoch" if more.get("epochs") == 1 else "")


def _heads(heads: str, ratio: float, weights: Weights, rows: str = RANDOM, **more: Any) -> Arm:
    """The same rows for some heads, which are chosen in every way; of rows chosen for heads `rows_for` says which."""
    what = "whole slices" if weights.rank is None else f"rank {weights.rank}"
    name = f"{what} in {ratio:.0%} {heads} heads, 25% {rows} rows"
    if "rows_for" in more:
        name += f" for {more['rows_for'] or 'these'} heads"
    return Arm(name=name, weights=weights, rows=rows, ratio=0.25, heads=heads, heads_ratio=ratio, groups=HEADS, **more)


ARMS = (
    Arm(name=REFERENCE, weights=LORA_8, groups=CORE | WEIGHTS),
    Arm(name=REFERENCE_ONCE, weights=LORA_8, epochs=1, groups=CORE),
    # More rows seen once, or fewer rows seen more often, by every way of choosing.
    *(_lora(rows, 0.50, epochs=1, groups=CORE) for rows in ("random", "oracle")),
    _lora("alignment_likelihood", 0.50, epochs=1, mode="fast", groups=CORE),
    *(_lora(rows, 0.25, groups=CORE) for rows in ("random", "oracle")),
    _lora("alignment_likelihood", 0.25, mode="fast", groups=CORE),
    _low_rank("random", 0.50, epochs=1, groups=CORE),
    _like_the_guide(DEFAULT, RANK_8, groups=CORE),
    # The same rows for LoRA's weights: what the choice of rows is worth to whoever trains everything.
    _like_the_guide("LoRA rank 8, rows like the validation rows, 1 epoch", LORA_8, groups=CORE),
    Arm(name=UNGUIDED, weights=RANK_8, rows=LEXICAL, ratio="auto", epochs=1, groups=CORE),
    Arm(name="LoRA rank 8, rows by their words, 1 epoch", weights=LORA_8, rows=LEXICAL, ratio="auto", epochs=1),
    _low_rank("alignment_likelihood", 0.50, epochs=1, mode="fast", groups=CORE),
    Arm(
        name=FORMER_DEFAULT,
        weights=WHOLE,
        rows="alignment_likelihood",
        ratio=0.10,
        heads="attribution",
        heads_ratio=0.10,
        epochs=3,
        groups=CORE,
    ),
    Arm(name="rank 8 in all heads, all rows, 1 epoch", weights=RANK_8, epochs=1, groups=CORE),
    # Depth: what it costs in loss to end backward above the lower layers, against what it saves.
    *(
        Arm(
            name=f"rank 8 in the heads of the upper {ratio:.0%} of the layers, all rows, 1 epoch",
            weights=RANK_8,
            heads=UPPER,
            heads_ratio=ratio,
            epochs=1,
        )
        for ratio in (2 / 3, 1 / 2)
    ),
    # As many weights as rank 8 in all heads, spread over MLPs as well.
    Arm(name="LoRA rank 6, all rows, 1 epoch", weights=replace(LORA_8, rank=6), epochs=1),
    *(_lora(rows, 0.25, epochs=1, groups=CORE) for rows in ("random", "oracle")),
    _lora("alignment_likelihood", 0.25, epochs=1, mode="fast", groups=CORE),
    *(_lora(rows, 0.10, groups=CORE) for rows in ("random", "oracle")),
    _lora("alignment_likelihood", 0.10, mode="fast", groups=CORE),
    _lora("alignment", 0.25, groups=CORE),
    Arm(name=FULL, weights=Weights(kind="full"), groups=WEIGHTS),
    Arm(name="rank 8 in all heads, all rows", weights=RANK_8, groups=WEIGHTS),
    *(
        _low_rank(rows, 0.25, groups=ROWS)
        for rows in ("random", "oracle", "alignment_likelihood", "alignment", "alignment_information", "information")
    ),
    # Heads at a low rank, and in whole as published.
    _heads("attribution", 0.30, RANK_8),
    _heads("random", 0.30, RANK_8, draws=5),
    _heads("attribution", 0.10, WHOLE),
    _heads("random", 0.10, WHOLE, draws=5),
    # Weights: how much is trained, and where, on all rows.
    *(
        Arm(name=f"rank {rank} in all heads, all rows", weights=replace(RANK_8, rank=rank), groups=WEIGHTS)
        for rank in (1, 2, 4, 16)
    ),
    Arm(name="rank 8 in all heads with q and k, all rows", weights=replace(RANK_8, slices=Q_K_V_O), groups=WEIGHTS),
    *(
        Arm(name=f"LoRA rank {rank}, all rows", weights=replace(LORA_8, rank=rank), groups=WEIGHTS)
        for rank in (1, 2, 4, 16)
    ),
    Arm(name="LoRA rank 32 on v and o, all rows", weights=Weights(kind="lora", rank=32, slices=V_O), groups=WEIGHTS),
    Arm(
        name="LoRA rank 8 on q, k, v and o, all rows",
        weights=Weights(kind="lora", rank=8, slices=Q_K_V_O),
        groups=WEIGHTS,
    ),
    Arm(name="rsLoRA rank 8, all rows", weights=Weights(kind="lora", rank=8, variant="rslora"), groups=WEIGHTS),
    _lora("alignment_likelihood", 0.25),
    _lora("alignment", 0.10),
    *(_lora(rows, 0.50) for rows in ("random", "oracle", "alignment")),
    *(_heads(heads, 0.30, RANK_8) for heads in OTHER_HEADS),
    *(_heads(heads, 0.10, WHOLE) for heads in OTHER_HEADS),
    # Lock and key: rows for the heads that are trained, or for others.
    *(_heads("attribution", 0.10, WHOLE, "alignment", rows_for=others) for others in ("", RANDOM)),
    _heads("attribution", 0.10, RANK_8),
    _heads("random", 0.10, RANK_8, draws=5),
    Arm(name="DoRA rank 8, all rows", weights=Weights(kind="lora", rank=8, variant="dora"), groups=WEIGHTS),
    _low_rank("icl", 0.25, groups=ROWS),
    # More heads than 30 %, and 30 % otherwise than by the scores alone.
    _heads("attribution", 0.60, RANK_8),
    _heads("random", 0.60, RANK_8, draws=5),
    *(_heads(f"attribution {way}", 0.30, RANK_8) for way in (SPREAD, GROUPED)),
    # What validation rows are worth: fewer of them choose, all of them find the rate.
    *(
        _like_the_guide(f"default recipe, rows chosen by {guide} validation rows", RANK_8, guide=guide)
        for guide in (8, 16, 32)
    ),
    Arm(
        name=PAPER,
        weights=Weights(kind="slices", slices=RECIPES["paper"].slices),
        rows=RECIPES["paper"].data_scorer,
        ratio=RECIPES["paper"].data_ratio,
        heads=RECIPES["paper"].head_scorer,
        heads_ratio=RECIPES["paper"].heads_ratio,
        epochs=RECIPES["paper"].epochs,
    ),
)
"""The table, what tells most first: time may run out."""
