"""From estimated seconds to an interval: what a plan says, stretched by how wrong such plans were. Pure arithmetic.

A job's errors are frozen with its estimate, so that its view changes only when the job does. Those of its steps are added as
if they came together: a busy machine is late with all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from app.db.engine import Json
from app.db.estimates import DEFAULT, Error
from app.db.steps import Work
from p2d.plans import RowCounts

PACE_FROM = 0.05
"""Share of a job after which its own pace says more about its middle than the errors of other jobs."""

SILENCE_S = 10.0
"""Least upper end of an interval: a running job is looked at anew with each heartbeat, and had not ended at the last."""

LEAST_SHARE = 1e-4
"""Share of a job below which what is left of it makes its interval no wider."""


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


def share_done(work: Work, estimate: Json | None) -> float:
    """What is done of all, 0 to 1: each step counts for the seconds that such a step took when its estimate said so."""
    errors = _errors(estimate)
    whole = stretched(work.whole, errors).p50
    return 1 - stretched(work.left, errors).p50 / whole if whole else 0.0


def time_left(work: Work, estimate: Json) -> Interval:
    """Seconds that a job still takes, from now on: nothing of it is ever past.

    The middle goes by the pace so far. Around it lies what is known of errors. Half of an error is taken to be the whole
    job's, so it shrinks as what is left does; half to be that of parts that go wrong each on its own, so it shrinks with the
    root: else the interval would be narrow just when a last long part goes wrong. The halves are a guess.
    """
    errors, share = _errors(estimate), share_done(work, estimate)
    left = stretched(work.left, errors)
    pace = work.spent_s / (stretched(work.whole, errors).p50 - left.p50) if share > PACE_FROM else 1.0
    middle = pace * stretched(work.paced, errors).p50 + work.own_s
    if left.p50 <= 0:
        return Interval(p10=0.0, p50=0.0, p90=SILENCE_S)
    wider = (1 + 1 / math.sqrt(max(1 - share, LEAST_SHARE))) / 2
    slower, faster = (left.p90 / left.p50 - 1) * wider, (left.p50 / left.p10 - 1) * wider
    return Interval(p10=middle / (1 + faster), p50=middle, p90=max(middle * (1 + slower), SILENCE_S))


def _errors(estimate: Json | None) -> dict[str, Error]:
    return {step: Error(**error) for step, error in (estimate or {}).get("errors", {}).items()}


_QUANTILES = ("p10", "p50", "p90")
