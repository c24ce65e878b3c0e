"""How long the texts of a dataset are, in a table of counts that does not grow with their number. No torch here."""

from __future__ import annotations

from collections import Counter

STEPS = 16
"""Counts between a length and its double; a quantile is at most 1/16 above the length that it stands for."""

QUANTILES = (0.1, 0.5, 0.9, 0.99)


class Lengths:
    """Lengths as they go by: least, most and mean are exact, quantiles rounded up by 6 % at most."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._total = self._count = self._most = 0
        self._least: int | None = None

    def add(self, length: int) -> None:
        """Count one."""
        self._counts[_upper(length)] += 1
        self._count += 1
        self._total += length
        self._most = max(self._most, length)
        self._least = length if self._least is None else min(self._least, length)

    def summary(self) -> dict[str, float]:
        """`min`, `mean`, `max`, `p10`, `p50`, `p90` and `p99`. At least one length must have been added."""
        assert self._least is not None
        found: dict[str, float] = {"min": self._least, "mean": round(self._total / self._count, 1), "max": self._most}
        uppers = sorted(self._counts.items())
        for quantile in QUANTILES:
            before, wanted = 0, quantile * self._count
            for upper, count in uppers:
                before += count
                if before >= wanted:
                    found[f"p{quantile * 100:g}"] = min(upper, self._most)
                    break
        return found


def _upper(length: int) -> int:
    """The largest length that is counted together with this one."""
    shift = max(0, length.bit_length() - STEPS.bit_length())
    return ((length >> shift) + 1 << shift) - 1
