"""Stage 1: rank all heads for a task: two disjoint half-proxies are trained, each is scored, their mean is the head map.

The proxy trains the recipe's projections of every head for one epoch. How a head is scored is one file in `p2d.scorers`;
what a ratio keeps of the map is a view that others take. The base model is unchanged afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p2d.batches import TOKEN_BUDGET, answer_nll, mean_answer_nll, pack, packed_batches
from p2d.config import DEFAULT_RATIO, HEAD_SCORERS, WITHOUT_PROXY, JobConfig, Projection, proxy_count, proxy_guide_rows
from p2d.device import backward
from p2d.errors import DatasetTooSmall, Diverged, EngineError
from p2d.head_maps import HeadMap, ProxyFacts, reproducibility
from p2d.memory_guard import memory_guard
from p2d.models import BaseModel
from p2d.optimization import Schedule, SliceTrainer, epoch_order, steps_per_epoch
from p2d.pipeline import Progress
from p2d.registry import load
from p2d.rendering import RenderedRow
from p2d.rows import Row, content_hash
from p2d.scorers import WITH_GRADIENTS, PathPoint, Scorer, ScorerInput
from p2d.slices import HeadSlices, all_heads

PROXY_RATES = (2.5e-4, 6.25e-5, 1.6e-5)
"""Tried in turn until held-out loss falls. SmolLM2, all v and o, 3 steps of 4 rows, held-out loss 1.229 before: 1.137 at 1e-4,
1.034 at 2.5e-4, 1.033 at 5e-4 after twice the way, 1.191 at 1e-3, which overshoots (docs/LOG.md)."""


def identify_heads(
    base: BaseModel, rows: Sequence[Row], guide_rows: Sequence[Row], config: JobConfig, progress: Progress
) -> HeadMap:
    """Rank every head of `base` for the task of `rows`.

    Args:    rows: training rows; `heads.proxy_rows` of them are drawn by the seed. guide_rows: held-out rows.
             config: resolved (`p2d.resolution`).
    Returns: the mean of two half-proxies' scores, each scaled to the same mean magnitude first, so that neither half
             decides the ranks by its size alone; the common scale is put back, so the scores keep their unit.
    Raises:  DatasetTooSmall, Diverged, OutOfMemory, whatever `progress` raises.
    """
    scorer: Scorer = load(HEAD_SCORERS, config.heads.scorer, what="head scorer", pointer="/heads/scorer")
    slices = config.training.slices
    assert slices != "auto", "resolve the config first"
    seed = config.training.seed
    if config.heads.scorer in WITHOUT_PROXY:
        halves = [scorer(ScorerInput(base.info, None, 2 * seed + half)) for half in (0, 1)]
        proxy = None
    else:
        halves, proxy = _score_halves(base, rows, guide_rows, config, slices, scorer, progress)
    lists = [_as_lists(scores_LH) for scores_LH in halves]
    return HeadMap(
        scores=_as_lists(balanced_mean(halves[0], halves[1])),
        scorer=config.heads.scorer,
        projections=slices,
        model_name=base.info.name,
        model_digest=base.info.digest,
        dataset_hash=content_hash(rows),
        seed=seed,
        precision="bf16" if base.dtype == torch.bfloat16 else "fp32",
        reproducibility=reproducibility(lists[0], lists[1], ratio=DEFAULT_RATIO),
        halves=(lists[0], lists[1]),
        proxy=proxy,
    )


def balanced_mean(one_LH: Tensor, other_LH: Tensor) -> Tensor:
    """Mean of two maps, each scaled to the mean of their mean magnitudes; the order inside each is untouched."""
    one_LH, other_LH = one_LH.double(), other_LH.double()
    size, other_size = one_LH.abs().mean(), other_LH.abs().mean()
    if size == 0 or other_size == 0:  # a half in which no head moved says nothing about the order
        return (one_LH + other_LH).float()
    return ((one_LH / size + other_LH / other_size) / 2 * (size + other_size) / 2).float()


def half_proxies(count: int, proxy_rows: int, seed: int) -> tuple[list[int], list[int]]:
    """Row indices of two disjoint half-proxies. Raises DatasetTooSmall."""
    if count < proxy_rows:
        raise DatasetTooSmall(
            f"The dataset has {count} rows; the proxy needs {proxy_rows}.", rows=count, needed=proxy_rows
        )
    drawn = epoch_order(count, f"{seed}:proxy", 0)
    half = proxy_rows // 2
    return list(drawn[:half]), list(drawn[half : 2 * half])


def _as_lists(scores_LH: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in scores_LH.tolist())


@dataclass(slots=True)
class _Work:
    """Progress of the whole stage, and what it processed."""

    progress: Progress
    total: int
    done: int = 0
    tokens: int = 0

    def tick(self, tokens: int, metrics: dict[str, float]) -> None:
        self.tokens += tokens
        self.done = min(self.done + 1, self.total)  # retries and extra path points come on top of the estimate
        self.progress(self.done, self.total, metrics)


@dataclass(slots=True)
class _Guide:
    """The held-out rows in batches; gives loss and gradient of the weights as they stand."""

    base: BaseModel
    rows: Sequence[RenderedRow]
    work: _Work
    with_gradients: bool
    """Whether the scorer needs gradients anyway: loss and gradient then come from one pass."""
    batches: list[list[int]] = field(init=False)
    answer_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        lengths = [self.base.renderer.length(row) for row in self.rows]
        self.batches = packed_batches(lengths, TOKEN_BUDGET)
        self.answer_tokens = sum(len(row.answer_ids) for row in self.rows)

    def point(self, slices: HeadSlices) -> PathPoint:
        """Mean loss per answer token and its gradient for all slices."""
        loss = 0.0
        slices.zero_grad()
        for indices in self.batches:
            batch = pack(self.base.renderer, self.rows, indices)
            with memory_guard("scoring heads"):
                nll_B, _ = answer_nll(self.base, batch)
                part = nll_B.sum() / self.answer_tokens
                backward(part)
            loss += float(part.detach())
            self.work.tick(batch.tokens, {})
        gradients = slices.gradients()
        slices.zero_grad()
        return PathPoint(loss, gradients)

    def measure(self, slices: HeadSlices) -> PathPoint:
        """The point, or only its loss (no gradients, a third of the cost) for scorers that need no more."""
        if self.with_gradients:
            return self.point(slices)
        self.work.tick(sum(self.base.renderer.length(row) for row in self.rows), {})
        return PathPoint(mean_answer_nll(self.base, self.rows), {})


@dataclass(slots=True)
class _TrainedProxy:
    """A trained half-proxy for its scorer (`p2d.scorers.Proxy`)."""

    base_model: BaseModel
    slices: HeadSlices
    guide: _Guide
    points: dict[float, PathPoint]

    @property
    def projections(self) -> tuple[Projection, ...]:
        return self.slices.projections

    def base(self, layer: int, projection: Projection) -> Tensor:
        # Every head is sliced, so a site holds all units.
        if site := self.slices.site(layer, projection):
            return site.base_UED.float()
        return self.base_model.units(layer, projection).float()

    def trained(self, layer: int, projection: Projection) -> Tensor:
        site = self.slices.site(layer, projection)
        return site.master.detach() if site else self.base(layer, projection)

    def moved(self, layer: int, projection: Projection, start: float, end: float) -> Tensor:
        site = self.slices.site(layer, projection)
        return torch.zeros(()) if site is None else site.at(end).float() - site.at(start).float()

    def at(self, fraction: float) -> PathPoint:
        if fraction not in self.points or not self.points[fraction].gradients:
            self.slices.interpolate(fraction)
            self.points[fraction] = self.guide.point(self.slices)
        return self.points[fraction]


def _score_halves(
    base: BaseModel,
    rows: Sequence[Row],
    guide_rows: Sequence[Row],
    config: JobConfig,
    projections: Sequence[Projection],
    scorer: Scorer,
    progress: Progress,
) -> tuple[list[Tensor], ProxyFacts]:
    """Train and score both half-proxies."""
    seed, batch_size = config.training.seed, config.training.batch_size
    halves = half_proxies(len(rows), proxy_count(config.heads), seed)
    if not guide_rows:
        raise EngineError("Heads cannot be ranked without held-out rows.")
    steps = steps_per_epoch(len(halves[0]), batch_size)
    work = _Work(progress, total=0)
    judging = guide_rows[: proxy_guide_rows(proxy_count(config.heads), len(guide_rows))]
    guide_rendered = [base.renderer.render(row) for row in judging]
    guide = _Guide(base, guide_rendered, work, with_gradients=config.heads.scorer in WITH_GRADIENTS)
    work.total = 2 * steps + 3 * (len(guide.batches) if guide.with_gradients else 1)
    scores: list[Tensor] = []
    after: list[float] = []
    rate = PROXY_RATES[0]
    with HeadSlices(base, all_heads(base), projections) as slices:
        untrained = slices.masters()
        before = guide.measure(slices)  # serves both halves
        for half, indices in enumerate(halves):
            rendered = [base.renderer.render(rows[index]) for index in indices]
            rate, end = _train_half(guide, slices, rendered, before.loss, rate, f"{seed}:proxy:{half}", batch_size)
            after.append(end.loss)
            proxy = _TrainedProxy(base, slices, guide, {0.0: before, 1.0: end})
            scores_LH = scorer(ScorerInput(base.info, proxy, 2 * seed + half)).float().cpu()
            if not torch.isfinite(scores_LH).all():
                raise Diverged("A head's score is not finite.", scorer=config.heads.scorer)
            scores.append(scores_LH)
            slices.load_masters(untrained)
    facts = ProxyFacts(
        rows_per_half=len(halves[0]),
        steps_per_half=steps,
        learning_rate=rate,
        guide_rows=len(judging),
        guide_loss_before=before.loss,
        guide_loss_after=tuple(after),
        tokens=work.tokens,
        explained_decrease=tuple(float(s.double().sum()) for s in scores)
        if config.heads.scorer == "attribution"
        else (),
    )
    return scores, facts


def _train_half(
    guide: _Guide,
    slices: HeadSlices,
    rows: Sequence[RenderedRow],
    before: float,
    first_rate: float,
    seed: str,
    batch_size: int,
) -> tuple[float, PathPoint]:
    """One epoch at the first rate that lowers held-out loss (else at the last); returns that rate and the end point."""
    untrained = slices.masters()
    steps = steps_per_epoch(len(rows), batch_size)
    rates = [rate for rate in PROXY_RATES if rate <= first_rate]
    for rate in rates:
        trainer = SliceTrainer(guide.base, slices, rows, batch_size=batch_size, seed=seed)
        try:
            for _ in range(steps):
                log = trainer.advance(Schedule(rate, steps))
                guide.work.tick(log.tokens, {"loss": log.loss, "learning_rate": log.learning_rate})
            end = guide.measure(slices)
        except Diverged:
            end = PathPoint(math.inf, {})
        if end.loss < before or (rate == rates[-1] and math.isfinite(end.loss)):
            return rate, end
        slices.load_masters(untrained)
    raise Diverged("The proxy diverged at every learning rate.", rates=rates)
