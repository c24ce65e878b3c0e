"""The wire of comparisons: which jobs, and what they have in common, as JSON. Shapes and types only, as app.schemas."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from app.schemas import Id, Text
from app.views import View

MOST_JOBS = 20
"""In one comparison: 190 pairs."""


class ComparisonBody(BaseModel):
    """Which jobs to compare."""

    model_config = ConfigDict(extra="forbid")

    job_ids: Annotated[list[Id], Field(min_length=2, max_length=MOST_JOBS)] = Field(
        description="In the order in which they are to be shown; each once."
    )
    name: Annotated[Text, Field(max_length=200)] = ""


class ComparisonSummary(View):
    """A comparison in a list."""

    id: str
    name: str
    job_ids: list[str]
    created_at: datetime


class ComparedJobView(View):
    """One of the jobs."""

    id: str
    name: str
    status: str = Field(description="As the job's own, or `deleted`.")
    missing: list[str] = Field(description="Files that it has not made, or not yet, or that are gone.")


class SettingView(View):
    """A field of the configuration in which the jobs differ."""

    pointer: str
    values: list[JsonValue] = Field(description="Of each job, in order.")


class OverlapView(View):
    """What two sets have in common."""

    one: int
    other: int
    shared: int
    jaccard: float = Field(description="Shared over what either has; 1 where both are empty.")


class LayerAgreementView(View):
    """Two head maps in one layer."""

    layer: int
    chosen: OverlapView
    rank_correlation: float


class HeadAgreementView(View):
    """Two head maps of one model."""

    chosen: OverlapView
    rank_correlation: float = Field(description="Spearman's, over all heads.")
    layers: list[LayerAgreementView]


class LossDifferenceView(View):
    """Mean loss of the other job minus that of the one, on the same held-out rows; below 0 = the other is better."""

    rows: int
    difference: float = Field(description="Nats per answer token.")
    low: float = Field(description="With `high` the 95 % interval of a paired bootstrap.")
    high: float
    verdict: str = Field(description="Which is better: `one`, `other` or `no clear difference`.")


class PairView(View):
    """Two of the jobs, by their place in `jobs`."""

    one: int
    other: int
    heads: HeadAgreementView | None
    rows: OverlapView | None = Field(description="Of the kept rows, by their text.")
    loss: LossDifferenceView | None
    reasons: dict[str, str] = Field(description="Why `heads`, `rows` or `loss` is null.")


class MetricsView(View):
    """What one job reached and what it cost; null = not known."""

    rows: int | None = Field(description="Held-out rows.")
    loss_before: float | None
    loss_after: float | None
    metric: str | None
    metric_before: float | None
    metric_after: float | None
    trained_parameters: int | None
    learning_rate: float | None
    aer: float | None
    aer_lora: float | None
    aer_flop: float | None
    aer_lora_flop: float | None
    counted_s: float | None
    spent_s: float | None
    full_s: float | None
    lora_s: float | None
    peak_memory_bytes: int | None
    step_s: dict[str, float] = Field(description="Measured seconds inside each step, loading included.")


class CurvesView(View):
    """Training loss of every job over the tokens that it was trained on, on one axis."""

    tokens: list[int]
    losses: list[list[float | None]] = Field(description="Of each job; null before its first and behind its last step.")


class ComparisonView(ComparisonSummary):
    """Jobs side by side, as far as they have got; computed from their files when it is asked for."""

    jobs: list[ComparedJobView]
    settings: list[SettingView]
    metrics: list[MetricsView] = Field(description="Of each job, in order.")
    pairs: list[PairView] = Field(description="Each job with each that comes after it.")
    curves: CurvesView
