"""Which form of `alignment` tells clean rows from bad ones, guided by which rows, and for which share of an epoch.

    python -m benchmarks.scoring --model DIR --task gsm8k=DIR --task dialogsum=DIR

For each task a pool of which half of the rows is bad, in several known ways (`benchmarks.quality.pools`). Gradients of all v and o
slices are taken once; every form is read off them: fewer layers, fewer projections, joined with the likelihood that the same
forward pass knows. The guide, too, takes many forms: 8 to 128 clean rows, rows of which half are bad, as a user's own held-out
rows may be, and no held-out rows at all. Writes scoring.json and scoring.md. Nothing is trained here.

Legend: R row of the pool, G row of a guide, L layer, U unit, B row of a batch, T token, E unit width, D the other side's width.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.quality.matrix import read_tasks
from benchmarks.quality.pools import Junk, Pool, PoolSpec, Task, build
from benchmarks.workbench import machine
from p2d import flops
from p2d.arch.spec import n_units
from p2d.config import Projection, alignment_layers
from p2d.models import BaseModel, load_base_model
from p2d.rendering import RenderedRow
from p2d.responses.alignment import MeanGradient, Place, Sink, backward_passes, gradient_squares, per_token
from p2d.responses.alignment_likelihood import plausibility
from p2d.rows import Row
from p2d.selection import combine, ranks

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "results"

KINDS: dict[str, tuple[Junk, ...]] = {
    "gsm8k": ("another's answer", "off task", "echo", "wrong number"),
    "dialogsum": ("another's answer", "off task", "echo"),
}
"""Ways to be bad that a score could see: a near duplicate is right, and a matter of variety."""
V_O: tuple[Projection, ...] = ("v", "o")
KEPT = 0.25
CLEAN_ENDS, BAD_ENDS = (0, 8, 16, 32, 64, 128), (0, 16, 64)
"""Where the parts of guides end."""

Floats = npt.NDArray[np.float64]
Gradients = dict[Place, Tensor]


@dataclass(frozen=True, slots=True)
class Form:
    """What is read of the gradients."""

    name: str
    layers: range
    projections: tuple[Projection, ...]


def forms(n_layers: int) -> list[Form]:
    """From all to least."""
    return [
        Form("v and o, all layers", range(n_layers), V_O),
        Form("v, all layers", range(n_layers), ("v",)),
        Form(PRODUCT, alignment_layers(n_layers), ("v",)),
        Form("v, last 4 layers", range(max(0, n_layers - 4), n_layers), ("v",)),
        Form("v, last layer", range(n_layers - 1, n_layers), ("v",)),
    ]


PRODUCT = "v, upper third"
"""What `alignment` reads."""

GUIDES: dict[str, tuple[str, ...]] = {
    "8 clean rows": ("clean 8",),
    "32 clean rows": ("clean 8", "clean 16", "clean 32"),
    "128 clean rows": ("clean 8", "clean 16", "clean 32", "clean 64", "clean 128"),
    "32 rows, half bad": ("clean 8", "clean 16", "bad 16"),
    "128 rows, half bad": ("clean 8", "clean 16", "clean 32", "clean 64", "bad 16", "bad 64"),
}
"""A mean gradient is a sum: each guide is made of parts that are passed once. `clean 16` = clean rows 8 to 15."""
POOL = "the pool itself"


@dataclass(frozen=True, slots=True)
class Guide:
    """What rows of the task say of it."""

    mean: Gradients
    """Sum of their gradients: a mean but for its length."""
    likelihood_G: Floats
    """Nats per answer token."""


@dataclass(frozen=True, slots=True)
class Finding:
    """How one score did."""

    task: str
    guide: str
    form: str
    auroc: dict[str, float]
    """Clean against each kind of bad rows; 0.5 = no better than chance."""
    bad_kept: float
    """Share of bad rows among the best quarter."""
    share: float
    """Operations over those of one epoch of LoRA rank 8 on all linear layers and all rows."""


def guide_parts(task: Task) -> dict[str, list[Row]]:
    """Rows of each part of a guide; bad ones are clean rows with the answer of another."""
    rows, drawn = task.validation, random.Random("guide")  # noqa: S311 - not a secret
    clean, spare = rows[: CLEAN_ENDS[-1]], rows[CLEAN_ENDS[-1] :]
    answers = drawn.sample([row.answer for row in clean], len(spare))
    bad = [replace(row, answer=answer) for row, answer in zip(spare, answers, strict=True)]
    return {
        **{f"clean {end}": list(clean[start:end]) for start, end in pairwise(CLEAN_ENDS)},
        **{f"bad {end}": bad[start:end] for start, end in pairwise(BAD_ENDS)},
    }


@dataclass(slots=True)
class Study:
    """One pool of one task."""

    base: BaseModel
    pool: Pool
    task: Task
    say: Callable[[str], None]
    rendered: list[RenderedRow] = field(init=False)

    def __post_init__(self) -> None:
        self.rendered = [self.base.renderer.render(row) for row in self.pool.rows]

    def findings(self) -> list[Finding]:
        """Every form with every guide, and the likelihood alone."""
        parts = {name: self.guide(rows) for name, rows in self.parts().items()}
        guides = {name: added([parts[part] for part in some]) for name, some in GUIDES.items()}
        guides[POOL] = self.guide(self.rendered)
        products = Products(self.base, {name: guide.mean for name, guide in guides.items()}, len(self.rendered))
        likelihood_R = self.passed(self.rendered, products.of_rows, "products")
        found = [self._judged("", "likelihood", likelihood_R, self._share(None, 0))]
        for name, guide in guides.items():
            plausible_R = plausibility(likelihood_R, guide.likelihood_G)
            for form in forms(self.base.info.n_layers):
                cosine_R, share = products.cosine(name, form), self._share(form, len(guide.likelihood_G))
                scores = {"": cosine_R, " + plausibility, worse rank": combine(cosine_R, plausible_R, "worse_rank")}
                if form.name == PRODUCT:
                    scores[" + likelihood, worse rank"] = combine(cosine_R, likelihood_R, "worse_rank")
                    scores[" + likelihood, mean of ranks"] = -(ranks(-cosine_R) + ranks(-likelihood_R)) / 2
                found += [self._judged(name, form.name + how, score_R, share) for how, score_R in scores.items()]
        return found

    def parts(self) -> dict[str, list[RenderedRow]]:
        """Rendered rows of each part of a guide."""
        return {name: [self.base.renderer.render(row) for row in rows] for name, rows in guide_parts(self.task).items()}

    def guide(self, rows: list[RenderedRow]) -> Guide:
        """What some rows say of the task."""
        mean = MeanGradient()
        likelihood_G = self.passed(rows, lambda _: mean.add, "the gradient")
        return Guide(mean.gradient, likelihood_G)

    @property
    def _places(self) -> list[Place]:
        return [(layer, name) for layer in range(self.base.info.n_layers) for name in V_O]

    def passed(self, rows: list[RenderedRow], sink_of: Callable[[list[int]], Sink], what: str) -> Floats:
        """Hand every batch to its sink, return the likelihood of each answer in nats per token."""
        nll_R = np.zeros(len(rows))
        for indices, nll_B in backward_passes(self.base, rows, self._places, sink_of):
            nll_R[indices] = nll_B
        self.say(f"{self.pool.spec.task}: {what} of {len(rows)} rows")
        return per_token(nll_R, rows)

    def _judged(self, guide: str, form: str, score_R: Floats, share: float) -> Finding:
        clean = self.pool.clean
        auroc = {kind: auc(score_R[clean], score_R[sorted(of)]) for kind, of in self.pool.bad_by_kind.items()}
        auroc["all"] = auc(score_R[clean], score_R[sorted(self.pool.bad)])
        best = np.argsort(-score_R, kind="stable")[: round(KEPT * len(score_R))]
        bad_kept = len(self.pool.bad.intersection(best.tolist())) / len(best)
        return Finding(self.pool.spec.task, guide, form, auroc, bad_kept, share)

    def _share(self, form: Form | None, guide_rows: int) -> float:
        """Operations of scoring the pool over those of an epoch of LoRA; without a form, of one forward pass alone."""
        sizes = [(self.base.renderer.length(row), len(row.answer_ids)) for row in self.rendered]
        epoch = flops.lora_training(self.base.info, flops.work_of(sizes))
        if form is None:
            return flops.forward(self.base.info, flops.work_of(sizes)) / epoch
        typical = (round(fmean(length for length, _ in sizes)), round(fmean(answer for _, answer in sizes)))
        spent = flops.alignment(
            self.base.info,
            guide=[typical] * guide_rows,
            rows=sizes,
            projections=form.projections,
            from_layer=form.layers.start,
        )
        return spent / epoch


class Products:
    """Of every row, unit and layer: dot products with the mean gradients of several guides, and squared norms."""

    def __init__(self, base: BaseModel, guides: dict[str, Gradients], rows: int) -> None:
        layers, self._guides = base.info.n_layers, guides
        units = {name: n_units(base.info, name) for name in V_O}
        self._dot = {guide: {name: np.zeros((rows, layers, units[name])) for name in V_O} for guide in guides}
        self._square = {name: np.zeros((rows, layers, units[name])) for name in V_O}

    def of_rows(self, indices: list[int]) -> Sink:
        """Takes what one projection's backward pass tells of these rows."""

        def add(place: Place, cut_BTUE: Tensor, other_BTD: Tensor) -> None:
            layer, name = place
            self._square[name][indices, layer] = gradient_squares(cut_BTUE, other_BTD).double().numpy()
            for guide, mean in self._guides.items():
                along_BTUE = (other_BTD @ mean[place].flatten(0, 1).T).unflatten(-1, cut_BTUE.shape[2:])
                self._dot[guide][name][indices, layer] = (cut_BTUE * along_BTUE).sum(dim=(1, 3)).double().numpy()

        return add

    def cosine(self, guide: str, form: Form) -> Floats:
        """Mean cosine over the form's units, [R]."""
        cosines = []
        for name in form.projections:
            mean = self._guides[guide]
            norm_LU = np.stack([mean[layer, name].square().sum(dim=(1, 2)).numpy() for layer in form.layers])
            layers = slice(form.layers.start, form.layers.stop)
            scale = np.sqrt(self._square[name][:, layers] * norm_LU)
            cosines.append((self._dot[guide][name][:, layers] / scale).reshape(len(scale), -1))
        whole: Floats = np.concatenate(cosines, axis=1).mean(axis=1)
        return whole


def auc(above: Floats, below: Floats) -> float:
    """How often a number of the first group is above one of the second; ties count half."""
    wins = (above[:, None] > below).mean() + (above[:, None] == below).mean() / 2
    return float(wins)


def added(parts: Sequence[Guide]) -> Guide:
    """One guide of several."""
    mean = {place: torch.stack([part.mean[place] for part in parts]).sum(0) for place in parts[0].mean}
    return Guide(mean, np.concatenate([part.likelihood_G for part in parts]))


# --- the page --------------------------------------------------------------------------------------------------------


def page(findings: Sequence[Finding], facts: dict[str, str]) -> str:
    """Markdown: one table for each task and guide."""
    lines = ["# What tells clean rows from bad ones", "", *[f"{name}: {value}." for name, value in facts.items()], ""]
    lines += [
        "AUROC of clean rows against each kind of bad rows (0.5 = chance), the share of bad rows among the best "
        f"{KEPT:.0%} (half of the pool is bad), and the operations of scoring over those of one epoch of LoRA rank 8 on all "
        "linear layers and all rows. With `plausibility`, joined by the worse of the two ranks, it is what the product's "
        "`alignment_likelihood` does where fewer than 8 rows guide it, and did before it measured both by the guide "
        "(docs/decisions/0031).",
        "",
    ]
    for task in dict.fromkeys(one.task for one in findings):
        of_task = [one for one in findings if one.task == task]
        for guide in dict.fromkeys(one.guide for one in of_task):
            some = [one for one in of_task if one.guide == guide]
            kinds = list(some[0].auroc)
            lines += [f"## {task}, guided by {guide}" if guide else f"## {task}, without gradients", ""]
            lines += [
                "| form | " + " | ".join(kinds) + " | bad kept | share of an epoch |",
                "| --- " * (len(kinds) + 3) + "|",
            ]
            lines += [
                f"| {one.form} | "
                + " | ".join(f"{one.auroc[kind]:.2f}" for kind in kinds)
                + f" | {one.bad_kept:.0%} | {one.share:.2f} |"
                for one in some
            ]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Study every task, write scoring.json and scoring.md."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    base = load_base_model(options.model, precision="fp32", device="cpu")
    tasks = read_tasks(
        options.task, base, validation=CLEAN_ENDS[-1] + BAD_ENDS[-1], held_out=0, max_tokens=options.max_tokens
    )
    findings: list[Finding] = []
    for name, task in tasks.items():
        other = next((one for key, one in tasks.items() if key != name), None)
        spec = PoolSpec(name, min(options.rows, len(task.train)), KINDS[name], 0.5)
        findings += Study(base, build(spec, task, other), task, _say).findings()
        facts = {
            "Model": f"{base.info.name}, fp32",
            "Machine": f"{machine()}, {options.threads} threads",
            "Pools": f"at most {options.rows} rows of at most {options.max_tokens} tokens, one draw",
        }
        stored = {"facts": facts, "findings": [asdict(one) for one in findings]}
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "scoring.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
        (options.out / "scoring.md").write_text(page(findings, facts), encoding="utf-8")
    return 0


def _say(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)  # noqa: T201 - a command line


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of the base model")
    parser.add_argument(
        "--task", action="append", required=True, metavar="NAME=DIR", help="gsm8k or dialogsum; repeatable"
    )
    parser.add_argument("--rows", type=int, default=320, help="of a pool, or as many as the task has if fewer")
    parser.add_argument("--max-tokens", type=int, default=200, help="longer rows of a task are left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
