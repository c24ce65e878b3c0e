"""The engine without a model: the same steps and files as `p2d.pipeline.run_step`, pure Python, in milliseconds.

Fault tests steer it through files in the folder $STUB_DIR; each may name the batch (default 0) at which it strikes:
    hold-STEP    the step says `reached-STEP` and goes on only when the file is gone, with progress (so it hears a cancel)
    deaf-STEP    the same without progress: it hears nothing and looks hung
    crash-STEP   a number n: the step kills its own process, n times; or two numbers, n and the batch
    fail-STEP    the step raises; `user` in the file: a P2DError, else an exception that quotes a row
`runs` collects one line per run of a step. Same inputs, same bytes, however often a step was disturbed.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from p2d.config import UNIFORM, heads_ratio, least_proxy_rows, top_count
from p2d.errors import Diverged
from p2d.files import write_json
from p2d.head_maps import HeadMap, Reproducibility
from p2d.model_info import DIGEST_CACHE, ModelInfo, read_model_info
from p2d.pipeline import ModelCache, Progress, StepCall, shard_range
from p2d.plans import Plan, RowCounts, load_plan, save_plan, split_rows
from p2d.resolution import resolve
from p2d.rows import Row, content_hash, load_rows, write_rows

BATCHES = 4
"""Batches that every step pretends to have."""

COST = {"counted_s": 4.0, "spent_s": 3.0, "full_s": 8.0, "aer": 0.5, "steps": []}
"""What its report says of cost."""

HOST_BYTES = 64 << 30
"""Memory that its machine pretends to have."""

Checkpointed = Callable[[Path], None] | None


def run_step(call: StepCall, *, progress: Progress, models: ModelCache, on_checkpoint: Checkpointed = None) -> None:
    """Run one step the way `p2d.pipeline.run_step` does."""
    _note("runs", f"{call.step} {call.shard} {os.getpid()} {'resumed' if call.checkpoint else 'fresh'}\n")
    call.out.mkdir(parents=True, exist_ok=True)
    progress(0, BATCHES, {})
    _disturb(call, progress, 0)
    for batch in range(_done_before(call) + 1, BATCHES + 1):
        if call.step == "train":
            folder = call.out / "checkpoint" / "latest"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "state.json").write_text(json.dumps({"batch": batch}))
            if on_checkpoint is not None:
                on_checkpoint(folder)
        progress(batch, BATCHES, {"loss": 1 / batch} if call.step == "train" else {})
        _disturb(call, progress, batch)
    _BODIES[call.step](call)
    name = f"accounting-{call.step}" + (f"-{call.shard:05d}" if call.step == "respond" else "")
    cost = {
        "step": call.step,
        "shard": call.shard,
        "load_s": 0.0,
        "work_s": 0.001,
        "parts": {},
        "tokens": 10,
        "rows": 1,
        "flops": 10**9 if call.step in ("heads", "respond", "train") else 0,
    }
    write_json(
        call.out / f"{name}.json", cost | {"peak_memory_bytes": 1, "device": "stub", "host_memory_bytes": HOST_BYTES}
    )


def run_quietly(call: StepCall, *, progress: Progress, models: ModelCache, on_checkpoint: Checkpointed = None) -> None:
    """`run_step` that says nothing for some ticks of its worker after each checkpoint, as training does in a long step."""

    def keep(folder: Path) -> None:
        assert on_checkpoint is not None
        on_checkpoint(folder)
        time.sleep(0.6)

    run_step(call, progress=progress, models=models, on_checkpoint=keep if on_checkpoint is not None else None)


def _done_before(call: StepCall) -> int:
    if call.checkpoint is None:
        return 0
    done: int = json.loads((call.checkpoint / "state.json").read_bytes())["batch"]
    return done


def _disturb(call: StepCall, progress: Progress, batch: int) -> None:
    folder = os.environ.get("STUB_DIR")
    if not folder:
        return
    root = Path(folder)
    for kind in ("hold", "deaf"):
        path = root / f"{kind}-{call.step}"
        if (_text(path, "none") or "0") == str(batch):
            write_json(root / f"reached-{call.step}", os.getpid())
            while path.exists():
                time.sleep(0.01)
                if kind == "hold":
                    progress(batch, BATCHES, {})
    crash = root / f"crash-{call.step}"
    left, at = (int(number) for number in (_text(crash, "0") + " 0").split()[:2])
    if left > 0 and at == batch:
        crash.write_text(f"{left - 1} {at}")
        os.kill(os.getpid(), signal.SIGKILL)
    fail = root / f"fail-{call.step}"
    if fail.exists():
        if fail.read_text() == "user":
            raise Diverged("The loss of step 3 was not finite.", step=3)
        raise ValueError(f"secret row: {load_rows(next(call.inputs.glob('*.jsonl')))[0].prompt}")


def _validate(call: StepCall) -> None:
    model = read_model_info(call.model_dir)
    validation = call.inputs / "validation.jsonl"
    split = split_rows(
        load_rows(call.inputs / "dataset.jsonl"),
        load_rows(validation) if validation.exists() else None,
        seed=call.config.training.seed,
        proxy_rows=least_proxy_rows(call.config),
    )
    for name, rows in (("rows", split.train), ("guide", split.guide), ("evaluation", split.evaluation)):
        write_rows(call.out / f"{name}.jsonl", rows)
    given = HeadMap.load(call.inputs / "head_map.json") if call.config.heads.head_map is not None else None
    scorer = given.scorer if given is not None else None
    size = {"context_length": model.context_length, "head_dim": model.head_dim}
    vouching = len(split.guide) if validation.exists() else 0
    resolution = resolve(call.config, rows=len(split.train), **size, map_scorer=scorer, validation_guide=vouching)
    plan = Plan(
        config=resolution.config,
        reasons=resolution.reasons,
        warnings=list(resolution.warnings),
        model=model,
        train=_counts(split.train),
        guide=_counts(split.guide),
        evaluation=_counts(split.evaluation),
        content_hash=content_hash(split.train),
        device="stub",
        dtype="fp32",
        estimate_s={
            "validate": 1.0, "heads": 4.0, "respond": 8.0, "select": 1.0, "train": 16.0, "evaluate": 4.0, "package": 1.0,
        },
    )  # fmt: skip
    save_plan(call.out / "plan.json", plan)


def _heads(call: StepCall) -> None:
    plan = load_plan(call.inputs / "plan.json")
    info: ModelInfo = plan.model
    scores = tuple(tuple(float((7 * la + h) % 13) for h in range(info.n_heads)) for la in range(info.n_layers))
    if plan.config.heads.scorer == UNIFORM:
        scores = ((1.0,) * info.n_heads,) * info.n_layers
    head_map = HeadMap(
        scores=scores,
        scorer=plan.config.heads.scorer,
        projections=("v", "o"),
        model_name=info.name,
        model_digest=info.digest,
        dataset_hash=plan.content_hash,
        seed=plan.config.training.seed,
        precision="fp32",
        reproducibility=Reproducibility(rank_correlation=1.0, top_k_overlap=1, k=1, chance=0.1),
    )
    head_map.save(call.out / "head_map.json")


def _respond(call: StepCall) -> None:
    """Every head responds less to every further row: a shard as `p2d.response_matrix.save_shard` writes it, without numpy."""
    rows, info = load_rows(call.inputs / "rows.jsonl"), load_plan(call.inputs / "plan.json").model
    mine, heads = shard_range(len(rows), call.shard, call.shards), info.n_layers * info.n_heads
    facts = {"span": [mine.start, mine.stop], "layers": [0, info.n_layers], "n_heads": info.n_heads}
    split, end = 8 * len(mine), 8 * len(mine) + 2 * len(mine) * heads
    header = {
        "__metadata__": {"facts": json.dumps(facts | {"scorer": "stub", "combine": "response"})},
        "rows": {"dtype": "I64", "shape": [len(mine)], "data_offsets": [0, split]},
        "response": {"dtype": "F16", "shape": [len(mine), heads], "data_offsets": [split, end]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = struct.pack(f"<{len(mine)}q", *mine)
    numbers += struct.pack(f"<{len(mine) * heads}e", *(-row / 8 for row in mine for _ in range(heads)))
    path = call.out / f"responses-{call.shard:05d}.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)


def _span(path: Path) -> list[int]:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    span: list[int] = json.loads(header["__metadata__"]["facts"])["span"]
    return span


def _select(call: StepCall) -> None:
    rows = load_rows(call.inputs / "rows.jsonl")
    plan = load_plan(call.inputs / "plan.json")
    covered = [_span(path) for path in sorted(call.inputs.glob("responses-*.safetensors"))]
    assert [a for a, _ in covered] == [0, *(b for _, b in covered[:-1])], "shards leave a gap"
    assert covered[-1][1] == len(rows), "shards do not cover all rows"
    kept = max(1, len(rows) // 10)
    heads = top_count(heads_ratio(plan.config.heads), plan.model.n_layers * plan.model.n_heads)
    with (call.out / "selection.jsonl").open("w") as file:
        for index, row in enumerate(rows):
            score = -index / 8 * heads
            scored = {"row": index, "line": row.line, "score": score, "quality": None, "rank": index}
            text = {"prompt": row.prompt, "answer": row.answer} if index < kept else {}
            repeats = {"repeats": 0} if index >= max(kept, len(rows) - 2) else {}
            file.write(json.dumps(scored | {"kept": index < kept} | repeats | text) + "\n")
    summary = {"rows": len(rows), "kept": kept, "scorer": "stub", "combine": "sum", "heads": 1}
    write_json(call.out / "selection_summary.json", summary)


def _train(call: StepCall) -> None:
    chosen = (call.inputs / "selection.jsonl").read_bytes() + (call.inputs / "head_map.json").read_bytes()
    (call.out / "heads.safetensors").write_bytes(b"stub weights of " + chosen)
    write_json(call.out / "manifest.json", {"format": 1, "base_model": call.config.kind})
    log = [
        {"step": n, "epoch": 0, "loss": 1 / n, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens": 40}
        for n in range(1, 9)
    ]
    write_json(call.out / "training.json", {"steps": BATCHES, "n_parameters": 7, "learning_rate": 1e-3, "log": log})


def _evaluate(call: StepCall) -> None:
    weights = (call.inputs / "heads.safetensors").stat().st_size
    write_json(call.out / "evaluation.json", {"loss_before": 2.0, "loss_after": 1.0, "adapter_bytes": weights})
    rows = load_rows(call.inputs / "evaluation.jsonl")
    gain = 0.5 + heads_ratio(load_plan(call.inputs / "plan.json").config.heads)  # more heads, a lower loss
    losses = {"before": [10.0] * len(rows), "after": [10.0 - gain - n % 3 / 10 for n in range(len(rows))]}
    facts = {"format": 1, "rows_hash": content_hash(rows), "tokens": [5] * len(rows)}
    write_json(call.out / "row_losses.json", facts | losses)


def _package(call: StepCall) -> None:
    ran = json.loads((call.inputs / "steps.json").read_bytes())
    files = sorted(path.name for path in call.inputs.iterdir())
    write_json(
        call.out / "report.json", {"attempts": ran["steps"], "reused": ran["reused"], "files": files, "cost": COST}
    )


def _merge(call: StepCall) -> None:
    for path in call.model_dir.iterdir():
        if path.suffix in (".json", ".safetensors") and path.name != DIGEST_CACHE:
            (call.out / path.name).write_bytes(path.read_bytes())
    weights = call.out / "model.safetensors"
    content, adapter = weights.read_bytes(), (call.inputs / "heads.safetensors").read_bytes()
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end]) | {"__metadata__": {"merged with": hashlib.sha256(adapter).hexdigest()}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    weights.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])


def _export_peft(call: StepCall) -> None:
    write_json(call.out / "adapter_config.json", {"base_model_name_or_path": call.model_dir.name})
    (call.out / "adapter_model.safetensors").write_bytes((call.inputs / "heads.safetensors").read_bytes())


def _counts(rows: Sequence[Row]) -> RowCounts:
    return RowCounts(rows=len(rows), tokens=10 * len(rows), answer_tokens=5 * len(rows), longest=10)


def _text(path: Path, default: str) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return default


def _note(name: str, line: str) -> None:
    if folder := os.environ.get("STUB_DIR"):
        with (Path(folder) / name).open("a") as file:
            file.write(line)


_BODIES: dict[str, Callable[[StepCall], None]] = {
    "validate": _validate,
    "heads": _heads,
    "respond": _respond,
    "select": _select,
    "train": _train,
    "evaluate": _evaluate,
    "package": _package,
    "merge": _merge,
    "export_peft": _export_peft,
}
