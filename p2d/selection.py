"""Stage 2, second half: which rows to keep. Arithmetic on the response matrix, no model and no torch.

score of a row = sum over the chosen heads of the row's responses, combined with the row's quality as the scorer says;
the top `ceil(ratio * rows)` are kept, ties by row order. Another head set or ratio costs no model pass.

Where the scorer has rated the guide's rows, too (`combine: guide`), they are the measure: a row that is as good as most of them is
as good as any, and among those rows chance decides; only behind them comes the score. What is scored best is alike and easy, and
trains worse than rows drawn at random from a clean pool (docs/decisions/0031). Where the pool as a whole scores like the guide,
there is nothing to leave out, and chance decides among all rows (docs/decisions/0033).

A row that nearly repeats a better-scored one (`p2d.near_duplicates`) ranks behind all scored rows that do not: nothing is left
out, but what a model has seen once is kept only where nothing new is left. Not so with scores by `random`, which are a control:
chosen for nothing, by score or by text.

Two things a cheap scoring may leave out, and what then holds:
- for each chosen head in a layer that was not scored, the mean of all scored heads stands in;
- a row that was not scored (fast mode's pool) has no score, ranks behind all that have one, and is never kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p2d.config import MIN_GUIDE, RATING_SCORERS, top_count
from p2d.errors import ConfigError, EngineError, ErrorDetail
from p2d.near_duplicates import repetitions
from p2d.response_matrix import Combine, ResponseShard, median_and_spread
from p2d.row_files import RowFile, line_starts
from p2d.row_keys import RowKeys
from p2d.rows import Row, stored_row, turns_json

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

CONTROL = "random"
"""The data scorer of which nothing is chosen by text either."""

BAR = 0.4
"""Quantile of the guide's own scores from which on a row is good enough: 57 to 74 % of clean rows are. Of half-bad pools 0 to 5 %
of all such rows are bad, not counting wrong numbers, which nothing sees. With 0.25 three quarters and more of the clean rows are
good enough, and twice as many bad ones where the guide is not clean itself (docs/LOG.md)."""


LIKE_GUIDE = 0.58
"""Most that the guide's rows may outscore the pool's (`outscored`; 0.5 = not at all) where the pool is taken to be like them. With
32 guide rows clean pools are in 95 to 100 % of the draws, pools of which 30 % is bad in 0 to 8 %, half-bad ones in none
(docs/LOG.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuideScale:
    """What the guide's rows have of a row's two parts, by which all rows are measured."""

    response_G: Floats
    quality_G: Floats
    response_median: float
    response_spread: float
    quality_median: float
    quality_spread: float

    @property
    def score_G(self) -> Floats:
        """The guide's own scores, [guide rows]."""
        return self.scores(self.response_G, self.quality_G)

    @property
    def bar(self) -> float:
        """Score from which on a row is good enough."""
        return float(np.quantile(self.score_G, BAR))

    def scores(self, response_R: Floats, quality_R: Floats) -> Floats:
        """The lesser of response and quality, each in spreads from the guide's median, [R]."""
        by_response = (response_R - self.response_median) / self.response_spread
        return np.minimum(by_response, (quality_R - self.quality_median) / self.quality_spread)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """A score for every scored row, and the view that a ratio takes of it."""

    score_R: Floats
    """NaN where the row was not scored."""
    quality_R: Floats | None
    """The same."""
    rank_R: Ints
    """0 = best; behind all others those that repeat a better row, then rows that were not scored, in row order."""
    repeats_R: Ints
    """The better-scored row that a row nearly repeats, -1 where there is none; that one repeats none."""
    kept: int
    scored: int
    """Rows that were scored."""
    scorer: str
    combine: Combine
    heads: int
    """Chosen heads."""
    heads_scored: int
    """Those among them that have responses of their own; for the others the mean of all scored heads stood in. 0 where the
    scorer looks at no head (`quality`)."""
    bar: float | None
    """Score from which on a row is as good as most of the guide's; None where the guide was not rated."""
    like_guide: bool
    """Whether the pool as a whole scores like the guide, so that every row is good enough."""

    @property
    def good_enough(self) -> int | None:
        """Scored rows among which chance decides, repetitions among them; None where there is no bar."""
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
    """Rows that were scored; fewer than `rows` in fast mode, where the others could not be kept."""
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
    """Scored rows among which chance decided, see `Selection`."""
    like_guide: bool
    """Whether these are all, for the pool as a whole scores like the held-out rows."""
    score_quantiles: list[float]
    """Of all scored rows: minimum, quarter, median, three quarters, maximum."""
    kept_score_min: float
    warnings: list[str]
    """What a user should know of the selection."""


def select_rows(
    shards: Iterable[ResponseShard],
    heads: Sequence[tuple[int, int]],
    ratio: float,
    rows: Sequence[Row],
    *,
    seed: int,
    guide_apart: bool = False,
) -> Selection:
    """Score every scored row by what the chosen heads respond, and keep the best that do not repeat a better one.

    Args:    shards: all of one matrix, in row order; each is asked for once and let go. heads: (layer, head) pairs.
             ratio: share of all rows kept, (0, 1]. rows: those of the matrix. seed: draws among rows that are good enough.
             guide_apart: whether the guide's rows are of another dataset than the pool's. Rows held out of the pool itself are
             always like it, however bad it is, which says nothing.
    Raises:  EngineError if a score is not finite; ConfigError (`config.invalid`) if no row has one.
    """
    sums: list[Floats] = []
    qualities: list[npt.NDArray[np.float32]] = []
    places: list[npt.NDArray[np.int64]] = []
    ways: set[Combine] = set()
    shard = None
    for shard in shards:
        ways.add(shard.combine)
        sums.append(_summed(shard.response_RN, shard, heads))
        places.append(shard.row_R)
        if shard.quality_R is not None:
            qualities.append(shard.quality_R)
    assert shard is not None
    assert shard.span.stop == len(rows), "the matrix is of other rows"
    place_R = np.concatenate(places)
    quality = np.concatenate(qualities).astype(np.float64) if qualities else None
    # Of shards of two versions only what both know counts.
    scale, how = (guide_scale(shard, heads), shard.combine) if len(ways) == 1 else (None, "worse_rank")
    score = combine(np.concatenate(sums), quality, how, scale)
    bad = place_R[~np.isfinite(score)]
    if len(bad):
        raise EngineError(f"The scores of {len(bad)} rows are not finite.", rows=[int(row) for row in bad[:20]])
    if not len(place_R):
        text = (
            f"{shard.scorer!r} could score no row: each fills the model's context without room for another beside it."
        )
        raise ConfigError(text, errors=[ErrorDetail(code="config.scorer", message=text, pointer="/data/scorer")])
    like_guide = scale is not None and guide_apart and outscored(scale.score_G, score) <= LIKE_GUIDE
    if scale is not None:
        good = (score >= scale.bar) | like_guide
        score[good] = scale.bar + _draws(len(rows), seed)[place_R[good]]
    score_R = _spread(score, place_R, len(rows))
    repeats_R = np.full(len(rows), -1, dtype=np.int64)
    if shard.scorer != CONTROL:
        best_first = place_R[np.argsort(-score, kind="stable")]
        repeats_R[best_first] = repetitions(rows, best_first)
    return Selection(
        score_R=score_R,
        quality_R=None if quality is None else _spread(quality, place_R, len(rows)),
        rank_R=_places(np.lexsort((-score_R, _class(score_R, repeats_R)))),
        repeats_R=repeats_R,
        kept=min(top_count(ratio, len(rows)), len(place_R)),
        scored=len(place_R),
        scorer=shard.scorer,
        combine=how,
        heads=len(heads),
        heads_scored=len(_columns(shard, heads)),
        bar=None if scale is None else scale.bar,
        like_guide=like_guide,
    )


def _draws(rows: int, seed: int) -> Floats:
    """A number in [0, 1) for every row, each another one."""
    return np.random.default_rng([seed, rows]).permutation(rows) / rows


def guide_scale(shard: ResponseShard, heads: Sequence[tuple[int, int]]) -> GuideScale | None:
    """What the guide's rows have with these heads; None where the scorer has not rated them."""
    if shard.guide_response_GN is None or shard.guide_quality_G is None:
        return None
    response_G = _summed(shard.guide_response_GN, shard, heads)
    quality_G = shard.guide_quality_G.astype(np.float64)
    (response, response_spread), (quality, quality_spread) = map(median_and_spread, (response_G, quality_G))
    return GuideScale(
        response_G=response_G,
        quality_G=quality_G,
        response_median=response,
        response_spread=response_spread or 1.0,  # rows that are all alike
        quality_median=quality,
        quality_spread=quality_spread or 1.0,
    )


def outscored(score_G: Floats, score_R: Floats) -> float:
    """How often a row of the guide scores above a row of the pool, ties half: Mann and Whitney's U over all pairs."""
    sorted_R = np.sort(score_R)
    below_G = np.searchsorted(sorted_R, score_G, side="left") + np.searchsorted(sorted_R, score_G, side="right")
    return float(below_G.mean() / (2 * len(score_R)))


def _columns(shard: ResponseShard, heads: Sequence[tuple[int, int]]) -> npt.NDArray[np.intp]:
    """Columns of the chosen heads that were scored."""
    first = shard.layers.start
    scored = [(layer - first) * shard.n_heads + head for layer, head in heads if layer in shard.layers]
    return np.array(scored, dtype=np.intp)


def _summed(response_RN: npt.NDArray[np.float16], shard: ResponseShard, heads: Sequence[tuple[int, int]]) -> Floats:
    """Responses of the chosen heads added up, [R]. float64: fp16 values of 27 heads added in fp16 would tie."""
    columns = _columns(shard, heads)
    response_R: Floats = response_RN[:, columns].sum(axis=1, dtype=np.float64)
    if (missing := len(heads) - len(columns)) and len(shard.layers):
        response_R += missing * response_RN.mean(axis=1, dtype=np.float64)
    return response_R


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
    if how == "quality":
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
        kept=selection.kept,
        repeating=int((selection.repeats_R >= 0).sum()),
        kept_repeating=kept_repeating,
        scorer=selection.scorer,
        combine=selection.combine,
        heads=selection.heads,
        heads_scored=selection.heads_scored,
        good_enough=selection.good_enough,
        like_guide=selection.like_guide,
        score_quantiles=[float(q) for q in np.nanquantile(selection.score_R, [0, 0.25, 0.5, 0.75, 1])],
        kept_score_min=float(selection.score_R[kept_R].min()),
        warnings=[] if selection.kept == selection.scored else _warnings(selection, kept_R, kept_repeating),
    )


def _warnings(selection: Selection, kept_R: npt.NDArray[np.bool_], kept_repeating: int) -> list[str]:
    """What is worth knowing of a choice; where all scored rows are kept there was none."""
    return [
        *_tie_warning(selection, kept_R),
        *_guide_warning(selection),
        *_bar_warning(selection, kept_R),
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


def _bar_warning(selection: Selection, kept_R: npt.NDArray[np.bool_]) -> list[str]:
    if selection.bar is None:
        return []
    below = int((selection.score_R[kept_R] < selection.bar).sum())
    if not below:
        return []
    return [
        f"{below} of the {selection.kept} kept rows are less good than {1 - BAR:.0%} of the held-out rows: there were not enough "
        "others. A smaller ratio leaves them out."
    ]


def _repetition_warning(selection: Selection, repeated: int) -> list[str]:
    if not repeated:
        return []
    return [
        f"{repeated} of the {selection.kept} kept rows nearly repeat a better one: there were not enough others. A smaller ratio "
        "leaves them out."
    ]


# --- selection.jsonl -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SelectedRow:
    """One line of selection.jsonl."""

    row: int
    line: int
    """Line of the user's file."""
    score: float | None
    """None where the row was not scored, as `quality` where the scorer has none."""
    quality: float | None
    rank: int
    """0 = best."""
    kept: bool
    repeats: int | None = None
    """The better-scored row that it nearly repeats; not in files that are older than this."""
    prompt: str | None = None
    """Only of kept rows, as is `answer`."""
    answer: str | None = None
    before: Sequence[Mapping[str, str]] = ()
    """Of kept rows that are conversations: the turns before the prompt, as `p2d.rows` stores them."""

    @property
    def kept_row(self) -> Row:
        """A kept row itself."""
        return stored_row(asdict(self))


def write_selection(path: Path, selection: Selection, rows: Sequence[Row]) -> None:
    """Write selection.jsonl: a line for every row, in row order; the text only of the kept ones."""
    assert len(rows) == len(selection.score_R)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for index, row in enumerate(rows):
            kept = bool(selection.rank_R[index] < selection.kept)
            line: dict[str, Any] = {
                "row": index,
                "line": row.line,
                "score": _number(selection.score_R, index),
                "quality": _number(selection.quality_R, index),
                "rank": int(selection.rank_R[index]),
                "kept": kept,
            }
            if selection.repeats_R[index] >= 0:
                line["repeats"] = int(selection.repeats_R[index])
            if kept:
                line |= {"prompt": row.prompt, "answer": row.answer, **turns_json(row.before)}
            file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n")


def _number(value_R: Floats | None, row: int) -> float | None:
    return None if value_R is None or np.isnan(value_R[row]) else float(value_R[row])


def read_selection(path: Path) -> Iterator[SelectedRow]:
    """Stream what `write_selection` wrote."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield SelectedRow(**json.loads(line))


def check_selection(path: Path, rows: Sequence[Row]) -> None:
    """Make sure that a file is a selection over these training rows. Raises ConfigError (`config.invalid`)."""
    known = RowKeys()
    for row in rows:
        known.add(row)
    kept = strangers = 0
    try:
        for line in read_selection(path):
            kept += line.kept
            strangers += line.kept and line.kept_row not in known
    except (ValueError, TypeError):
        raise _unusable("The file is not a selection.") from None
    if strangers or not kept:
        text = (
            f"{strangers} of the {kept} rows that the selection keeps are not among the training rows: it is of another"
        )
        raise _unusable(f"{text} dataset, or of another seed, which holds other rows out.")


def _unusable(text: str) -> ConfigError:
    return ConfigError(text, errors=[ErrorDetail(code="config.selection", message=text, pointer="/data/selection")])


_KEPT = re.compile(rb'"kept"\s*:\s*true')
"""The field, without parsing the line: inside a row's text the quotes are escaped."""


def load_kept(path: Path) -> RowFile:
    """The kept rows of a selection.jsonl, in row order, each read when it is looked at."""
    starts = line_starts(path, _is_kept)
    assert starts, "a selection keeps at least one row"
    return RowFile(path, starts, _kept_row)


def _is_kept(line: bytes) -> bool:
    return _KEPT.search(line) is not None


def _kept_row(line: bytes) -> Row:
    return stored_row(json.loads(line))
