"""Operations that the steps `heads` and `train` spent, from the facts that their results tell; see `p2d.flops`.

Data scorers count their own: only they know which passes they made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from p2d import flops
from p2d.config import JobConfig, epochs_of, proxy_count, proxy_guide_rows
from p2d.flops import Work
from p2d.head_maps import HeadMap
from p2d.identify import half_proxies
from p2d.learning_rates import judged_rows
from p2d.models import BaseModel
from p2d.optimization import steps_per_epoch
from p2d.rendering import RenderedRow
from p2d.rows import Row
from p2d.scorers import WITH_GRADIENTS
from p2d.slices import Head, all_heads
from p2d.training import TrainingResult


def work_of_rendered(base: BaseModel, rows: Sequence[RenderedRow]) -> Work:
    """One pass over rows, each by itself with its prefix."""
    return flops.work_of((base.renderer.length(row), len(row.answer_ids)) for row in rows)


def proxy_flops(
    base: BaseModel, rows: Sequence[Row], guide: Sequence[Row], config: JobConfig, head_map: HeadMap
) -> float:
    """Training both half-proxies and looking at guide rows; how often was looked follows from the tokens passed.

    A half that was trained again at a lower rate is counted as looks of as many tokens: exact for scorers that look with
    gradients, too little for the others.
    """
    if head_map.proxy is None:
        return 0.0
    assert config.training.slices != "auto", "resolve the config first"
    halves = half_proxies(len(rows), proxy_count(config.heads), config.training.seed)
    trained = work_of_rendered(base, [base.renderer.render(rows[index]) for half in halves for index in half])
    judging = guide[: proxy_guide_rows(proxy_count(config.heads), len(guide))]
    looked = work_of_rendered(base, [base.renderer.render(row) for row in judging])
    looks = looked.times((head_map.proxy.tokens - trained.tokens) / looked.tokens)
    heads, slices = all_heads(base), config.training.slices
    if config.heads.scorer in WITH_GRADIENTS:
        return flops.slice_training(base.info, trained + looks, heads=heads, projections=slices)
    return flops.slice_training(base.info, trained, heads=heads, projections=slices) + flops.forward(base.info, looks)


def training_flops(
    base: BaseModel,
    rows: Sequence[RenderedRow],
    guide: Sequence[RenderedRow],
    heads: Sequence[Head],
    config: JobConfig,
    result: TrainingResult,
) -> tuple[float, float]:
    """All epochs, all trials of the search, and every look at held-out rows; and of these the trials with their looks.

    Remembered layers are counted once for each row, whether or not there was room to keep what they gave, and not to the search.
    """
    settings, below = config.training, result.remembered_below
    slices = settings.slices
    assert slices != "auto", "resolve the config first"

    def passed(trained: Work, looked: Work) -> float:
        training = flops.slice_training(base.info, trained, heads=heads, projections=slices, cached=below > 0)
        return training + flops.forward(base.info, looked, from_layer=below)

    whole = work_of_rendered(base, rows)
    trial_epochs = sum(trial.steps for trial in result.trials) / steps_per_epoch(len(rows), settings.batch_size)
    watched = work_of_rendered(base, guide[: result.watched_rows]).times(len(result.watched))
    judged = work_of_rendered(base, guide[: judged_rows(len(rows), len(guide))]).times(len(result.trials))
    search = passed(whole.times(trial_epochs), judged)
    total = search + passed(whole.times(epochs_of(settings)), watched)
    if below:
        seen = max(result.watched_rows, judged_rows(len(rows), len(guide)) if result.trials else 0)
        once = whole + work_of_rendered(base, guide[:seen])
        total += flops.forward(base.info, replace(once, logits=0), to_layer=below)
    return total, search
