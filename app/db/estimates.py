"""How wrong estimates were: actual over estimated seconds of finished steps, as the ledger has them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, and_, func, select

from app.db.engine import Connection, Json
from app.db.tables import jobs, steps

RECENT = 200
"""Finished steps of one name that are looked at: the newest."""

FEWEST = 5
"""Finished steps below which DEFAULT stands in for their error. A guess."""

LEAST_S = 0.5
"""Estimates below this say nothing about how good estimates are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Error:
    """Quantiles of actual over estimated seconds."""

    p10: float
    p50: float
    p90: float
    runs: int
    """Finished steps behind them; 0 = the default."""

    def json(self) -> Json:
        """As a job's estimate holds it."""
        return asdict(self)


DEFAULT = Error(p10=0.6, p50=1.0, p90=2.0, runs=0)
"""Until FEWEST steps of a name have finished. A guess: the machine may be twice as busy as when its speed was measured."""


def past_errors(conn: Connection) -> dict[str, Error]:
    """The error of each step's estimates, of those with FEWEST finished runs or more."""
    query = select(steps.c.step, ratio().label("ratio"), _newness().label("newness")).join_from(steps, jobs)
    recent = query.where(is_judged()).subquery()
    quantiles = [func.percentile_cont(share).within_group(recent.c.ratio) for share in (0.1, 0.5, 0.9)]
    rows = conn.execute(
        select(recent.c.step, *quantiles, func.count())
        .where(recent.c.newness <= RECENT)
        .group_by(recent.c.step)
        .having(func.count() >= FEWEST)
    )
    return {row[0]: Error(p10=row[1], p50=row[2], p90=row[3], runs=row[4]) for row in rows}


def ratio() -> ColumnElement[Any]:
    """Actual over estimated seconds of a row of `steps`; more than one means that it took longer."""
    return steps.c.seconds / steps.c.weight


def is_judged() -> ColumnElement[bool]:
    """Whether a row of `steps`, joined with its job, ended well in one go and had an estimate from the job's plan."""
    return and_(
        steps.c.status == "done",
        steps.c.token == 1,
        steps.c.seconds.is_not(None),
        steps.c.weight >= LEAST_S,
        jobs.c.estimate["steps"].has_key(steps.c.step),
    )


def _newness() -> ColumnElement[int]:
    return func.row_number().over(partition_by=steps.c.step, order_by=steps.c.finished_at.desc())
