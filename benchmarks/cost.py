"""Part `cost`: AER in operations of whole jobs, in closed form, for the paper's dataset size. Nothing is run.

A job's operations over those of full fine-tuning on all rows (and of LoRA on all linear layers), same epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.findings import Findings, Ratio, Table, Target
from benchmarks.peers.data_whisperer import LAYER, group_flops
from benchmarks.workbench import Workbench
from p2d import flops
from p2d.config import PROXY_ROWS, DataConfig, HeadsConfig, JobConfig, TrainingConfig, top_count
from p2d.estimate import estimate_flops
from p2d.model_info import ModelInfo
from p2d.optimization import epoch_order
from p2d.plans import RowCounts
from p2d.resolution import resolve

ROWS, TOKENS, ANSWER = 6725, 150, 95
"""Training rows of GSM8K, tokens of a row and of its answer: rounded means, as a typical Llama tokenizer cuts them."""

GUIDE = 32

EPOCHS = (1, 3, 5)

BATCH = 4
"""Rows of a step of the padded baseline: as the default of `training.batch_size`."""

RATE = 1e-3
"""A given learning rate: no search."""

PROMPT = 300
"""Data Whisperer's instructions, in tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job whose cost is foreseen."""

    name: str
    recipe: str = "paper"
    data: DataConfig
    heads: HeadsConfig = field(default_factory=lambda: HeadsConfig(ratio=0.10))
    """Whole slices of the best tenth are trained by either recipe's projections, until decision 0032 the default."""
    target: Target | None = None
    """Of AER at three epochs with a learning rate given."""


FAITHFUL = DataConfig(ratio=0.10, mode="faithful")
FAST = DataConfig(ratio=0.10, mode="fast")

JOBS = (
    Job(name="recipe paper, faithful", data=FAITHFUL, target=Target(at="most", value=0.25)),
    Job(name="recipe paper, faithful, 10 demos", data=DataConfig(ratio=0.10, mode="faithful", n_demos=10)),
    Job(name="recipe paper, fast", data=FAST, target=Target(at="most", value=0.10)),
    Job(name="recipe default, faithful", recipe="default", data=FAITHFUL, target=Target(at="most", value=0.25)),
    Job(name="recipe default, fast", recipe="default", data=FAST, target=Target(at="most", value=0.10)),
    Job(
        name="random rows, random heads",
        data=DataConfig(ratio=0.10, mode="faithful", scorer="random"),
        heads=HeadsConfig(scorer="random", ratio=0.10),
    ),
)


def cost(bench: Workbench) -> Findings:
    """AER in operations at one, three and five epochs, against packed and padded baselines."""
    info = bench.base.info
    padding = padding_factor(bench)
    ratios = [
        Ratio(
            name=f"AER_flop at 3 epochs: {job.name}",
            rounds=(sum(job_flops(info, job, 3).values()) / full_flops(info, 3),),
            target=job.target,
            twin={"aer_lora_flop": sum(job_flops(info, job, 3).values()) / lora_flops(info, 3)},
        )
        for job in JOBS
    ]
    tables = (
        Table(
            title="AER_flop, learning rate given",
            columns=("job", *(f"E = {epochs}" for epochs in EPOCHS), *(f"E = {e}, padded" for e in EPOCHS)),
            lines=tuple(_lines(info, padding)),
        ),
        Table(
            title="The same at 3 epochs, by step; and with the search for the learning rate, which no baseline pays here",
            columns=("job", "heads", "respond", "train", "AER_flop", "AER_flop, searched"),
            lines=tuple(_steps(info)),
        ),
    )
    notes = (
        f"{info.name}, {ROWS:,} rows of {TOKENS} tokens, {ANSWER} of them answer; 10 % of heads and rows; both sides with the "
        "same epochs and logits at answer tokens alone.",
        f"The baseline without padding is the stronger one. Padded: batches of {BATCH} random rows, as wide as their longest, "
        f"{padding:.2f} times the tokens on the sample's rows.",
        "'recipe paper, fast' is a price alone: jobs refuse it, since its fast mode was not compared with its faithful mode.",
        "Peers: Data Whisperer's code with three answers of the reference's length for five rows, then masked training of all "
        "q, k and v; its proxy likewise. Its decoding costs far more time than its operations say.",
    )
    return Findings(ratios=tuple(ratios), tables=tables, notes=notes)


def job_flops(info: ModelInfo, job: Job, epochs: int, *, searched: bool = False) -> dict[str, float]:
    """Operations by step."""
    config = JobConfig(
        recipe=job.recipe,
        data=job.data,
        heads=job.heads,
        training=TrainingConfig(rank=None, epochs=epochs, learning_rate="auto" if searched else RATE),
    )
    resolved = resolve(config, rows=ROWS, context_length=info.context_length, head_dim=info.head_dim).config
    return estimate_flops(info, resolved, train=_counts(ROWS), guide=_counts(GUIDE))


def peers_flops(info: ModelInfo, epochs: int) -> float:
    """Data Whisperer's scoring and ALPS's masked training, as their code is written."""
    group = group_flops(info, prompt=PROMPT + 5 * TOKENS + 3 * (TOKENS - ANSWER), steps=3 * ANSWER, layer=LAYER)
    kept = epochs * top_count(0.10, ROWS) + PROXY_ROWS
    work = flops.work_of([(TOKENS, ANSWER)]).times(kept)
    return ROWS / 5 * group + flops.masked_training(info, work, projections=("q", "k", "v"))


def full_flops(info: ModelInfo, epochs: int) -> float:
    """Full fine-tuning on all rows."""
    return flops.full_fine_tuning(info, flops.work_of([(TOKENS, ANSWER)]).times(ROWS * epochs))


def lora_flops(info: ModelInfo, epochs: int) -> float:
    """LoRA on all linear layers and all rows."""
    return flops.lora_training(info, flops.work_of([(TOKENS, ANSWER)]).times(ROWS * epochs))


def padding_factor(bench: Workbench) -> float:
    """Tokens of random batches, padding included, over those of their rows."""
    lengths = [bench.base.renderer.length(bench.base.renderer.render(row)) for row in bench.rows]
    order = epoch_order(len(lengths), "0", 0)
    batches = [[lengths[row] for row in order[i : i + BATCH]] for i in range(0, len(order), BATCH)]
    return sum(len(batch) * max(batch) for batch in batches) / sum(lengths)


def _lines(info: ModelInfo, padding: float) -> Iterator[tuple[str | float, ...]]:
    for job in JOBS:
        aers = [sum(job_flops(info, job, epochs).values()) / full_flops(info, epochs) for epochs in EPOCHS]
        yield (job.name, *aers, *(aer / padding for aer in aers))
    aers = [peers_flops(info, epochs) / full_flops(info, epochs) for epochs in EPOCHS]
    yield ("the peers' own code", *aers, *(aer / padding for aer in aers))


def _steps(info: ModelInfo) -> Iterator[tuple[str | float, ...]]:
    full = full_flops(info, 3)
    for job in JOBS:
        steps = job_flops(info, job, 3)
        searched = sum(job_flops(info, job, 3, searched=True).values())
        yield (job.name, *(count / full for count in steps.values()), sum(steps.values()) / full, searched / full)


def _counts(rows: int) -> RowCounts:
    return RowCounts(rows=rows, tokens=rows * TOKENS, answer_tokens=rows * ANSWER, longest=2 * TOKENS)
