"""Laws of lengths: least, mean and most exact, quantiles at most 6 % above, and a table that does not grow with their number."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2d.lengths import QUANTILES, Lengths


@given(st.lists(st.integers(0, 3_000_000), min_size=1, max_size=200))
def test_quantiles_are_not_below_the_true_ones_and_hardly_above(values: list[int]) -> None:
    lengths = Lengths()
    for value in values:
        lengths.add(value)

    found = lengths.summary()

    assert (found["min"], found["max"]) == (min(values), max(values))
    assert abs(found["mean"] - sum(values) / len(values)) <= 0.051
    for quantile in QUANTILES:
        true = sorted(values)[max(0, -(-int(quantile * 100) * len(values) // 100) - 1)]
        assert true <= found[f"p{quantile * 100:g}"] <= true * (1 + 1 / 16)


def test_many_different_lengths_take_few_counts() -> None:
    lengths = Lengths()
    for value in range(200_000):
        lengths.add(value)

    assert len(lengths._counts) < 300
