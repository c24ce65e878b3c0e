"""Jobs side by side: sets, ranks and paired losses are what their definitions say, and what is not known stays unknown."""

from __future__ import annotations

import csv
import io
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from p2d.comparison import AXIS, GROUPS, Facts, RowLosses, common_curves, compare, differing, overlap
from p2d.comparison_views import to_csv, to_html
from p2d.evaluation import RowLosses as MeasuredLosses
from p2d.evaluation import paired_bootstrap
from p2d.head_maps import HeadMap, Reproducibility

SAME = Reproducibility(rank_correlation=1.0, top_k_overlap=1, k=1, chance=0.1)


def a_map(scores: list[list[float]], digest: str = "d") -> HeadMap:
    return HeadMap(
        scores=tuple(tuple(row) for row in scores), scorer="shift", projections=("v", "o"), model_name="m",
        model_digest=digest, dataset_hash="h", seed=0, precision="fp32", reproducibility=SAME,
    )  # fmt: skip


def losses(rows: int, *, gain: float = 0.0, noise: float = 0.1, seed: int = 0) -> RowLosses:
    rng = random.Random(seed)
    tokens = [rng.randint(5, 40) for _ in range(rows)]
    before = [count * rng.uniform(0.5, 2.0) for count in tokens]
    other = random.Random(f"{seed}:{gain}")
    after = [nll - gain * count + other.gauss(0, noise) * count for nll, count in zip(before, tokens, strict=True)]
    return RowLosses(rows_hash="r", tokens=tokens, before=before, after=after)


def a_job(name: str, **fields: Any) -> Facts:
    return Facts(id=f"job_{name}", name=name, config={"kind": "adapt"}, **fields)


def test_heads_are_compared_as_sets_and_by_rank_as_a_whole_and_by_layer() -> None:
    one = a_job("a", head_map=a_map([[1, 2, 3], [6, 5, 4]]), heads=[(0, 2), (1, 0), (1, 1)])
    other = a_job("b", head_map=a_map([[1, 2, 3], [4, 5, 6]]), heads=[(0, 2), (1, 2)])

    (pair,) = compare([one, other]).pairs

    assert pair.heads is not None
    assert (pair.heads.chosen.shared, pair.heads.chosen.jaccard) == (1, 0.25)
    assert [layer.rank_correlation for layer in pair.heads.layers] == [1.0, -1.0]
    assert [layer.chosen.jaccard for layer in pair.heads.layers] == [1.0, 0.0]
    assert 0 < pair.heads.rank_correlation < 1


def test_head_maps_of_two_models_are_not_compared() -> None:
    one = a_job("a", head_map=a_map([[1, 2]]), heads=[(0, 1)])
    other = replace(one, id="job_b", head_map=a_map([[1, 2]], digest="e"))

    (pair,) = compare([one, other]).pairs

    assert pair.heads is None
    assert pair.reasons["heads"] == "their base models are not the same"


def test_head_maps_that_rank_nothing_do_not_agree_or_differ() -> None:
    one = a_job("a", heads=[(0, 0)], head_map=a_map([[1, 2]]))
    flat = a_job("b", heads=[(0, 0)], head_map=a_map([[1, 1]]))

    for jobs in ([one, flat], [flat, one], [flat, flat]):
        (pair,) = compare(jobs).pairs
        assert pair.heads is None
        assert "ranks nothing" in pair.reasons["heads"]


@pytest.mark.parametrize("rows", [40, 3 * GROUPS + 7])
def test_the_paired_interval_is_the_one_that_an_evaluation_gives(rows: int) -> None:
    one, other = losses(rows), losses(rows, gain=0.05)

    (pair,) = compare([a_job("a", losses=one), a_job("b", losses=other)]).pairs

    measured = paired_bootstrap(
        MeasuredLosses(np.array(one.after), np.array(one.tokens, dtype=float)),
        MeasuredLosses(np.array(other.after), np.array(other.tokens, dtype=float)),
        seed=1,
    )
    assert pair.loss is not None
    assert pair.loss.difference == pytest.approx(measured.difference)
    width = measured.high - measured.low
    assert pair.loss.high - pair.loss.low == pytest.approx(width, rel=0.2)
    assert abs(pair.loss.low - measured.low) < 0.15 * width
    assert pair.loss.verdict == ("other" if measured.high < 0 else "no clear difference")


def test_a_job_is_not_better_than_itself_and_the_numbers_come_again() -> None:
    jobs = [a_job("a", losses=losses(30)), a_job("b", losses=losses(30))]

    (pair,) = compare(jobs).pairs

    assert pair.loss is not None
    assert (pair.loss.difference, pair.loss.low, pair.loss.high) == (0.0, 0.0, 0.0)
    assert pair.loss.verdict == "no clear difference"
    assert compare(jobs) == compare(jobs)


def test_losses_of_other_rows_or_other_tokens_are_not_compared() -> None:
    one, rows = losses(30), replace(losses(30), rows_hash="s")
    tokens = replace(one, tokens=[count + 1 for count in one.tokens])

    pairs = compare([a_job("a", losses=one), a_job("b", losses=rows), a_job("c", losses=tokens), a_job("d")]).pairs

    reasons = {(pair.one, pair.other): pair.reasons["loss"] for pair in pairs}
    assert reasons[0, 1] == "they were evaluated on different rows"
    assert reasons[0, 2] == "their base models read the rows as other tokens"
    assert reasons[0, 3] == "one of them has no losses of single rows"


def test_settings_that_differ_are_named_and_no_others() -> None:
    found = list(differing([{"a": 1, "b": {"c": [1]}}, {"a": 1, "b": {"c": [2]}, "d": None}, {"a": 1, "b": {}}]))

    assert [(one.pointer, one.values) for one in found] == [("/b/c", [[1], [2], None])]
    assert overlap(frozenset(), frozenset()).jaccard == 1.0


def test_curves_have_one_axis_and_end_where_their_job_ended() -> None:
    short = [{"tokens": 10, "loss": 2.0}, {"tokens": 10, "loss": 1.0}]
    long = [{"tokens": 10, "loss": 3.0}] * 6

    curves = common_curves([short, long, None])

    assert curves.tokens[-1] == 60
    assert len(curves.tokens) == AXIS
    assert curves.losses[0][curves.tokens.index(20)] == 1.0
    assert set(curves.losses[0][curves.tokens.index(20) + 1 :]) == {None}
    assert curves.losses[1][-1] == 3.0
    assert set(curves.losses[2]) == {None}


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in ("meta", "rect", "br"):
            self.open.append(tag)
        self.loads += [name for name, _ in attrs if name in ("src", "href") or name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect",):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_whole_loads_nothing_and_shows_names_as_text() -> None:
    jobs = [
        a_job("<script>x</script>", losses=losses(30), log=[{"tokens": 9, "loss": 2.0}] * 3, kept=frozenset([b"a"])),
        a_job("plain", losses=losses(30, gain=0.4), log=[{"tokens": 9, "loss": 1.0}] * 5, kept=frozenset([b"a", b"b"])),
        a_job("nothing"),
    ]
    page = Page()

    page.feed(to_html("A & B", jobs, compare(jobs)))

    assert page.open == []
    assert page.loads == []
    assert "script" not in page.seen
    assert {"svg", "polyline", "table"} <= set(page.seen)
    assert any("<script>x</script>" in text for text in page.text)


def test_many_jobs_have_numbers_above_their_columns_steps_their_order_and_lines_no_stairs() -> None:
    steps = [
        {"step": name, "load_s": 0, "work_s": 1, "peak_memory_bytes": 1} for name in ("evaluate", "heads", "merge")
    ]
    log = [{"tokens": 9, "loss": 2.0}, {"tokens": 9, "loss": 1.0}]
    jobs = [a_job(f"a long name, number {n}", log=log, cost={"steps": steps}) for n in range(9)]

    page = to_html("many", jobs, compare(jobs))

    assert page.count(">a long name, number 7<") == 1  # of its line
    assert page.count("8. a long name, number 7") == 1
    assert page.index(">heads</th>") < page.index(">evaluate</th>") < page.index(">merge</th>")
    points = re.findall(r'points="([^"]*)"', page)
    assert [len(line.split()) for line in points] == [2] * 9


def test_the_table_has_a_line_for_every_value() -> None:
    jobs = [
        a_job("a", losses=losses(30), kept=frozenset([b"a"])),
        a_job("b", losses=losses(30, gain=0.4), kept=frozenset()),
    ]
    found = compare(jobs)

    rows = list(csv.DictReader(io.StringIO(to_csv(jobs, found))))

    (pair,) = found.pairs
    assert pair.loss is not None
    by_name = {(row["section"], row["name"]): row for row in rows}
    assert float(by_name["loss", "difference"]["value"]) == pair.loss.difference
    assert by_name["loss", "difference"]["other_job"] == "job_b"
    assert by_name["heads", "absent"]["value"] == "one of them has no head map"
    assert by_name["rows", "shared"]["value"] == "0"
