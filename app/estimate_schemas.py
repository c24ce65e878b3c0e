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


class PeakView(View):
    """Bytes of memory."""

    host: int
    device: int = Field(description="0 on a CPU, whose memory is the host's.")


class MemoryView(View):
    """The most memory that the job would hold at one time, by `p2d.memory`'s formula."""

    steps: dict[str, PeakView] = Field(description="Of every step that loads the model.")
    peak: PeakView = Field(description="Of all steps.")
    available: PeakView | None = Field(
        description="Nine tenths of what the workers' machines have; null before one told."
    )


class SizeView(View):
    """Bytes of files; equal where the config says them exactly."""

    least: int
    most: int


class ChangeView(View):
    """One field of the body with which the job fits, all else the same."""

    pointer: str
    value: Any
    why: str


class CostView(View):
    """Money, in the currency of P2D_COST_PER_HOUR."""

    per_hour: float
    job: IntervalView


class AlternativeView(View):
    """Another way to adapt the model: all rows, same epochs, same machine. Projected."""

    seconds: float
    peak: PeakView
    artifact_bytes: int = Field(description="Weights to keep: all of the model's, or LoRA's factors.")
    fits: bool
    cost: float | None = Field(description="Null without P2D_COST_PER_HOUR.")


class EstimateView(View):
    """What a job would take. Nothing was made or stored."""

    config: dict[str, Any] = Field(description="As it would run: without `auto`, where that can be told now.")
    reasons: dict[str, str] = Field(description="Why each `auto` was resolved so: pointer -> reason.")
    warnings: list[str]
    steps: list[StepEstimateView]
    seconds: IntervalView = Field(description="All steps, as if one worker did them one after the other.")
    wait: IntervalView = Field(description="Seconds before them, until a worker takes the first step.")
    rows: dict[str, int] = Field(description="`train`, `guide`, `evaluation`; `proxy` and `kept` of the first.")
    tokens: dict[str, int]
    size_bytes: dict[str, int] = Field(description="The largest files that it would store, at most.")
    artifacts: dict[str, SizeView] = Field(
        description="The same files: which heads share a KV group decides between least and most."
    )
    memory: MemoryView
    fits: bool = Field(description="Whether nothing is known that it would fail by.")
    misfits: list[str] = Field(description="What it would fail by, and what would help.")
    changes: list[ChangeView] = Field(description="The nearest changes with which it fits, each by itself.")
    cost: CostView | None = Field(description="Null without P2D_COST_PER_HOUR.")
    full: AlternativeView | None = Field(description="Full fine-tuning; `adapt` only.")
    lora: AlternativeView | None = Field(description="LoRA on all linear layers; `adapt` only.")
    aer: float | None = Field(description="Projected seconds over those of full fine-tuning; `adapt` only.")
    aer_lora: float | None = Field(description="The same over LoRA on all linear layers and all rows.")
    full_s: float | None = Field(description="Projected seconds of full fine-tuning, same rows and epochs.")
    lora_s: float | None = Field(description="Projected seconds of LoRA, same rows and epochs.")
    basis: dict[str, str] = Field(description="Where `tokens`, `speed`, `interval`, `wait` and `memory` come from.")
