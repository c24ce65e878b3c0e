"""report.json: the whole job on one page: what was asked and decided, what was found, what it is worth, what it cost.

Made from the files of the other steps; holds no row text. Says of every number whether it was measured or projected.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from p2d.accounting import Alternatives, Bill, StepCost, attempts_of, bill, reused_of, step_cost
from p2d.config import config_json, epochs_of, heads_ratio
from p2d.files import read_json, write_json
from p2d.flops import full_fine_tuning, lora_training, typical_work
from p2d.head_maps import HeadMap
from p2d.plans import Plan, load_plan

FORMAT = 1
"""Of report.json."""


FLOPS_ARE = (
    "matrix products of the model on the rows' own tokens, padding left out on both sides; logits at answer tokens only; "
    "failed attempts not counted"
)


def write_report(inputs: Path, path: Path, *, started: float, device: str) -> None:
    """Write report.json from what stands in `inputs`.

    Args:   started: `time.perf_counter()` when the package step began, so that the report's own seconds count too.
    """
    selection, training, evaluation = (
        _optional(inputs / name) for name in ("selection_summary.json", "training.json", "evaluation.json")
    )
    plan = load_plan(inputs / "plan.json").settled(
        kept=None if selection is None else selection["kept"],
        learning_rate=None if training is None else training["learning_rate"],
    )
    if selection is not None:
        selection["mode"] = plan.config.data.mode
    report: dict[str, Any] = {
        "format": FORMAT,
        "kind": plan.config.kind,
        "config": config_json(plan.config),
        "reasons": plan.reasons,
        "warnings": [*plan.warnings, *(selection or {}).get("warnings", []), *(training or {}).get("warnings", [])],
        "base_model": asdict(plan.model),
        "device": plan.device,
        "dtype": plan.dtype,
        "rows": {"train": asdict(plan.train), "guide": asdict(plan.guide), "evaluation": asdict(plan.evaluation)},
        "heads": _heads(inputs, plan, training),
        "selection": selection,
        "training": None if training is None else {key: training[key] for key in training if key != "log"},
        "evaluation": evaluation,
    }
    report["estimate_s"] = plan.estimate_s
    report["cost"] = _cost(inputs, plan, evaluation, started=started, device=device)
    write_json(path, report)


def _optional(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _heads(inputs: Path, plan: Plan, training: Any) -> dict[str, Any] | None:
    if not (inputs / "head_map.json").is_file():
        return None
    head_map = HeadMap.load(inputs / "head_map.json")
    ratio = heads_ratio(plan.config.heads)
    chosen = head_map.top(ratio)
    return {
        "scorer": head_map.scorer,
        "projections": list(head_map.projections),
        "total": head_map.n_layers * head_map.n_heads,
        "kept": len(chosen),
        "chosen": [[layer, head] for layer, head in sorted(chosen)],
        "trained_parameters": None if training is None else training["n_parameters"],
        "trained_share": None if training is None else training["n_parameters"] / plan.model.parameters,
        "reproducibility": asdict(head_map.agreement(ratio)),
        "proxy": None if head_map.proxy is None else asdict(head_map.proxy),
        "earlier_head_map": plan.config.heads.head_map,
    }


def _cost(inputs: Path, plan: Plan, evaluation: Any, *, started: float, device: str) -> dict[str, Any]:
    costs = [step_cost(read_json(path)) for path in sorted(inputs.glob("accounting-*.json"))]
    costs = [cost for cost in costs if cost.step != "package"]
    own = StepCost(
        step="package",
        load_s=0.0,
        work_s=time.perf_counter() - started,
        tokens=0,
        rows=0,
        peak_memory_bytes=0,
        device=device,
    )
    against = _alternatives(plan, evaluation) if evaluation else Alternatives()
    ran = _optional(inputs / "steps.json")
    reused = {(one.step, one.shard): one for one in reused_of(ran)}
    total: Bill = bill([*costs, own], attempts_of(ran), against, reused.values())
    return {
        **asdict(total),
        "not_known": _not_known(plan, {cost.step for cost in costs}),
        "epochs": epochs_of(plan.config.training),
        "flops_are": FLOPS_ARE,
        "baselines": "projected from a few measured steps, see evaluation" if evaluation else None,
        "steps": [
            asdict(cost) | {"reused_from": one.job_id if (one := reused.get((cost.step, cost.shard))) else None}
            for cost in costs
        ],
    }


def _not_known(plan: Plan, costed: set[str]) -> list[str]:
    """Steps in no line, because their outputs were given as files without what they had cost."""
    given = ["heads"] if plan.config.heads.head_map is not None else []
    given += ["respond", "select"] if plan.config.data.selection is not None else []
    return [step for step in given if step not in costed]


def _alternatives(plan: Plan, evaluation: Any) -> Alternatives:
    """Both baselines over all training rows, which count as being of their mean length."""
    rows, epochs = plan.train, epochs_of(plan.config.training)
    work = typical_work(rows=rows.rows, tokens=rows.tokens, answer_tokens=rows.answer_tokens)
    return Alternatives(
        full_s=evaluation["full_fine_tuning"]["seconds"],
        lora_s=evaluation["lora"]["seconds"],
        full_flops=round(epochs * full_fine_tuning(plan.model, work)),
        lora_flops=round(epochs * lora_training(plan.model, work)),
    )
