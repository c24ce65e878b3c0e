"""Choosing heads and rows for an arm by the product's own stages; a choice is made once, and counted in every arm that uses it."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import p2d.config
from benchmarks.quality.arms import GROUPED, RANDOM, SPREAD, UPPER, Arm
from benchmarks.quality.pools import Pool
from p2d.arch.spec import heads_per_group
from p2d.config import (
    DATA_SCORERS,
    HEAD_SCORERS,
    LEXICAL,
    DataConfig,
    HeadsConfig,
    JobConfig,
    TrainingConfig,
    pool_count,
    samples_first,
    top_count,
)
from p2d.estimate import estimate_flops
from p2d.evaluation import random_heads
from p2d.flops import slice_weights
from p2d.head_maps import Head, HeadMap
from p2d.identify import identify_heads
from p2d.models import BaseModel
from p2d.pipeline import no_progress
from p2d.plans import RowCounts
from p2d.registry import load
from p2d.resolution import resolve
from p2d.responses import ResponseInput, Responses
from p2d.rows import Row
from p2d.selection import select_rows
from p2d.slices import all_heads


@dataclass(frozen=True, slots=True)
class StageCost:
    """What one stage took."""

    name: str
    seconds: float
    flops: float


@dataclass(slots=True)
class Stages:
    """Head maps and row responses of one pool."""

    base: BaseModel
    pool: Pool
    guide: Sequence[Row]
    clock: Callable[[], float]
    _maps: dict[str, tuple[HeadMap, StageCost]] = field(default_factory=dict)
    _responses: dict[str, tuple[Responses, StageCost]] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Hash of the rows that guide the choices."""
        return hashlib.sha256(repr([(row.prompt, row.answer) for row in self.guide]).encode()).hexdigest()[:16]

    def heads(self, arm: Arm, seed: int) -> tuple[list[Head], list[StageCost]]:
        """The arm's heads, and what finding them took."""
        if arm.weights.kind != "slices" or arm.heads == "all":
            return all_heads(self.base), []
        if arm.heads == UPPER:
            lowest = round((1 - arm.heads_ratio) * self.base.info.n_layers)
            return [head for head in all_heads(self.base) if head[0] >= lowest], []
        config = self._config(arm, seed)
        if arm.heads == "random":
            order = all_heads(self.base)
            random.Random(f"{seed}:size").shuffle(order)  # noqa: S311 - not a secret
            some = order[: top_count(arm.heads_ratio, len(order))]
            size = slice_weights(self.base.info, some, arm.weights.slices)
            return random_heads(self.base, config, size, random.Random(f"{seed}:heads")), []  # noqa: S311 - not a secret
        guide = self._guide(arm, seed)
        key = repr((arm.head_scorer, arm.weights.slices, arm.guide, seed))
        if key not in self._maps:
            started = self.clock()
            found = identify_heads(self.base, self.pool.rows, guide, config, no_progress)
            seconds = self.clock() - started
            cost = StageCost(f"heads by {arm.head_scorer}", seconds, self._flops(config, guide)["heads"])
            self._maps[key] = found, cost
        found, cost = self._maps[key]
        best = found.ranked()
        if arm.heads.endswith(SPREAD):
            best = spread(best)
        elif arm.heads.endswith(GROUPED):
            best = grouped(best, found.scores, heads_per_group(self.base.info))
        return best[: top_count(arm.heads_ratio, len(best))], [cost]

    def rows(self, arm: Arm, heads: Sequence[Head], seed: int) -> tuple[list[int], list[StageCost]]:
        """Indices of the arm's rows, ascending, and what choosing them took."""
        every = range(len(self.pool.rows))
        if arm.rows in ("all", "random", "oracle"):
            assert arm.ratio != "auto", "nothing decides how many"
            some = self.pool.clean if arm.rows == "oracle" else every
            return _drawn(some, top_count(arm.ratio, len(every)), seed), []
        config = self._config(arm, seed)
        # In fast mode the ratio decides how many rows are looked at, and the seed which; groups of `icl` are drawn by it, and what
        # `lexical` sets answers beside.
        looked_at = pool_count(config.data, len(every))
        # Left open, it lets a sample be scored first, which the seed draws as well.
        sampled = samples_first(config)
        drawn = (looked_at, seed) if looked_at < len(every) or arm.rows in ("icl", LEXICAL) or sampled else None
        guide = self._guide(arm, seed)
        drawn_guide = (arm.guide, seed) if arm.guide else None
        key = repr((arm.rows, arm.mode, drawn, sampled, drawn_guide, config.training.slices))
        if key not in self._responses:
            scorer: Any = load(DATA_SCORERS, arm.rows, what="data scorer", pointer="/data/scorer")
            assert config.training.slices != "auto"
            given = ResponseInput(
                base=self.base,
                rows=self.pool.rows,
                guide=guide,
                span=every,
                slices=config.training.slices,
                config=config,
            )
            started = self.clock()
            found: Responses = scorer(given)
            cost = StageCost(f"rows by {arm.rows}", self.clock() - started, float(found.flops))
            self._responses[key] = found, cost
        responses, cost = self._responses[key]
        selection = select_rows([responses.shard], list(heads), arm.ratio, self.pool.rows, seed=seed, guide_apart=True)
        return selection.kept_rows, [cost]

    def _guide(self, arm: Arm, seed: int) -> Sequence[Row]:
        """The rows that choose for the arm: of a few, which they are counts for as much as how many."""
        if arm.guide is None:
            return self.guide
        return random.Random(f"{seed}:guide").sample(list(self.guide), arm.guide)  # noqa: S311 - not a secret

    def _config(self, arm: Arm, seed: int) -> JobConfig:
        scorer = arm.head_scorer if arm.heads not in ("all", "random", UPPER) else "attribution"
        config = JobConfig(
            heads=HeadsConfig(scorer=scorer, ratio=arm.heads_ratio),
            data=DataConfig(
                scorer="alignment" if arm.rows in ("all", "random", "oracle") else arm.rows,
                ratio=arm.ratio,
                mode=arm.mode,
            ),
            # LoRA has no slices of its own: rows are scored on those of the default recipe.
            training=TrainingConfig(
                slices=arm.weights.slices or ("v", "o"),
                rank=None,
                epochs=arm.epochs,
                learning_rate=1e-3,
                seed=seed,
            ),
        )
        info = self.base.info
        found = resolve(
            config,
            rows=len(self.pool.rows),
            context_length=info.context_length,
            head_dim=info.head_dim,
            validation_guide=len(self._guide(arm, seed)),
        )
        return found.config

    def _flops(self, config: JobConfig, guide: Sequence[Row]) -> dict[str, float]:
        return estimate_flops(self.base.info, config, train=self._counts(self.pool.rows), guide=self._counts(guide))

    def _counts(self, rows: Sequence[Row]) -> RowCounts:
        rendered = [self.base.renderer.render(row) for row in rows]
        lengths = [self.base.renderer.length(row) for row in rendered]
        return RowCounts(
            rows=len(rows),
            tokens=sum(lengths),
            answer_tokens=sum(len(row.answer_ids) for row in rendered),
            longest=max(lengths),
        )


CHOOSING_ROWS = (
    "p2d.guide_scale",
    "p2d.guide_words",
    "p2d.near_duplicates",
    "p2d.response_matrix",
    "p2d.responses.alignment",
    "p2d.selection",
)
"""Modules that have a say in which rows are kept, beside the data scorer's."""

NUMBERS = (
    "FAST_ANSWER_TOKENS",
    "FAST_DEMOS",
    "FAST_SLOT_ROWS",
    "FEWEST_LEFT",
    "FEWEST_LOOK",
    "LOOK_APART",
    "LOOK_SHARE",
    "MIN_GUIDE",
    "MOST_LOOK",
    "POOL_FACTOR",
    "PROXY_ROWS",
    "UPPER_THIRD",
)
"""What these modules and the scorers take from `p2d.config`, which has too much else to be hashed."""


def choosing_code(arm: Arm) -> list[str]:
    """Hashes of the modules that decide which heads and rows an arm chooses, and NUMBERS: with others it is another cell.

    Empty where nothing is chosen by a score.
    """
    modules: set[str] = set()
    if arm.rows in DATA_SCORERS and arm.rows != RANDOM:
        modules |= {*CHOOSING_ROWS, DATA_SCORERS[arm.rows]}
    for heads in (arm.head_scorer, arm.rows_for):
        if heads in HEAD_SCORERS and heads != RANDOM:
            modules |= {"p2d.identify", HEAD_SCORERS[heads]}
    hashes = [_code(_source(module.partition(":")[0])) for module in sorted(modules)]
    return [*hashes, *(f"{name}={getattr(p2d.config, name)}" for name in NUMBERS)] if hashes else []


def _source(module: str) -> bytes:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_bytes()


@cache
def _code(source: bytes) -> str:
    """Hash of a module, lines of comment left out; cached, as a key is asked for at every look at a cell.

    Not of its syntax tree, which every version of Python writes differently.
    """
    lines = [line.rstrip() for line in source.splitlines() if line.strip() and not line.lstrip().startswith(b"#")]
    return hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]


def spread(ranked: Sequence[Head]) -> list[Head]:
    """The best head of every layer first, then the second best of every layer; each round in the order given."""
    seen: Counter[int] = Counter()
    places = []
    for place, (layer, _) in enumerate(ranked):
        places.append((seen[layer], place))
        seen[layer] += 1
    return [ranked[place] for _, place in sorted(places)]


def grouped(ranked: Sequence[Head], scores: Sequence[Sequence[float]], group: int) -> list[Head]:
    """Heads of the KV groups whose scores sum up highest first, a group's heads together.

    Args: scores: [layers, heads]. group: heads of a KV group.
    """

    def total(head: Head) -> tuple[float, int, int]:
        layer, first = head[0], head[1] - head[1] % group
        return -sum(scores[layer][first : first + group]), layer, first

    return sorted(ranked, key=total)


def _drawn(indices: Sequence[int], count: int, seed: int) -> list[int]:
    return sorted(random.Random(f"{seed}:rows").sample(list(indices), min(count, len(indices))))  # noqa: S311 - not a secret
