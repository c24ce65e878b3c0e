"""Part `respond`: scoring rows in context, beside Data Whisperer's code, a plain forward pass and an eager reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.counters import peak_extra_bytes
from benchmarks.eager import demo_masses
from benchmarks.findings import Findings, Ratio, Target
from benchmarks.peers.data_whisperer import DataWhisperer, Scored, group_flops
from benchmarks.workbench import Times, Workbench, per_round
from p2d import flops
from p2d.config import JobConfig
from p2d.flops import Work, causal_pairs
from p2d.head_maps import spearman
from p2d.models import BaseModel
from p2d.probe import probe_attention
from p2d.resolution import resolve
from p2d.responses import ResponseInput, Responses
from p2d.responses.icl import METRICS, Scene, icl, read_masses, set_scene
from p2d.rows import Row
from p2d.selection import select_rows
from p2d.slices import all_heads

DEMOS, QUERIES = 5, 3
"""Of one group: Data Whisperer's `BATCH_TRAIN` and `BATCH_TEST`."""

CONTEXT = 2048
"""Tokens of the context at which peak memory is compared."""

HEAD_SETS = 10

LAYERS_READ = 3
"""Of 30: a tenth of the heads."""

FIDELITY_GROUPS = 2

Floats = npt.NDArray[np.float64]


def respond(bench: Workbench) -> Findings:
    """All ratios of stage 2."""
    score = _Scoring(bench)
    dear, found = _against_data_whisperer(bench, score)
    ratios = [found, _memory(bench, score), *_against_a_forward_pass(bench, score)]
    ratios += [_sweep(bench, score, dear), _fidelity(bench, score)]
    return Findings(ratios=tuple(ratios), seconds=dear, notes=NOTES)


NOTES = (
    "Data Whisperer generates up to 8,192 tokens less the prompt; here it is stopped at the number of tokens that the "
    "reference answers of its group have, which flatters it: this model rarely stops by itself.",
    "The queries' likelihood without demonstrations is left out: it is computed once for a pool of 64 queries, under one per "
    "cent of a pass over a whole dataset.",
)


@dataclass(slots=True)
class _Scoring:
    """Ours, over whichever rows."""

    bench: Workbench

    def span(self, rows: range) -> Responses:
        """The engine's own `icl` over a span, all included."""
        base, every = self.bench.base, self.bench.rows
        info = base.info
        config = resolve(
            JobConfig(recipe="paper"), rows=len(every), context_length=info.context_length, head_dim=info.head_dim
        ).config
        slices = config.training.slices
        assert slices != "auto"
        return icl(ResponseInput(base=base, rows=every, guide=[], span=rows, slices=slices, config=config))

    def rows(self, demos: int = DEMOS, first: int = 0) -> tuple[list[Row], list[Row]]:
        """Rows in file order as demonstrations, and the last ones of all as queries."""
        return self.bench.rows[first : first + demos], self.bench.rows[-QUERIES:]

    def scene(self, demos: int = DEMOS, first: int = 0) -> Scene:
        """The same, laid out as the engine does."""
        render = self.bench.base.renderer.render
        shown, asked = self.rows(demos, first)
        return set_scene(self.bench.base, [render(row) for row in shown], [render(row) for row in asked])


def scene_masses(base: BaseModel, scene: Scene, layers: range | None = None) -> tuple[Floats, Tensor]:
    """Masses [demo, head] of one group as the engine reads them, and its last hidden states."""
    with torch.no_grad(), probe_attention() as probe:
        return read_masses(base, probe, scene, layers or range(base.info.n_layers))


# --- Data Whisperer ---------------------------------------------------------------------------------------------------


def _against_data_whisperer(bench: Workbench, score: _Scoring) -> tuple[Times, Ratio]:
    base = bench.base
    peer = DataWhisperer(bench.model_dir, device=base.device, dtype=base.dtype)
    demos, queries = score.rows()
    answers = sum(len(base.renderer.render(row).answer_ids) for row in queries)
    scene, judge = score.scene(), METRICS["log_likelihood"](base)
    found: list[Scored] = []

    @torch.no_grad()
    def ours() -> None:
        _, h_TD = scene_masses(base, scene)
        judge(scene, queries, h_TD)  # remembers the queries' likelihoods without demonstrations from the warm-up on

    times = bench.take_turns(
        {
            "ours": ours,
            "Data Whisperer": lambda: found.append(peer.score_group(demos, queries, max_new_tokens=answers)),
        },
        unwarmed=("Data Whisperer",),
    )
    theirs = found[0]
    prompt, steps = theirs.prompt_tokens, theirs.decode_steps
    operations = group_flops(base.info, prompt=prompt, steps=steps, layer=peer.layer)
    tokens = prompt * (1 + (peer.layer + 1) / base.info.n_layers) + steps - 1  # in passes through all layers
    twin = {
        "FLOP per row, theirs / ours": operations / scene.flops(base.info, judged=True),
        "decode steps per row, theirs": theirs.decode_steps / DEMOS,
        "decode steps per row, ours": 0,
        "tokens per row, theirs": tokens / DEMOS,
        "tokens per row, ours": len(scene.ids) / DEMOS,
    }
    ratio = Ratio(
        name="rows per second, ours / Data Whisperer's code",
        rounds=tuple(per_round(times["Data Whisperer"], times["ours"])),
        target=Target(at="least", value=8),
        twin=twin,
    )
    return times, ratio


def _memory(bench: Workbench, score: _Scoring) -> Ratio:
    """Peak memory beyond the model at a long context."""
    base = bench.base
    demos = _demos_for(score, CONTEXT)
    scene, (shown, asked) = score.scene(demos), score.rows(demos)
    bench.say(f"  peak memory at {CONTEXT} tokens")
    peer = DataWhisperer(bench.model_dir, device=base.device, dtype=base.dtype)
    theirs = peak_extra_bytes(base.device, lambda: peer.score_group(shown, asked, max_new_tokens=2))
    ours = peak_extra_bytes(base.device, lambda: scene_masses(base, scene))
    # Scores, their softmax in fp32 and its copy back, of one eager layer; ours: scores of one query's answer, fp32.
    matrix = len(scene.ids) ** 2 * (2 * base.dtype.itemsize + 4)
    read = max(stop - start for start, stop in scene.answers) * len(scene.ids) * 4
    kept = base.info.n_layers * base.info.n_heads * len(scene.ids) ** 2 * base.dtype.itemsize
    return Ratio(
        name=f"peak memory beyond the model at {CONTEXT} tokens, Data Whisperer's code / ours",
        rounds=(theirs / ours,),
        target=Target(at="least", value=30),
        twin={
            "MB, theirs": theirs / 1e6,
            "MB, ours": ours / 1e6,
            "attention bytes of a layer": matrix / read,
            "all layers' attention, as `output_attentions` keeps it, over ours": kept / ours,
        },
        note="masses of all heads; its own second pass keeps one layer's attention",
    )


def _demos_for(score: _Scoring, tokens: int) -> int:
    """How many rows in file order fill a context."""
    demos = 1
    while demos < len(score.bench.rows) - QUERIES and len(score.scene(demos + 1).ids) <= tokens:
        demos += 1
    return demos


# --- one forward pass -------------------------------------------------------------------------------------------------


def _against_a_forward_pass(bench: Workbench, score: _Scoring) -> Iterator[Ratio]:
    """A group's masses and likelihoods, beside one causal forward pass of as many tokens with as many logits."""
    base = bench.base
    scene, every = score.scene(), range(base.info.n_layers)
    tokens, answers = len(scene.ids), sum(stop - start for start, stop in scene.answers)
    ids_1T = torch.tensor([scene.ids], device=base.device)

    def ours(layers: range) -> Tensor:
        _, h_TD = scene_masses(base, scene, layers)
        return base.logits(h_TD[-answers:]).float()

    @torch.no_grad()
    def plain() -> Tensor:
        return base.logits(base.hidden(ids_1T)[0, -answers:]).float()

    last = every[-LAYERS_READ:]
    times = bench.take_turns({"all heads": lambda: ours(every), "a tenth": lambda: ours(last), "forward": plain})
    forward = flops.forward(base.info, Work(tokens=tokens, pairs=causal_pairs(tokens), logits=answers))
    probe = scene.flops(base.info, judged=True)
    yield Ratio(
        name="a group scored with masses of all heads / one plain forward pass of as many tokens",
        rounds=tuple(per_round(times["all heads"], times["forward"])),
        target=Target(at="most", value=1.2),
        twin={"FLOP": probe / forward, "tokens": 1, "forward passes": 1},
    )
    yield Ratio(
        name=f"the same, masses of {LAYERS_READ * base.info.n_heads} heads ({LAYERS_READ} layers)",
        rounds=tuple(per_round(times["a tenth"], times["forward"])),
        target=Target(at="most", value=1.05),
        twin={"tokens": 1, "forward passes": 1},
    )


def _sweep(bench: Workbench, score: _Scoring, times: Times) -> Ratio:
    """Ten head sets for one pass over the rows."""
    rows = min(bench.scored, len(bench.rows))
    bench.say(f"  responses of {rows} rows")
    shards = [score.span(range(rows)).shard]
    heads = all_heads(bench.base)
    sets = [heads[i::HEAD_SETS] for i in range(HEAD_SETS)]

    def select(chosen: Sequence[list[tuple[int, int]]]) -> None:
        for some in chosen:
            select_rows(shards, some, 0.1, bench.rows[:rows], seed=0)

    selecting = bench.take_turns({"one": lambda: select(sets[:1]), "ten": lambda: select(sets)})
    responding = [seconds * rows / DEMOS for seconds in times["ours"]]
    both = zip(responding, selecting["one"], selecting["ten"], strict=True)
    return Ratio(
        name=f"{HEAD_SETS} head sets / one, responses included",
        rounds=tuple((once + ten) / (once + one) for once, one, ten in both),
        target=Target(at="most", value=1.01),
        twin={"forward passes": 1},
    )


# --- fidelity ---------------------------------------------------------------------------------------------------------


def _fidelity(bench: Workbench, score: _Scoring) -> Ratio:
    """Masses of the engine against those of eager attention, one separate forward pass for every query, in fp32."""
    base = bench.base
    scenes = [score.scene(first=i * DEMOS) for i in range(FIDELITY_GROUPS)]
    bench.say("  eager reference")
    ours = np.concatenate([scene_masses(base, scene)[0] for scene in scenes])
    reference = np.concatenate([demo_masses(bench.model_dir, base, scene) for scene in scenes])
    per_head = [spearman(ours[:, head].tolist(), reference[:, head].tolist()) for head in range(ours.shape[1])]
    return Ratio(
        name=f"rank correlation of row scores with an eager reference in fp32, {len(ours)} rows",
        rounds=(spearman(ours.sum(axis=1).tolist(), reference.sum(axis=1).tolist()),),
        target=Target(at="least", value=0.999),
        twin={
            "largest relative error of a row's score": float(np.abs(ours.sum(1) / reference.sum(1) - 1).max()),
            "median over heads of a head's rank correlation": float(np.median(per_head)),
        },
        note=f"ours in {str(base.dtype).removeprefix('torch.')}",
    )
