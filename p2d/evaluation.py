"""What an adapter is worth on held-out rows, before against after on the same rows, and against its controls.

Loss on answer tokens with its uncertainty, exact match by greedy generation, and what full fine-tuning and LoRA would cost
here (`p2d.baselines`). The base model is left bit-identical.

Legend: R row, B batch.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from p2d.adapters import Adapter
from p2d.baselines import Baseline, project_full_fine_tuning, project_lora
from p2d.batches import answer_nlls
from p2d.config import Control, JobConfig, Projection
from p2d.course import Course
from p2d.errors import Diverged
from p2d.estimate import BASELINE_STEPS, EvaluationCost
from p2d.flops import slice_weights
from p2d.generation import GENERATE_ROWS, answer_limit, task_metric
from p2d.lora_control import lora_control
from p2d.memory_guard import memory_guard
from p2d.models import BaseModel
from p2d.pipeline import Progress, no_progress
from p2d.rendering import RenderedRow, RenderedRows
from p2d.row_files import RowView
from p2d.rows import Row, content_hash
from p2d.slices import Head, HeadSlices, all_heads
from p2d.training import train

ROW_LOSSES_FORMAT = 1
"""Of row_losses.json."""

METRIC = "exact_match"
METRIC_ROWS = 200
"""Most rows answered by generation, which costs some hundred times the loss of the same row. A guess."""

DRAWN_AT_ONCE = 1 << 20
"""Rows drawn at once by the bootstrap: 10,000 draws of a large validation dataset would fill the memory."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Answer loss of each row."""

    nll_R: Floats
    """Nats, summed over the answer's tokens."""
    tokens_R: Floats

    @property
    def mean(self) -> float:
        """Nats per answer token, over all rows together."""
        return float(self.nll_R.sum() / self.tokens_R.sum())


def _nothing(share: float) -> None:
    """For callers that do not watch."""


def row_losses(
    base: BaseModel, rendered: Sequence[RenderedRow], *, at: Callable[[float], None] = _nothing
) -> RowLosses:
    """Answer loss of every row under the weights as they stand. Raises Diverged if one is not finite.

    Args: at: told which share of the rows is done.
    """
    done = 0
    nll_R, tokens_R = np.zeros(len(rendered)), np.zeros(len(rendered))
    with memory_guard("evaluating"):
        for indices, nll_B, tokens_B in answer_nlls(base, rendered):
            nll_R[indices] = nll_B.double().cpu().numpy()
            tokens_R[indices] = tokens_B.cpu().numpy()
            done += len(indices)
            at(done / len(rendered))
    if not np.isfinite(nll_R).all():
        raise Diverged("The loss of a held-out row is not finite.")
    return RowLosses(nll_R, tokens_R)


Verdict = Literal["better", "worse", "no clear difference", "no comparison"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Difference of the mean loss between two sets of weights on the same rows; below 0 = better."""

    difference: float
    low: float
    high: float
    """Ends of the 95 % interval."""

    @property
    def verdict(self) -> Verdict:
        """Of the later weights: whether the interval leaves out 0."""
        return "better" if self.high < 0 else "worse" if self.low > 0 else "no clear difference"


def paired_bootstrap(before: RowLosses, after: RowLosses, *, seed: int, draws: int = 10_000) -> Change:
    """How sure the difference is: rows are drawn again with replacement, both losses of a row always together."""
    rows, rng = len(before.nll_R), np.random.default_rng(seed)
    change_R = after.nll_R - before.nll_R
    at_once = max(1, DRAWN_AT_ONCE // rows)
    differences: list[Floats] = []
    for first in range(0, draws, at_once):
        pick = rng.integers(rows, size=(min(at_once, draws - first), rows))
        differences.append(change_R[pick].sum(axis=1) / before.tokens_R[pick].sum(axis=1))
    low, high = np.quantile(np.concatenate(differences), [0.025, 0.975])
    return Change(difference=after.mean - before.mean, low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """A control: the same training with random heads or random rows, at the same size; or LoRA on all linear layers and rows."""

    control: Control
    heads: int
    """0 for LoRA, which knows no heads."""
    rows: int
    trained_parameters: int
    learning_rate: float
    seconds: float
    """Of its training, the search for its rate included."""
    loss: float
    against_job: Change
    """The job's loss minus the control's; below 0 = the job's choice was worth something."""
    verdict: Verdict
    """Of the job, by whether that interval holds 0; `no comparison` where the control drew all heads or rows, as the job has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """evaluation.json. Losses are nats per answer token."""

    rows: int
    loss_before: float
    loss_after: float
    change: Change
    metric: str
    metric_rows: int
    metric_before: float
    metric_after: float
    full_fine_tuning: Baseline
    lora: Baseline
    controls: tuple[Arm, ...]


@dataclass(slots=True)
class Judge:
    """One evaluation: what it may look at, and what it cost."""

    base: BaseModel
    rows: Sequence[Row]
    """Held-out rows that nothing was chosen by."""
    train: Sequence[Row]
    guide: Sequence[Row]
    kept: Sequence[Row]
    heads: Sequence[Head]
    config: JobConfig
    cost: EvaluationCost
    progress: Progress = no_progress
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds by name."""
    losses: dict[str, RowLosses] = field(default_factory=dict)
    """Of each evaluation row: `before`, `after`, and by the name of each control."""
    tokens: int = 0
    _course: Course = field(init=False)

    def __post_init__(self) -> None:
        self._course = Course(self.progress, self.cost.total(self.config))

    def evaluate(self, adapter: Adapter) -> Evaluation:
        """Measure everything. Raises AdapterMismatch, Diverged, whatever `progress` raises."""
        rendered = RenderedRows(self.base.renderer, self.rows)
        asked = self.rows[:METRIC_ROWS]
        with self._part("loss"):
            before = self._losses(rendered)
        with self._part("generation"):
            metric_before = self._metric(asked, rendered)
        previous = adapter.apply(self.base)
        try:
            with self._part("loss"):
                after = self._losses(rendered)
            with self._part("generation"):
                metric_after = self._metric(asked, rendered)
        finally:
            adapter.revert(self.base, previous)
        self.losses |= {"before": before, "after": after}
        with self._part("controls"):
            controls = tuple(self._control(name, rendered, after) for name in self.config.controls)
        with self._part("timing the baselines"):
            full, lora = self._baselines()
        evaluation = Evaluation(
            rows=len(rendered),
            loss_before=before.mean,
            loss_after=after.mean,
            change=paired_bootstrap(before, after, seed=self.config.training.seed),
            metric=METRIC,
            metric_rows=len(asked),
            metric_before=metric_before,
            metric_after=metric_after,
            full_fine_tuning=full,
            lora=lora,
            controls=controls,
        )
        self._course.end()
        return evaluation

    def row_losses(self) -> dict[str, Any]:
        """row_losses.json: nats of every evaluation row's answer, under `before`, `after` and each control, no text.

        Whoever has two of them with equal `rows_hash` and `tokens` can compare two jobs row by row (`p2d.comparison`).
        """
        tokens = self.losses["before"].tokens_R
        return {
            "format": ROW_LOSSES_FORMAT,
            "rows_hash": content_hash(self.rows),
            "tokens": [int(count) for count in tokens],
            # To a millionth of a nat: the values are sums of fp32 numbers.
            **{name: [round(float(nll), 6) for nll in losses.nll_R] for name, losses in self.losses.items()},
        }

    def _losses(self, rendered: Sequence[RenderedRow]) -> RowLosses:
        with self._course.part(self.cost.loss) as at:
            losses = row_losses(self.base, rendered, at=at)
        self.tokens += sum(self.base.renderer.length(row) for row in rendered)
        return losses

    def _metric(self, asked: Sequence[Row], rendered: Sequence[RenderedRow]) -> float:
        batches = -(-len(asked) // GENERATE_ROWS)
        with self._course.part(self.cost.generation) as at:
            tick = _ticks(batches * answer_limit(rendered[: len(asked)]), at)
            return task_metric(self.base, asked, metric=METRIC, on_token=tick)

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - started

    def _control(self, name: Control, rendered: Sequence[RenderedRow], job: RowLosses) -> Arm:
        if name == "lora":
            return self._lora(rendered, job)
        rng = random.Random(f"{self.config.training.seed}:{name}")  # noqa: S311 - not a secret
        heads, kept = self.heads, self.kept
        if name == "random_heads":
            size = slice_weights(self.base.info, self.heads, self._slices())
            heads = random_heads(self.base, self.config, size, rng)
        else:
            kept = RowView(self.train, rng.sample(range(len(self.train)), len(self.kept)))
        render = self.base.renderer.render
        with self._course.part(self.cost.control) as at:
            result = train(
                self.base,
                RenderedRows(self.base.renderer, kept),
                [render(row) for row in self.guide],
                heads,
                self.config,
                lambda done, total, metrics: at(done / total),
            )
        with HeadSlices(self.base, heads, self._slices()) as slices:
            slices.load_masters(result.state)
            losses = self._losses(rendered)
        self.losses[name] = losses
        return Arm(
            control=name,
            heads=len(heads),
            rows=len(kept),
            trained_parameters=result.n_parameters,
            learning_rate=result.learning_rate,
            seconds=result.seconds,
            **self._held_against(losses, job, same=self._all_were_kept(name)),
        )

    def _all_were_kept(self, name: Control) -> bool:
        if name == "random_heads":
            return len(self.heads) == len(all_heads(self.base))
        return len(self.kept) == len(self.train)

    def _lora(self, rendered: Sequence[RenderedRow], job: RowLosses) -> Arm:
        rows, guide = (RenderedRows(self.base.renderer, rows) for rows in (self.train, self.guide))
        with ExitStack() as stack:
            with self._course.part(self.cost.lora) as at:
                trained = stack.enter_context(lora_control(self.base, rows, guide, self.config, at))
            losses = self._losses(rendered)
        self.losses["lora"] = losses
        return Arm(
            control="lora",
            heads=0,
            rows=len(rows),
            **asdict(trained),
            **self._held_against(losses, job),
        )

    def _held_against(self, control: RowLosses, job: RowLosses, *, same: bool = False) -> dict[str, Any]:
        """Args: same: whether the control trained what the job did, so that a difference is only that of another order."""
        change = paired_bootstrap(control, job, seed=self.config.training.seed)
        return {"loss": control.mean, "against_job": change, "verdict": "no comparison" if same else change.verdict}

    def _slices(self) -> Sequence[Projection]:
        assert self.config.training.slices != "auto", "resolve the config first"
        return self.config.training.slices

    def _baselines(self) -> tuple[Baseline, Baseline]:
        settings = self.config.training
        rendered = RenderedRows(self.base.renderer, self.train)
        with self._course.part(BASELINE_STEPS * self.cost.full_step) as at:
            full = project_full_fine_tuning(self.base, rendered, settings, on_step=_ticks(BASELINE_STEPS, at))
        with self._course.part(BASELINE_STEPS * self.cost.lora_step) as at:
            lora = project_lora(self.base, rendered, settings, on_step=_ticks(BASELINE_STEPS, at))
        return full, lora


def _ticks(total: int, at: Callable[[float], None]) -> Callable[[], None]:
    """Tells the share that is done when called `total` times."""
    counted = itertools.count(1)
    return lambda: at(next(counted) / total)


def random_heads(base: BaseModel, config: JobConfig, parameters: int, rng: random.Random) -> list[Head]:
    """Heads at random, as many as come nearest to this number of trained weights.

    Heads of one KV group share its slices, so sets of equal head count differ in parameters.
    """
    assert config.training.slices != "auto", "resolve the config first"
    order = all_heads(base)
    rng.shuffle(order)
    best, miss = order[:1], float("inf")
    for count in range(1, len(order) + 1):
        size = slice_weights(base.info, order[:count], config.training.slices)
        if abs(size - parameters) < miss:
            best, miss = order[:count], abs(size - parameters)
        if size > parameters:
            break
    return best
