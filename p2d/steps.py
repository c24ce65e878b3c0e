"""The body of every step: read files, call the part that knows how, write files, account. No decisions of its own.

Which files those are and in which order steps run is `p2d.pipeline`. Imports stand inside the functions: `select` and
`package` run without torch, and whoever only plans a job imports nothing heavy.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from p2d.accounting import StepCost, host_memory_bytes, peak_memory_bytes
from p2d.config import DATA_SCORERS, JobConfig, Precision, heads_ratio, least_proxy_rows, proxy_count
from p2d.config_checks import check_given_heads, check_rank
from p2d.errors import ErrorDetail, ModelError, RowTooLong, TemplateRefuses
from p2d.files import write_json
from p2d.model_info import ModelInfo, read_model_info
from p2d.pipeline import ModelCache, Progress, StepCall, shard_range
from p2d.plans import Plan, RowCounts, Split, leaked, load_plan, save_plan, split_rows
from p2d.registry import load
from p2d.resolution import resolve
from p2d.row_files import open_rows, write_row_file
from p2d.rows import Row, content_hash, load_rows, write_rows
from p2d.wording import counted

if TYPE_CHECKING:
    from p2d.head_maps import Head, HeadMap
    from p2d.models import BaseModel
    from p2d.rendering import Renderer

OnCheckpoint = Callable[[Path], None] | None

MAX_LISTED = 10_000
"""Over-long rows listed in an error at most."""


@dataclass(slots=True)
class _Meter:
    """Measures the step that it was made at the beginning of."""

    call: StepCall
    started: float = field(default_factory=time.perf_counter)
    load_s: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    part_flops: dict[str, int] = field(default_factory=dict)

    def base(self, models: ModelCache, plan: Plan) -> BaseModel:
        """The base model, warm or loaded now. Raises ModelError if it is not the one that the plan was made for."""
        # The precision that `validate` found, not this worker's own choice: one job, one kind of numbers.
        precision = plan.config.training.precision
        base, seconds = models.get(self.call.model_dir, precision=precision, device=self.call.device)
        self.load_s += seconds
        if base.info.digest != plan.model.digest:
            raise ModelError(f"The files of the model {base.info.name!r} have changed since the job began.")
        return base

    def write(
        self,
        *,
        tokens: int,
        rows: int,
        flops: float = 0,
        device: str,
        peak_bytes: int | None = None,
        device_bytes: int = 0,
    ) -> None:
        """Write accounting-*.json: the last act of a step."""
        call = self.call
        cost = StepCost(
            step=call.step,
            shard=call.shard,
            load_s=self.load_s,
            work_s=time.perf_counter() - self.started - self.load_s,
            parts=self.parts,
            part_flops=self.part_flops,
            tokens=tokens,
            rows=rows,
            flops=round(flops),
            peak_memory_bytes=peak_memory_bytes() if peak_bytes is None else peak_bytes,
            device=device,
            host_memory_bytes=host_memory_bytes(),
            device_memory_bytes=device_bytes,
        )
        shard = f"-{call.shard:05d}" if call.step == "respond" else ""
        write_json(call.out / f"accounting-{call.step}{shard}.json", cost)


# --- validate --------------------------------------------------------------------------------------------------------


def validate(call: StepCall, progress: Progress, models: ModelCache, on_checkpoint: OnCheckpoint) -> None:
    """Set held-out rows apart, count tokens, decide what `"auto"` stands for, and say how long it will take."""
    import torch

    from p2d.calibration import calibrate
    from p2d.device import pick_device, pick_dtype
    from p2d.estimate import estimate_seconds
    from p2d.rendering import load_renderer

    meter = _Meter(call)
    info, renderer = read_model_info(call.model_dir), load_renderer(call.model_dir)
    check_rank(call.config, head_dim=info.head_dim)
    rows = open_rows(call.inputs / "dataset.jsonl")
    apart = call.inputs / "validation.jsonl"
    split = split_rows(
        rows,
        open_rows(apart) if apart.is_file() else None,
        seed=call.config.training.seed,
        proxy_rows=least_proxy_rows(call.config),
    )
    given = _given_map(call, info)
    scorer = given.scorer if given is not None else None
    resolution = resolve(
        call.config,
        rows=len(split.train),
        context_length=info.context_length,
        head_dim=info.head_dim,
        map_scorer=scorer,
        validation_guide=len(split.guide) if apart.is_file() else 0,
    )
    config, reasons, warnings = resolution.config, dict(resolution.reasons), list(resolution.warnings)
    held_out = "/validation_dataset" if apart.is_file() else "/dataset"
    train, guide, evaluation = _count_tokens(renderer, split, config, held_out, progress)
    if repeated := leaked(split):
        both = counted(repeated, "held-out row stands", "held-out rows stand")
        warnings.append(f"{both} in the training rows too: the evaluation flatters the result.")
    device = pick_device(call.device)
    dtype: Precision = "bf16" if pick_dtype(config.training.precision, device) is torch.bfloat16 else "fp32"
    if config.training.precision == "auto":
        reasons["/training/precision"] = f"{dtype} is what this device is taken to compute fastest, by its kind"
        config = replace(config, training=replace(config.training, precision=dtype))
    speed = calibrate(info, device=str(device), dtype=dtype)
    plan = Plan(
        config=config,
        reasons=reasons,
        warnings=warnings,
        model=info,
        train=train,
        guide=guide,
        evaluation=evaluation,
        content_hash=content_hash(split.train),
        device=str(device),
        dtype=dtype,
        estimate_s=estimate_seconds(
            info, config, speed, train=train, guide=guide, evaluation=evaluation, shard_rows=call.shard_rows
        ),
        guide_apart=apart.is_file(),
    )
    write_row_file(call.out / "rows.jsonl", split.train)
    write_rows(call.out / "guide.jsonl", split.guide)
    write_rows(call.out / "evaluation.jsonl", split.evaluation)
    save_plan(call.out / "plan.json", plan)
    meter.write(tokens=0, rows=len(rows), device=str(device))


def _count_tokens(
    renderer: Renderer, split: Split, config: JobConfig, held_out: str, progress: Progress
) -> tuple[RowCounts, RowCounts, RowCounts]:
    """Sizes of the three sets.

    Raises: TemplateRefuses with the conversations that the model's template does not take, RowTooLong with every line that does
            not fit: file by file in line order.
    """
    limit = config.training.max_length
    assert limit != "auto", "resolve the config first"
    sets: list[tuple[str, Sequence[Row]]] = [
        ("/dataset", split.train),
        (held_out, split.guide),
        (held_out, split.evaluation),
    ]
    total = sum(len(rows) for _, rows in sets)
    counts: list[RowCounts] = []
    errors: list[ErrorDetail] = []
    refused: list[ErrorDetail] = []
    done = too_long = not_taken = 0
    for pointer, rows in sets:
        tokens = answers = longest = listed = 0
        for row in rows:
            try:
                rendered = renderer.render(row)
            except TemplateRefuses as error:
                not_taken += 1
                refused += [replace(fault, pointer=pointer) for fault in error.errors if not_taken <= MAX_LISTED]
                continue
            length = renderer.length(rendered)
            tokens, answers, longest = tokens + length, answers + len(rendered.answer_ids), max(longest, length)
            if length > limit:
                too_long, listed = too_long + 1, listed + 1
                if listed <= MAX_LISTED:  # of each set: enough for the first ones of all in line order
                    message = f"The row has {length} tokens; at most {limit} fit."
                    errors.append(ErrorDetail(code=RowTooLong.code, message=message, pointer=pointer, line=row.line))
            done += 1
            if done % 500 == 0 or done == total:
                progress(done, total, {})
        counts.append(RowCounts(rows=len(rows), tokens=tokens, answer_tokens=answers, longest=longest))
    if refused:
        refused.sort(key=lambda error: (error.pointer, error.line))
        text = counted(not_taken, "conversation has turns", "conversations have turns")
        text += " that the chat template of the base model does not take."
        raise TemplateRefuses(text, errors=refused, errors_total=not_taken)
    if errors:
        errors.sort(key=lambda error: (error.pointer, error.line))
        text = counted(too_long, f"row is longer than {limit} tokens.", f"rows are longer than {limit} tokens.")
        raise RowTooLong(text, errors=errors[:MAX_LISTED], errors_total=too_long, limit=limit)
    return counts[0], counts[1], counts[2]


# --- heads -----------------------------------------------------------------------------------------------------------


def heads(call: StepCall, progress: Progress, models: ModelCache, on_checkpoint: OnCheckpoint) -> None:
    """Stage 1: the head map."""
    from p2d.identify import identify_heads
    from p2d.step_flops import proxy_flops

    meter, plan = _Meter(call), load_plan(call.inputs / "plan.json")
    rows, guide = open_rows(call.inputs / "rows.jsonl"), load_rows(call.inputs / "guide.jsonl")
    base = meter.base(models, plan)
    head_map = identify_heads(base, rows, guide, plan.config, progress)
    head_map.save(call.out / "head_map.json")
    tokens = head_map.proxy.tokens if head_map.proxy else 0
    operations = proxy_flops(base, rows, guide, plan.config, head_map)
    _write_cost(meter, base, tokens=tokens, rows=proxy_count(plan.config.heads), flops=operations)


# --- respond, select -------------------------------------------------------------------------------------------------


def respond(call: StepCall, progress: Progress, models: ModelCache, on_checkpoint: OnCheckpoint) -> None:
    """Stage 2, first half, one shard: how every head responds to each row of a range."""
    from p2d.response_matrix import save_shard
    from p2d.responses import DataScorer, ResponseInput

    meter, plan = _Meter(call), load_plan(call.inputs / "plan.json")
    rows, guide = open_rows(call.inputs / "rows.jsonl"), load_rows(call.inputs / "guide.jsonl")
    scorer: DataScorer = load(DATA_SCORERS, plan.config.data.scorer, what="data scorer", pointer="/data/scorer")
    assert plan.config.training.slices != "auto"
    base = meter.base(models, plan)
    span = shard_range(len(rows), call.shard, call.shards)
    responses = scorer(
        ResponseInput(
            base=base,
            rows=rows,
            guide=guide,
            span=span,
            slices=plan.config.training.slices,
            config=plan.config,
            progress=progress,
        )
    )
    save_shard(call.out / f"responses-{call.shard:05d}.safetensors", responses.shard)
    _write_cost(meter, base, tokens=responses.tokens, rows=len(responses.shard.row_R), flops=responses.flops)


def select(call: StepCall, progress: Progress, models: ModelCache, on_checkpoint: OnCheckpoint) -> None:
    """Stage 2, second half: keep the rows that the chosen heads respond to. No torch."""
    from p2d.response_matrix import read_shards
    from p2d.selection import select_rows, summarise
    from p2d.selection_file import write_selection

    meter, plan = _Meter(call), load_plan(call.inputs / "plan.json")
    rows = open_rows(call.inputs / "rows.jsonl")
    chosen = _chosen_heads(call, plan)
    shards = read_shards(list(call.inputs.glob("responses-*.safetensors")))
    selection = select_rows(
        shards,
        chosen,
        plan.config.data.ratio,
        rows,
        seed=plan.config.training.seed,
        guide_apart=plan.guide_apart,
    )
    write_selection(call.out / "selection.jsonl", selection, rows)
    write_json(call.out / "selection_summary.json", summarise(selection))
    progress(1, 1, {"kept": float(selection.kept)})
    meter.write(tokens=0, rows=len(rows), device="cpu")


def _given_map(call: StepCall, model: ModelInfo) -> HeadMap | None:
    """The head map that the job names instead of finding one. Raises ConfigError if the job may not use it."""
    from p2d.head_maps import check_head_map

    if call.config.heads.head_map is None:
        return None
    given = check_head_map(call.inputs / "head_map.json", model)
    check_given_heads(call.config, given.scorer)
    return given


def _chosen_heads(call: StepCall, plan: Plan) -> list[Head]:
    """The view that the job's ratio takes of the head map. Raises ConfigError if the map is of another model."""
    from p2d.head_maps import check_head_map

    head_map = check_head_map(call.inputs / "head_map.json", plan.model)
    return head_map.top(heads_ratio(plan.config.heads))


# --- train -----------------------------------------------------------------------------------------------------------


def train(call: StepCall, progress: Progress, models: ModelCache, on_checkpoint: OnCheckpoint) -> None:
    """Stage 3: the chosen heads' slices on the chosen rows."""
    from p2d.adapters import save_adapter
    from p2d.rendering import RenderedRows
    from p2d.selection_file import load_kept
    from p2d.step_flops import training_flops
    from p2d.training import train as train_slices

    meter, kept = _Meter(call), load_kept(call.inputs / "selection.jsonl")
    plan = load_plan(call.inputs / "plan.json").settled(kept=len(kept))
    chosen, guide = _chosen_heads(call, plan), load_rows(call.inputs / "guide.jsonl")
    base = meter.base(models, plan)
    rendered, watched = RenderedRows(base.renderer, kept), RenderedRows(base.renderer, guide)
    result = train_slices(
        base,
        rendered,
        watched,
        chosen,
        plan.config,
        progress,
        checkpoint_dir=call.out / "checkpoint",
        resume_from=call.checkpoint,
        on_checkpoint=on_checkpoint or _ignore,
    )
    assert plan.config.training.slices != "auto"
    save_adapter(
        call.out,
        base=base,
        heads=chosen,
        projections=plan.config.training.slices,
        state=result.state,
        config=plan.config,
        learning_rate=result.learning_rate,
    )
    facts = asdict(replace(result, state={})) | {"heads": len(chosen), "rows": len(kept)}
    facts.pop("state")  # the weights have a file of their own
    write_json(call.out / "training.json", facts)
    meter.parts["learning-rate search"] = result.search_seconds
    operations, searching = training_flops(base, rendered, watched, chosen, plan.config, result)
    meter.part_flops["learning-rate search"] = round(searching)
    _write_cost(meter, base, tokens=result.tokens, rows=len(kept), flops=operations)


def _ignore(directory: Path) -> None:
    """For callers that do not keep checkpoints."""


def _write_cost(meter: _Meter, base: BaseModel, *, tokens: int, rows: int, flops: float = 0) -> None:
    from p2d.device import device_memory_bytes
    from p2d.device import peak_memory_bytes as device_peak_bytes

    meter.write(
        tokens=tokens,
        rows=rows,
        flops=flops,
        device=str(base.device),
        peak_bytes=device_peak_bytes(base.device),
        device_bytes=device_memory_bytes(base.device),
    )


# --- evaluate, package -----------------------------------------------------------------------------------------------


def evaluate(call: StepCall, progress: Progress, models: ModelCache, on_checkpoint: OnCheckpoint) -> None:
    """Judge the adapter on rows that chose nothing, and price the alternatives."""
    from p2d.adapters import load_adapter
    from p2d.estimate import evaluation_cost
    from p2d.evaluation import Judge
    from p2d.selection_file import load_kept

    meter, kept = _Meter(call), load_kept(call.inputs / "selection.jsonl")
    plan = load_plan(call.inputs / "plan.json").settled(kept=len(kept))
    base = meter.base(models, plan)
    judge = Judge(
        base=base,
        rows=open_rows(call.inputs / "evaluation.jsonl"),
        train=open_rows(call.inputs / "rows.jsonl"),
        guide=load_rows(call.inputs / "guide.jsonl"),
        kept=kept,
        heads=_chosen_heads(call, plan),
        config=plan.config,
        cost=evaluation_cost(plan.model, plan.config, train=plan.train, evaluation=plan.evaluation),
        progress=progress,
    )
    evaluation = judge.evaluate(load_adapter(call.inputs))
    write_json(call.out / "evaluation.json", asdict(evaluation))
    write_json(call.out / "row_losses.json", judge.row_losses())
    meter.parts |= judge.parts
    _write_cost(meter, base, tokens=judge.tokens, rows=len(judge.rows))


def package(call: StepCall, progress: Progress, models: ModelCache, on_checkpoint: OnCheckpoint) -> None:
    """Write the report. No torch."""
    from p2d.report import write_report

    meter = _Meter(call)
    write_report(call.inputs, call.out / "report.json", started=meter.started, device="cpu")
    progress(1, 1, {})
    meter.write(tokens=0, rows=0, device="cpu")


# --- exports ---------------------------------------------------------------------------------------------------------


def merge(call: StepCall, progress: Progress, models: ModelCache, on_checkpoint: OnCheckpoint) -> None:
    """The base model's files with the adapter's values in its weights. No weight is loaded beside the file that it is in."""
    from p2d.adapters import merge as merge_adapter

    meter = _Meter(call)
    _flatten(merge_adapter(call.model_dir, call.inputs, call.out / "merged"), call.out)
    progress(1, 1, {})
    meter.write(tokens=0, rows=0, device="cpu")


def export_peft(call: StepCall, progress: Progress, models: ModelCache, on_checkpoint: OnCheckpoint) -> None:
    """The adapter as a PEFT LoRA of the same base model."""
    from p2d.peft_export import export_peft as export

    meter = _Meter(call)
    _flatten(export(call.model_dir, call.inputs, call.out / "peft"), call.out)
    progress(1, 1, {})
    meter.write(tokens=0, rows=0, device="cpu")


def _flatten(folder: Path, out: Path) -> None:
    """Move the files of a folder to where a step's outputs are looked for."""
    for path in folder.iterdir():
        if path.is_file():
            path.rename(out / path.name)
    shutil.rmtree(folder)
