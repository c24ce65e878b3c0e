"""Figures about a row add up to its score, whatever the score is made of; a ratio is a view of the same ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2d.response_matrix import Combine, ResponseShard, load_shard, save_shard
from p2d.rows import Row
from p2d.selection import select_rows
from p2d.selection_file import write_selection
from p2d.selection_reasons import TRUSTED, UNLIKE, RowReason, explain
from p2d.selection_table import SelectionTable, read_table

LAYERS, HEADS, ROWS = 6, 4, 60
CHOSEN = [(1, 2), (5, 3), (4, 0), (3, 1), (5, 0)]
TEXTS = [Row(f"p{i}", f"a{i}", i + 10) for i in range(ROWS)]


def shards(combine: Combine, seed: int, *, layers: range = range(LAYERS), pool: bool = False) -> list[ResponseShard]:
    """Two shards of random numbers; in a pool every third row was scored."""
    chance = np.random.default_rng(seed)
    # Half a unit lower, that some rows reach it.
    guide_GN = chance.normal(size=(9, len(layers) * HEADS)).astype(np.float16) - np.float16(0.5)
    guide_quality_G = chance.normal(size=9).astype(np.float32) - np.float32(0.5)
    made = []
    for span in (range(25), range(25, ROWS)):
        row_R = np.array([row for row in span if not pool or row % 3 == 0], dtype=np.int64)
        made.append(
            ResponseShard(
                span=span,
                row_R=row_R,
                layers=layers,
                n_heads=HEADS,
                response_RN=chance.normal(size=(len(row_R), len(layers) * HEADS)).astype(np.float16),
                quality_R=None if combine == "response" else chance.normal(size=len(row_R)).astype(np.float32),
                guide_response_GN=guide_GN if combine == "guide" else None,
                guide_quality_G=guide_quality_G if combine == "guide" else None,
                scorer="alignment",
                combine=combine,
            )
        )
    return made


def table_of(folder: Path, made: list[ResponseShard], ratio: float = 0.2) -> SelectionTable:
    path = folder / "selection.jsonl"
    write_selection(path, select_rows(made, CHOSEN, ratio, TEXTS, seed=0), TEXTS)
    return read_table(path.read_bytes().removesuffix(b"\n").split(b"\n"))


def added_up(reason: RowReason, table: SelectionTable, row: int, *, all_drawn: bool = False) -> float:
    response = sum(head.response for head in reason.heads) + reason.stand_ins * reason.stand_in
    if reason.guide is not None and reason.quality is not None:
        guide = reason.guide
        by_response = (response - guide.response_median) / guide.response_spread
        own = min(by_response, (reason.quality - guide.quality_median) / guide.quality_spread)
        if own < guide.bar and not all_drawn:
            return own
        drawn = float(table.score_R[row])
        assert guide.bar <= drawn < guide.bar + 1
        return drawn
    if reason.combine == "worse_rank":
        parts = table.rank_parts(row, reason.combine)
        return table.scored - 1 - (max(parts) + min(parts) / table.scored)
    if reason.combine == "response":
        return response
    assert reason.quality is not None
    return reason.quality if reason.combine == "quality" else response * reason.quality


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("layers", [range(LAYERS), range(4, LAYERS)], ids=["all layers", "upper third"])
@pytest.mark.parametrize("combine", ["response", "product", "guide", "worse_rank"])
def test_the_figures_of_every_row_add_up_to_its_score(
    combine: Combine, layers: range, pool: bool, tmp_path: Path, seed: int
) -> None:
    made = shards(combine, seed, layers=layers, pool=pool)
    table = table_of(tmp_path, made)
    good_enough = 0

    for shard in made:
        path = tmp_path / f"{shard.span.start}.safetensors"
        save_shard(path, shard)
        for row in shard.span:
            reason = explain(load_shard(path), row, CHOSEN)
            if reason is None:
                assert np.isnan(table.score_R[row])
                continue
            assert added_up(reason, table, row) == table.score_R[row]
            assert len(reason.heads) + reason.stand_ins == len(CHOSEN)
            assert reason.response == sum(head.response for head in reason.heads) + reason.stand_ins * reason.stand_in
            good_enough += reason.guide is not None and table.score_R[row] >= reason.guide.bar
    assert good_enough == (select_rows(made, CHOSEN, 0.2, TEXTS, seed=0).good_enough or 0)
    assert (good_enough > 0) == (combine == "guide")


def test_of_a_pool_that_is_like_the_guide_every_score_is_a_drawn_one(tmp_path: Path, seed: int) -> None:
    made = shards("guide", seed)
    # The pool's own rows: half of the pairs outscore each other, whatever is drawn.
    response_GN = np.concatenate([shard.response_RN for shard in made])
    quality_G = np.concatenate([shard.quality_R for shard in made if shard.quality_R is not None])
    like = [replace(shard, guide_response_GN=response_GN, guide_quality_G=quality_G) for shard in made]
    path = tmp_path / "selection.jsonl"
    selection = select_rows(like, CHOSEN, 0.2, TEXTS, seed=0, guide_apart=True)
    write_selection(path, selection, TEXTS)
    table = read_table(path.read_bytes().removesuffix(b"\n").split(b"\n"))

    assert selection.like_guide
    for shard in like:
        for row in shard.span:
            reason = explain(shard, row, CHOSEN)
            assert reason is not None
            assert added_up(reason, table, row, all_drawn=True) == table.score_R[row]


def test_a_row_that_was_not_scored_says_why_it_is_trusted_or_left_out() -> None:
    first = replace(shards("guide", 0, pool=True)[0], rest_like_guide=True, unlike_R=np.array([3, 4, 5]))

    reasons = {row: explain(first, row, CHOSEN) for row in (3, 4, 7)}

    assert [reason and reason.unscored for reason in reasons.values()] == [None, UNLIKE, TRUSTED]  # 3 is of the sample
    assert reasons[4] is not None
    assert (reasons[4].formula, reasons[4].heads) == (UNLIKE, ())
    assert explain(replace(first, rest_like_guide=False, unlike_R=None), 4, CHOSEN) is None


def test_the_rank_by_response_is_the_one_of_the_responses(tmp_path: Path, seed: int) -> None:
    made = shards("worse_rank", seed)
    table = table_of(tmp_path, made)
    responses = [explain(shard, row, CHOSEN) for shard in made for row in shard.span]
    sums = [reason.response for reason in responses if reason]

    assert [table.rank_parts(row, "worse_rank")[0] for row in range(ROWS)] == np.argsort(
        np.argsort(-np.array(sums), kind="stable"), kind="stable"
    ).tolist()


def test_a_selection_of_an_earlier_version_is_explained_by_the_mean_of_ranks_that_made_it(tmp_path: Path) -> None:
    row = '{"row":%d,"line":%d,"score":%s,"quality":%s,"rank":%d,"kept":false}'
    path = tmp_path / "selection.jsonl"
    path.write_text("\n".join(row % some for some in [(0, 1, 1.0, 3.0, 1), (1, 2, 1.5, 2.0, 0), (2, 3, 0.5, 1.0, 2)]))
    table = read_table(path.read_bytes().split(b"\n"))

    assert [table.rank_parts(row, "rank") for row in range(3)] == [(2, 0), (0, 1), (1, 2)]


def test_a_quality_alone_needs_no_heads(tmp_path: Path, seed: int) -> None:
    made = shards("quality", seed, layers=range(0))
    table = table_of(tmp_path, made)

    reason = explain(made[0], 3, CHOSEN)

    assert reason is not None
    assert (reason.heads, reason.stand_ins, reason.quality) == ((), 0, table.score_R[3])


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.33, 0.5, 1.0])
def test_a_ratio_keeps_the_rows_that_a_selection_of_it_keeps(
    ratio: float, pool: bool, tmp_path: Path, seed: int
) -> None:
    made = shards("response", seed, pool=pool)
    anew = select_rows(made, CHOSEN, ratio, TEXTS, seed=0)

    table = table_of(tmp_path, made, ratio=0.2)

    assert np.flatnonzero(table.rank_R < table.kept_at(ratio)).tolist() == anew.kept_rows
    assert table.kept_at(None) == table.kept_at(0.2)


def test_the_table_knows_the_place_of_every_line(tmp_path: Path, seed: int) -> None:
    table = table_of(tmp_path, shards("response", seed))
    content = (tmp_path / "selection.jsonl").read_bytes()

    lines = content.splitlines()
    assert [content[slice(*table.span(row))] for row in range(ROWS)] == lines
    assert table.line_R.tolist() == list(range(10, 10 + ROWS))
