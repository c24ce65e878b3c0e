"""The wire of estimates: what a job would take, as JSON. Shapes and types only, as app.schemas."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from app.views import View


class IntervalView(View):
    """Seconds: less than p10 in one of ten cases, more than p90 in one of ten."""

    p10: float
    p50: float
    p90: float


class StepEstimateView(View):
    """One step, all its shards together."""

    step: str
    shards: int
    seconds: IntervalView


class EstimateView(View):
    """What a job would take. Nothing was made or stored."""

    config: dict[str, Any] = Field(description="As it would run: without `auto`, where that can be told now.")
    reasons: dict[str, str] = Field(description="Why each `auto` was resolved so: pointer -> reason.")
    warnings: list[str]
    steps: list[StepEstimateView]
    seconds: IntervalView = Field(description="All steps, as if one worker did them one after the other.")
    rows: dict[str, int] = Field(description="`train`, `guide`, `evaluation`; `proxy` and `kept` of the first.")
    tokens: dict[str, int]
    size_bytes: dict[str, int] = Field(description="The largest files that it would store, at most.")
    fits: bool = Field(description="Whether nothing is known that it would fail by.")
    misfits: list[str] = Field(description="What it would fail by, and what would help.")
    aer: float | None = Field(description="Projected seconds over those of full fine-tuning; `adapt` only.")
    aer_lora: float | None = Field(description="The same over LoRA on all linear layers and all rows.")
    full_s: float | None = Field(description="Projected seconds of full fine-tuning, same rows and epochs.")
    lora_s: float | None = Field(description="Projected seconds of LoRA, same rows and epochs.")
    basis: dict[str, str] = Field(description="Where `tokens`, `speed` and `interval` come from.")
