"""What finished jobs tell about new ones: how wrong estimates were, how fast steps ran, how many tokens rows have."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import ColumnElement, Double, Subquery, Text, and_, column, func, literal, select, true, values
from sqlalchemy.dialects.postgresql import JSONB

from app.db.engine import Connection, Json
from app.db.tables import datasets, jobs, steps
from p2d.estimate import EFFICIENCY
from p2d.pipeline import STEPS
from p2d.plans import RowCounts

RECENT = 200
"""Finished steps of one name that are looked at: the newest."""

FEWEST = 5
"""Finished steps below which DEFAULT stands in for their error. A guess."""

LEAST_S = 0.5
"""Estimates below this say nothing about how good estimates are. The index `ix_steps_judged` has the number too."""


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
    recent = _recent()
    quantiles = [func.percentile_cont(share).within_group(recent.c.ratio) for share in (0.1, 0.5, 0.9)]
    rows = conn.execute(
        select(recent.c.step, *quantiles, func.count()).group_by(recent.c.step).having(func.count() >= FEWEST)
    )
    return {row[0]: Error(p10=row[1], p50=row[2], p90=row[3], runs=row[4]) for row in rows}


@dataclass(frozen=True, kw_only=True, slots=True)
class AbsoluteError:
    """How far estimates were off, whichever way."""

    median: float
    """Of |actual / estimated - 1|: 0.25 = half of them were off by more than a quarter."""
    runs: int


WHOLE = "job"
"""Stands among the names of steps for all steps of a job together."""


def absolute_errors(conn: Connection) -> dict[str, AbsoluteError]:
    """By step, and of whole jobs (WHOLE), the newest RECENT of each; what has not finished yet is absent."""
    newest = (
        select(jobs.c.id)
        .where(jobs.c.status == "succeeded", jobs.c.estimate.is_not(None))
        .order_by(jobs.c.id.desc())
        .limit(RECENT)
    )
    sums = select(literal(WHOLE).label("step"), (func.sum(steps.c.seconds) / func.sum(steps.c.weight)).label("ratio"))
    by_job = sums.join_from(steps, jobs).where(is_judged(), jobs.c.id.in_(newest)).group_by(jobs.c.id).subquery()
    found: dict[str, AbsoluteError] = {}
    for part in (_recent(), by_job):
        median = func.percentile_cont(0.5).within_group(func.abs(part.c.ratio - 1))
        rows = conn.execute(select(part.c.step, median, func.count()).group_by(part.c.step))
        found |= {row[0]: AbsoluteError(median=float(row[1]), runs=row[2]) for row in rows}
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredSpeed:
    """Floating point operations per second as earlier steps reached them, by p2d.flops' count."""

    flop_per_s: float
    """At a step's full efficiency (`p2d.estimate.Speed`)."""
    runs: int
    same_model: bool
    """Whether all of them ran this model; else they ran others."""


def measured_speed(conn: Connection, *, model_digest: str) -> MeasuredSpeed | None:
    """The median speed of the newest finished steps: of this model if it ran, else of all. None where nothing has run."""
    accounting = func.jsonb_each(steps.c.facts).table_valued("key", column("value", JSONB), joins_implicitly=True)
    flops, work_s = (accounting.c.value[name].astext.cast(Double) for name in ("flops", "work_s"))
    query = select((flops / work_s).label("flop_per_s"), steps.c.model_digest).select_from(steps)
    query = query.where(steps.c.status == "done", func.jsonb_typeof(steps.c.facts) == "object", flops > 0, work_s > 0)
    for same_model in (True, False):
        newest = query.where(steps.c.model_digest == model_digest) if same_model else query
        recent = newest.order_by(steps.c.finished_at.desc()).limit(RECENT).subquery()
        median = func.percentile_cont(0.5).within_group(recent.c.flop_per_s)
        found, runs = conn.execute(select(median, func.count()).select_from(recent)).one()
        if runs:
            return MeasuredSpeed(flop_per_s=found / EFFICIENCY, runs=runs, same_model=same_model)
    return None


def measured_rows(conn: Connection, *, content_hash: str, model_digest: str) -> RowCounts | None:
    """Training rows of an earlier job over the same content with the same model, in rows and tokens."""
    query = (
        select(jobs.c.estimate["rows"])
        .join(datasets, datasets.c.id == jobs.c.dataset_id)
        .where(datasets.c.content_hash == content_hash, jobs.c.model_digest == model_digest)
        .where(jobs.c.estimate.has_key("rows"))
        .order_by(jobs.c.id.desc())
        .limit(1)
    )
    row = conn.execute(query).first()
    return RowCounts(**row[0]) if row else None


def ratio() -> ColumnElement[Any]:
    """Actual over estimated seconds of a row of `steps`; more than one means that it took longer."""
    return steps.c.seconds / steps.c.weight


def is_judged() -> ColumnElement[bool]:
    """Whether a row of `steps`, joined with its job, ended well in one go and had an estimate from the job's plan."""
    return and_(_ended_at_once(), jobs.c.estimate["steps"].has_key(steps.c.step))


def _ended_at_once() -> ColumnElement[bool]:
    return and_(steps.c.status == "done", steps.c.token == 1, steps.c.seconds.is_not(None), steps.c.weight >= LEAST_S)


def _recent() -> Subquery:
    """Step and ratio of those that are judged of the newest RECENT of each step. Every validate step asks, and under a lock."""
    names = values(column("step", Text), name="names").data([(name,) for name in STEPS])
    # The jobs come after: PostgreSQL guesses that few have an estimate, and would read all steps for so many that have.
    newest = (
        select(steps.c.job_id, ratio().label("ratio"))
        .where(steps.c.step == names.c.step, _ended_at_once())
        .order_by(steps.c.finished_at.desc())
        .limit(RECENT)
        .lateral("newest")
    )
    return (
        select(names.c.step, newest.c.ratio)
        .select_from(names.join(newest, true()).join(jobs, jobs.c.id == newest.c.job_id))
        .where(jobs.c.estimate["steps"].has_key(names.c.step))
        .subquery()
    )
