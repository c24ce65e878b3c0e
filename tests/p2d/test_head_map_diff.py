"""Two head maps are compared by rank and by the heads that a ratio keeps, and chance is counted, not guessed."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from p2d.head_map_diff import compare
from p2d.head_maps import HeadMap, Reproducibility

A = HeadMap(
    scores=((1.0, 2.0, 3.0), (6.0, 5.0, 4.0)),
    scorer="shift",
    projections=("v", "o"),
    model_name="m",
    model_digest="0" * 64,
    dataset_hash="1" * 64,
    seed=0,
    precision="fp32",
    reproducibility=Reproducibility(rank_correlation=1.0, top_k_overlap=1, k=1, chance=0.1),
)


def test_a_monotone_change_of_scores_changes_nothing() -> None:
    other = replace(A, scores=tuple(tuple(score**3 for score in row) for row in A.scores))

    found = compare(A, other, 0.5)

    assert (found.rank_correlation, found.overlap, found.only_one) == (1.0, 3, ())
    assert [layer.rank_correlation for layer in found.layers] == [1.0, 1.0]


def test_layers_and_heads_say_where_maps_differ() -> None:
    other = replace(A, scores=((9.0, 2.0, 3.0), (6.0, 5.0, 4.0)))

    found = compare(A, other, 0.5)

    assert (found.k, found.overlap, found.jaccard) == (3, 2, 0.5)
    assert (found.only_one, found.only_other) == (((1, 2),), ((0, 0),))
    assert [(one.kept_one, one.kept_other, one.kept_both) for one in found.layers] == [(0, 1, 0), (3, 2, 2)]
    assert [one.rank_correlation for one in found.layers] == [-0.5, 1.0]


@pytest.mark.parametrize("swapped", [0, 1, 2, 3])
def test_chance_is_what_all_draws_of_as_many_heads_say(swapped: int) -> None:
    low, high = [(0, h) for h in range(3)], [(1, h) for h in range(3)]
    kept = set(high[swapped:] + low[:swapped])
    scores = tuple(tuple(float((layer, head) in kept) for head in range(3)) for layer in range(2))

    found = compare(A, replace(A, scores=scores), 0.5)

    draws = [len(set(draw) & set(high)) for draw in combinations(low + high, 3)]
    assert found.overlap == 3 - swapped
    assert found.p_value == pytest.approx(sum(draw >= found.overlap for draw in draws) / len(draws))
    assert found.chance == sum(draws) / len(draws)
