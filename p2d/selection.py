"""Stage 2, second half: which rows to keep. Arithmetic on the response matrix, no model and no torch.

score of a row = sum over the chosen heads of the row's responses, combined with the row's quality as the scorer says;
the top `ceil(ratio * rows)` are kept, ties by row order. Another head set costs no model pass, nor another ratio, but where it was
left open: then a sample may be all that was scored, and as many rows are kept as seem to be good.

Where the scorer has rated the guide's rows, too (`combine: guide`), they are the measure: a row that is as good as most of them is
as good as any, and among those rows chance decides; only behind them comes the score. What is scored best is alike and easy, and
trains worse than rows drawn at random from a clean pool (docs/decisions/0031). Where the pool as a whole scores like the guide,
there is nothing to leave out, and chance decides among all rows (docs/decisions/0033).

Where rows pass or do not (`combine: pass`), those that pass are good enough, all alike, and as many are kept if that was left open.

A row that nearly repeats a better-scored one (`p2d.near_duplicates`) ranks behind all scored rows that do not: nothing is left
out, but what a model has seen once is kept only where nothing new is left. Not so with scores by `random` and `uniform`: nothing is
chosen by them, by score or by text.

Three things a cheap scoring may leave out, and what then holds:
- for each chosen head in a layer that was not scored, the mean of all scored heads stands in;
- a row of a shard that was taken to be like the guide by a sample of it is as good as any: chance decides (docs/decisions/0034),
  unless it was left out of that because it does not read like the guide's (docs/decisions/0037): then it has no score;
- any other row that was not scored (fast mode's pool) has no score, ranks behind all that have one, and is never kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2d.config import DEFAULT_RATIO, MIN_GUIDE, RANKING_NOTHING, RATING_SCORERS, Auto, top_count
from p2d.errors import ConfigError, EngineError, ErrorDetail
from p2d.guide_scale import BAR, LIKE_GUIDE, Floats, GuideScale, bar_of, columns, guide_scale, outscored, summed
from p2d.near_duplicates import repetitions
from p2d.response_matrix import ALONE, Combine, ResponseShard
from p2d.rows import Row

Ints = npt.NDArray[np.int64]


MISJUDGED = 1.2
"""How many times as many rows as seem good may be kept without a word: the estimate's own error (docs/decisions/0034)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """A score for every scored row, and the view that a ratio takes of it."""

    score_R: Floats
    """NaN where the row was neither scored nor trusted."""
    quality_R: Floats | None
    """NaN where the row was not scored."""
    rank_R: Ints
    """0 = best; behind all others those that repeat a better row, then rows that were not scored, in row order."""
    repeats_R: Ints
    """The better-scored row that a row nearly repeats, -1 where there is none; that one repeats none."""
    kept: int
    scored: int
    """Rows that were scored."""
    trusted: int
    """Rows that were not, and are taken to be like the guide, as a sample of their shard was."""
    unlike: int
    """Rows that were not, for they do not read like the guide's."""
    scorer: str
    combine: Combine
    heads: int
    """Chosen heads."""
    heads_scored: int
    """Those among them that have responses of their own; for the others the mean of all scored heads stood in. 0 where the
    scorer looks at no head (`quality`, `pass`)."""
    bar: float | None
    """Score from which on a row is as good as most of the guide's, or passes; None where nothing says what is good enough."""
    like_guide: bool
    """Whether the pool as a whole scores like the guide, so that every row is good enough."""
    seem_good: int | None
    """How many rows seem to be like the guide's, or pass, repetitions left out; None where nothing says what is good enough."""

    @property
    def good_enough(self) -> int | None:
        """Rows among which chance decides, repetitions among them; None where there is no bar."""
        return None if self.bar is None else int((self.score_R >= self.bar).sum())

    @property
    def kept_rows(self) -> list[int]:
        """Indices of the kept rows, in row order."""
        return [int(row) for row in np.flatnonzero(self.rank_R < self.kept)]


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectionSummary:
    """What the report says about a selection; holds no row text."""

    rows: int
    scored: int
    """Rows that were scored; fewer than `rows` in fast mode, where the others could not be kept, or where some are `trusted` or
    `unlike`."""
    trusted: int
    """Rows that were not scored and could be kept, for a random sample of them was like the held-out rows."""
    unlike: int
    """Rows that were not scored and could not be kept, for by their words they are not like the held-out rows."""
    kept: int
    repeating: int
    """Scored rows that nearly repeat a better one, and so rank behind those that do not."""
    kept_repeating: int
    """Those among the kept: more than 0 only where all other scored rows are kept."""
    scorer: str
    combine: Combine
    heads: int
    heads_scored: int
    """Chosen heads that have responses, see `Selection`."""
    good_enough: int | None
    """Rows among which chance decided, see `Selection`."""
    like_guide: bool
    """Whether these are all, for the pool as a whole scores like the held-out rows."""
    seem_good: int | None
    """How many rows seem to be like the held-out ones, or pass, see `Selection`."""
    score_quantiles: list[float]
    """Of all rows that have a score: minimum, quarter, median, three quarters, maximum."""
    kept_score_min: float
    warnings: list[str]
    """What a user should know of the selection."""


def select_rows(
    shards: Iterable[ResponseShard],
    heads: Sequence[tuple[int, int]],
    ratio: float | Auto,
    rows: Sequence[Row],
    *,
    seed: int,
    guide_apart: bool = False,
) -> Selection:
    """Score every scored row by what the chosen heads respond, and keep the best that do not repeat a better one.

    Args:    shards: all of one matrix, in row order; each is asked for once and let go. heads: (layer, head) pairs.
             ratio: share of all rows kept, (0, 1]; `auto` = as many as seem to be like the guide's, or pass, but a tenth at least.
             rows: those of the matrix. seed: draws among rows that are good enough.
             guide_apart: whether the guide's rows are of another dataset than the pool's. Rows held out of the pool itself are
             always like it, however bad it is, which says nothing.
    Raises:  EngineError if a score is not finite; ConfigError (`config.invalid`) if no row has one.
    """
    matrix = _gathered(shards, heads, rows)
    score, place_R, scale = matrix.score, matrix.row_R, matrix.scale
    score_R = _spread(score, place_R, len(rows))
    like_guide = False
    if scale is not None:
        doubted = score[~matrix.sampled]
        none_doubted = not len(doubted) or outscored(scale.score_G, doubted) <= LIKE_GUIDE
        like_guide = guide_apart and not matrix.unlike and none_doubted
        good_R = np.concatenate([place_R[(score >= scale.bar) | matrix.sampled | like_guide], matrix.trusted_R])
        score_R[good_R] = scale.bar + _draws(len(rows), seed)[good_R]
    elif matrix.how == "pass":
        score_R += _draws(len(rows), seed)
    repeats_R = np.full(len(rows), -1, dtype=np.int64)
    if matrix.scorer not in RANKING_NOTHING:
        best_first = np.argsort(-score_R, kind="stable")[: len(place_R) + len(matrix.trusted_R)]  # NaN comes last
        repeats_R[best_first] = repetitions(rows, best_first)
    seem_good = _count_good(matrix, repeats_R, every=like_guide)
    if ratio == "auto":
        assert seem_good is not None, "nothing says how many are good"
        kept = max(seem_good, top_count(DEFAULT_RATIO, len(rows)))
    else:
        kept = top_count(ratio, len(rows))
    return Selection(
        score_R=score_R,
        quality_R=None if matrix.quality is None else _spread(matrix.quality, place_R, len(rows)),
        rank_R=_places(np.lexsort((-score_R, _class(score_R, repeats_R)))),
        repeats_R=repeats_R,
        kept=min(kept, len(place_R) + len(matrix.trusted_R)),
        scored=len(place_R),
        trusted=len(matrix.trusted_R),
        unlike=matrix.unlike,
        scorer=matrix.scorer,
        combine=matrix.how,
        heads=len(heads),
        heads_scored=matrix.heads_scored,
        bar=matrix.bar,
        like_guide=like_guide,
        seem_good=seem_good,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Matrix:
    """What all shards say of their rows."""

    row_R: Ints
    """The scored rows, ascending."""
    score: Floats
    """Of each, before chance decides among the good ones."""
    quality: Floats | None
    sampled: npt.NDArray[np.bool_]
    """Whether each stands for a shard that was taken to be like the guide."""
    trusted_R: Ints
    """The other rows of those shards."""
    unlike: int
    """How many others there did not read like the guide's and were not scored."""
    scale: GuideScale | None
    how: Combine
    scorer: str
    heads_scored: int

    @property
    def bar(self) -> float | None:
        """Score from which on a row is good enough."""
        return bar_of(self.scale, self.how)


def _gathered(shards: Iterable[ResponseShard], heads: Sequence[tuple[int, int]], rows: Sequence[Row]) -> _Matrix:
    sums, qualities, places, sampled, trusted, unlike = [], [], [], [], [], 0
    ways: set[Combine] = set()
    shard = None
    for shard in shards:
        ways.add(shard.combine)
        sums.append(summed(shard.response_RN, shard, heads))
        places.append(shard.row_R)
        sampled.append(shard.sample_R)
        trusted.append(shard.trusted_R)
        if shard.unlike_R is not None:
            unlike += len(np.setdiff1d(shard.unlike_R, shard.row_R))
        if shard.quality_R is not None:
            qualities.append(shard.quality_R)
    assert shard is not None
    assert shard.span.stop == len(rows), "the matrix is of other rows"
    row_R = np.concatenate(places)
    quality = np.concatenate(qualities).astype(np.float64) if qualities else None
    # Of shards of two versions only what both know counts.
    scale, how = (guide_scale(shard, heads), shard.combine) if len(ways) == 1 else (None, "worse_rank")
    score = combine(np.concatenate(sums), quality, how, scale)
    bad = row_R[~np.isfinite(score)]
    if len(bad):
        raise EngineError(f"The scores of {len(bad)} rows are not finite.", rows=[int(row) for row in bad[:20]])
    if not len(row_R):
        text = (
            f"{shard.scorer!r} could score no row: each fills the model's context without room for another beside it."
        )
        raise ConfigError(text, errors=[ErrorDetail(code="config.scorer", message=text, pointer="/data/scorer")])
    return _Matrix(
        row_R=row_R,
        score=score,
        quality=quality,
        sampled=np.concatenate(sampled),
        trusted_R=np.concatenate(trusted),
        unlike=unlike,
        scale=scale,
        how=how,
        scorer=shard.scorer,
        heads_scored=len(columns(shard, heads)),
    )


def _count_good(matrix: _Matrix, repeats_R: Ints, *, every: bool) -> int | None:
    """How many rows seem to be like the guide's, or pass, those that repeat another left out; None where nothing says so.

    Of rows like the guide's a share of 1 - BAR reaches the bar, and of bad ones hardly any: so many times more are good than do.
    The estimate of Storey (2002, A direct approach to false discovery rates), with the guide's scores as the null distribution. Too
    high by bad rows that reach the bar; too low by 1 % with 32 guide rows and 4 % with 8, for the bar is an interpolated quantile.
    """
    if (bar := matrix.bar) is None:
        return None
    fresh, doubted = repeats_R[matrix.row_R] < 0, ~(matrix.sampled | every)
    if matrix.scale is None:
        return int((fresh & (matrix.score >= bar)).sum())
    taken = int((fresh & ~doubted).sum()) + int((repeats_R[matrix.trusted_R] < 0).sum())
    reach = int((fresh & doubted & (matrix.score >= bar)).sum())
    return taken + min(int((fresh & doubted).sum()), math.ceil(reach / (1 - BAR)))


def _draws(rows: int, seed: int) -> Floats:
    """A number in [0, 1) for every row, each another one."""
    return np.random.default_rng([seed, rows]).permutation(rows) / rows


def _spread(value_R: Floats, place_R: npt.NDArray[np.int64], rows: int) -> Floats:
    """Values of scored rows as values of all rows, NaN elsewhere."""
    spread_R = np.full(rows, np.nan)
    spread_R[place_R] = value_R
    return spread_R


def combine(response_R: Floats, quality_R: Floats | None, how: Combine, scale: GuideScale | None = None) -> Floats:
    """One score per row from the heads' response and the row's quality; higher is better. scale: of `guide`."""
    if how == "response":
        return response_R
    assert quality_R is not None
    if how in ALONE:
        return quality_R
    if how == "product":
        return response_R * quality_R
    if how == "guide":
        assert scale is not None
        return scale.scores(response_R, quality_R)
    assert how == "worse_rank", "ranks are not averaged any more"
    rows = len(response_R)
    both_2R = np.stack([ranks(-response_R), ranks(-quality_R)])
    # The better rank decides between rows whose worse one is the same, and can be read off the score again.
    score_R: Floats = rows - 1 - (both_2R.max(axis=0) + both_2R.min(axis=0) / rows)
    return score_R


def ranks(values_R: Floats) -> Ints:
    """Rank of each value, 0 = smallest; ties by row order."""
    return _places(np.argsort(values_R, kind="stable"))


def _places(order_R: npt.NDArray[np.intp]) -> Ints:
    """The place of each row in an order of rows."""
    place_R = np.empty(len(order_R), dtype=np.int64)
    place_R[order_R] = np.arange(len(order_R))
    return place_R


def _class(score_R: Floats, repeats_R: Ints) -> npt.NDArray[np.int8]:
    """What ranks before any score: 0 = scored, 1 = scored but a repetition, 2 = not scored."""
    return np.where(np.isnan(score_R), 2, repeats_R >= 0).astype(np.int8)


def summarise(selection: Selection) -> SelectionSummary:
    """The facts of a selection for the report."""
    kept_R = selection.rank_R < selection.kept
    kept_repeating = int((selection.repeats_R[kept_R] >= 0).sum())
    return SelectionSummary(
        rows=len(selection.score_R),
        scored=selection.scored,
        trusted=selection.trusted,
        unlike=selection.unlike,
        kept=selection.kept,
        repeating=int((selection.repeats_R >= 0).sum()),
        kept_repeating=kept_repeating,
        scorer=selection.scorer,
        combine=selection.combine,
        heads=selection.heads,
        heads_scored=selection.heads_scored,
        good_enough=selection.good_enough,
        like_guide=selection.like_guide,
        seem_good=selection.seem_good,
        score_quantiles=[float(q) for q in np.nanquantile(selection.score_R, [0, 0.25, 0.5, 0.75, 1])],
        kept_score_min=float(selection.score_R[kept_R].min()),
        warnings=[]
        if selection.kept == selection.scored + selection.trusted and not selection.unlike
        else _warnings(selection, kept_R, kept_repeating),
    )


def _warnings(selection: Selection, kept_R: npt.NDArray[np.bool_], kept_repeating: int) -> list[str]:
    """What is worth knowing of a choice; where all scored rows are kept there was none."""
    return [
        *_tie_warning(selection, kept_R),
        *_guide_warning(selection),
        *_number_warning(selection, kept_repeating),
        *_repetition_warning(selection, kept_repeating),
    ]


def _tie_warning(selection: Selection, kept_R: npt.NDArray[np.bool_]) -> list[str]:
    class_R = _class(selection.score_R, selection.repeats_R)
    last = int(np.flatnonzero(selection.rank_R == selection.kept - 1)[0])
    equal_R = (selection.score_R == selection.score_R[last]) & (class_R == class_R[last])
    tied, chosen = int(equal_R.sum()), int((equal_R & kept_R).sum())
    if tied == chosen:
        return []
    return [
        f"{tied} rows share the score at which the selection ends. The {chosen} of them that stand first in the data were kept: "
        "that part of the choice says nothing about the rows."
    ]


def _guide_warning(selection: Selection) -> list[str]:
    if selection.combine != "worse_rank" or selection.scorer not in RATING_SCORERS:
        return []
    return [
        f"Too few held-out rows guide the choice to say what is good enough: {MIN_GUIDE} are needed. The best-scored rows were "
        "kept, which of clean data may be worth less than random ones. More held-out rows mend that."
    ]


def _number_warning(selection: Selection, kept_repeating: int) -> list[str]:
    fresh = selection.kept - kept_repeating
    if selection.seem_good is None or fresh <= MISJUDGED * selection.seem_good:
        return []
    what = (
        "have answers that go with their prompts"
        if selection.combine == "pass"
        else "seem to be like the held-out ones"
    )
    return [
        f"About {selection.seem_good} rows {what}, and {fresh} that repeat no other were kept: the others may be bad. A smaller "
        "ratio leaves them out."
    ]


def _repetition_warning(selection: Selection, repeated: int) -> list[str]:
    if not repeated:
        return []
    return [
        f"{repeated} of the {selection.kept} kept rows nearly repeat a better one: there were not enough others. A smaller ratio "
        "leaves them out."
    ]
