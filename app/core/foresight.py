"""From estimated seconds to an interval: what a plan says, stretched by how wrong such plans were. Pure arithmetic.

A job's errors are frozen with its estimate, so that its view changes only when the job does. Those of its steps are added as
if they came together: a busy machine is late with all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from app.db.engine import Json
from app.db.estimates import DEFAULT, Error
from app.db.steps import Work
from p2d.plans import RowCounts

PACE_FROM = 0.05
"""Share of a job after which its own pace says more about its middle than the errors of other jobs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """Seconds: less than p10 in one of ten cases, more than p90 in one of ten, p50 in the middle."""

    p10: float
    p50: float
    p90: float

    def json(self) -> Json:
        """Rounded for people."""
        return {name: round(value, 1) for name, value in asdict(self).items()}


def stretched(seconds: Mapping[str, float], errors: Mapping[str, Error]) -> Interval:
    """The sum of estimated seconds by step, with the errors that such estimates had."""
    sums = [sum(s * getattr(errors.get(step, DEFAULT), name) for step, s in seconds.items()) for name in _QUANTILES]
    return Interval(p10=sums[0], p50=sums[1], p90=sums[2])


def estimate_json(seconds: Mapping[str, float], errors: Mapping[str, Error], rows: RowCounts | None = None) -> Json:
    """What a job keeps of its estimate; `rows` are its training rows, for estimates of later jobs."""
    return {
        **({"rows": asdict(rows)} if rows else {}),
        "total_s": sum(seconds.values()),
        "steps": dict(seconds),
        "interval_s": stretched(seconds, errors).json(),
        "errors": {step: errors.get(step, DEFAULT).json() for step in seconds},
    }


def time_left(work: Work, estimate: Json) -> Interval:
    """Seconds that a job still takes."""
    errors = {step: Error(**error) for step, error in estimate.get("errors", {}).items()}
    left = stretched(work.left, errors)
    if work.share <= PACE_FROM or left.p50 <= 0:
        return left
    middle = work.left_s
    return Interval(p10=middle * left.p10 / left.p50, p50=middle, p90=middle * left.p90 / left.p50)


_QUANTILES = ("p10", "p50", "p90")
