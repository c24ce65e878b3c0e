"""Find the learning rate for what is trained by a short search on held-out rows; its cost counts in the training step.

Head slices want a far higher rate than full fine-tuning, and the best one depends on which slices are trained and how
many, so no constant serves. The training loop itself is `p2d.training`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from p2d.batches import TOKEN_BUDGET, mean_answer_nll
from p2d.config import JobConfig, rank_of
from p2d.errors import Diverged, EngineError
from p2d.memory_guard import memory_guard
from p2d.models import BaseModel
from p2d.optimization import Schedule, SliceTrainer, Trainable
from p2d.pipeline import Progress
from p2d.rendering import RenderedRow

FIRST_RATE = 2e-3
"""Where the search begins for whole slices: it or its double is best of 1e-3 to 8e-3 on SmolLM2-135M (docs/LOG.md)."""
FIRST_RANK_RATE = 8e-3
"""The same for factors of a low-rank update, of 8e-3 to 3.2e-2: a product of small numbers moves less than they do."""
MAX_TRIALS = 4
MIN_RATE, MAX_RATE = 6.25e-5, 6.4e-2
"""Range of the search; below MIN_RATE even a diverging run gives up."""
MARGIN = 0.005
"""A higher rate must be better by this share of the loss: short trials flatter high rates. A guess."""


WATCH_COST = 0.1
"""Held-out rows looked at after an epoch, as a share of the epoch's cost (a forward pass costs a third of a step)."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One rate tried by the search."""

    learning_rate: float
    guide_loss: float | None
    """Held-out loss after the trial, nats per answer token; None = it diverged."""
    steps: int


@dataclass(frozen=True, slots=True)
class Searched:
    """What the trials so far have told and cost: enough to go on behind them, since what follows hangs on nothing else."""

    trials: list[Trial]
    tokens: int
    token_budget: int
    """Of a micro-batch: what is left of the given one where memory ran out."""


@dataclass(frozen=True, slots=True)
class Found:
    """The rate that the search chose."""

    learning_rate: float
    trials: list[Trial]
    tokens: int
    token_budget: int
    """Of a micro-batch: what is left of the given one where memory ran out."""

    @property
    def at_border(self) -> bool:
        """Whether the best rate is the highest or lowest tried, so that a better one may lie beyond."""
        tried = [trial.learning_rate for trial in self.trials]
        return self.learning_rate in (min(tried), max(tried))


def first_rate(rank: int | None) -> float:
    """Where the search begins."""
    return FIRST_RATE if rank is None else FIRST_RANK_RATE


def watched_rows(rows: int, guide: int) -> int:
    """Held-out rows looked at after each epoch: at most WATCH_COST of the epoch's cost, but at least 4."""
    return min(guide, max(4, int(WATCH_COST * 3 * rows)))


def judged_rows(rows: int, guide: int) -> int:
    """Held-out rows that a trial of the search is judged by."""
    return min(guide, max(8, watched_rows(rows, guide)))


def trial_steps(steps: int) -> int:
    """Steps of one trial: an eighth of the run, 4 to 16. A guess."""
    return min(steps, max(4, min(16, steps // 8)))


def search_steps(steps: int) -> int:
    """Most steps that the search takes, for progress and estimates."""
    return MAX_TRIALS * trial_steps(steps)


def find_learning_rate(
    base: BaseModel,
    trained: Trainable,
    rows: Sequence[RenderedRow],
    guide: Sequence[RenderedRow],
    config: JobConfig,
    steps: int,
    progress: Progress,
    *,
    first: float | None = None,
    known: Searched | None = None,
    on_trial: Callable[[Searched], None] = lambda searched: None,
) -> Found:
    """Try the first rate and its double; walk on in the better direction while it helps, MAX_TRIALS at most.

    Each trial starts at the base, takes the first `trial_steps` of the run's own rows under a whole schedule, and is judged
    by the loss on held-out rows. What is trained is back at its start afterwards.

    Args:   first: rate to begin with; None = that of head slices of the job's rank.
            known: trials of an earlier attempt at this very search, which are not made again.
            on_trial: told of all trials so far after each.
    Raises: EngineError without held-out rows; Diverged if every rate down to MIN_RATE diverges.
    """
    if not guide:
        raise EngineError("The learning rate cannot be searched without held-out rows.")
    judges = list(guide)[: judged_rows(len(rows), len(guide))]
    search = _Search(base, trained, rows, judges, config, steps, progress, known, on_trial)
    rate, factor = first or first_rate(rank_of(config.training)), 2.0
    best = search.trial(rate)
    if (other := search.trial(rate * 2)) < best * (1 - MARGIN):
        best, rate = other, rate * 2
    else:
        factor = 0.5
    while MIN_RATE <= rate * factor <= MAX_RATE and (len(search.trials) < MAX_TRIALS or best == math.inf):
        # Going down, a tie goes to the lower rate.
        limit = best * (1 - MARGIN) if factor > 1 else best * (1 + MARGIN)
        loss = search.trial(rate * factor)
        if loss > limit or loss == math.inf > best:
            break
        best, rate = min(best, loss), rate * factor
    if best == math.inf:
        raise Diverged(f"Training diverged at every learning rate down to {rate:.3g}.", learning_rate=rate)
    return Found(rate, search.trials, search.tokens, search.token_budget)


class _Search:
    """Runs trials and keeps what they cost."""

    def __init__(
        self,
        base: BaseModel,
        trained: Trainable,
        rows: Sequence[RenderedRow],
        guide: Sequence[RenderedRow],
        config: JobConfig,
        steps: int,
        progress: Progress,
        known: Searched | None,
        on_trial: Callable[[Searched], None],
    ) -> None:
        self._base, self._trained, self._rows, self._guide = base, trained, rows, guide
        self._config, self._steps, self._progress = config.training, trial_steps(steps), progress
        self._start = trained.masters()
        self._done = 0
        self._known, self._on_trial = known or Searched([], 0, TOKEN_BUDGET), on_trial
        self.token_budget, self.tokens = self._known.token_budget, self._known.tokens
        self.trials: list[Trial] = []

    def trial(self, learning_rate: float) -> float:
        """Held-out loss after a short run at a rate; infinite if it diverged."""
        if len(self.trials) < len(self._known.trials):
            trial = self._known.trials[len(self.trials)]
            assert trial.learning_rate == learning_rate, "the same losses lead the same way"
            self._done += trial.steps
            self.trials.append(trial)
        else:
            self.trials.append(trial := self._try(learning_rate))
            self._on_trial(Searched(list(self.trials), self.tokens, self.token_budget))
        return math.inf if trial.guide_loss is None else trial.guide_loss

    def _try(self, learning_rate: float) -> Trial:
        batch_size, seed = self._config.batch_size, str(self._config.seed)
        trainer = SliceTrainer(
            self._base, self._trained, self._rows, batch_size=batch_size, seed=seed, token_budget=self.token_budget
        )
        loss: float | None
        try:
            for _ in range(self._steps):
                log = trainer.advance(Schedule(learning_rate, self._steps))
                self.tokens += log.tokens
                self._done += 1
                self._progress(self._done, 0, {"loss": log.loss, "trial_learning_rate": learning_rate})
            with memory_guard("looking at held-out rows"):
                loss = mean_answer_nll(self._base, self._guide, token_budget=trainer.token_budget)
            loss = loss if math.isfinite(loss) else None
        except Diverged:
            loss = None
        finally:
            self.token_budget = trainer.token_budget
            self._trained.load_masters(self._start)
        return Trial(learning_rate, loss, trainer.step)
