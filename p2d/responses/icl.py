"""Response of a head to a row = attention that answers pay to the row when it is shown as an example in context.

After Data Whisperer (arXiv 2505.12212): rows are split in two folds; groups of `n_demos` rows of one fold are shown
before `n_queries` rows of the other. Ours: answers are given (teacher forcing), so nothing has to be generated; the mass
is read inside the same forward pass; demonstrations are computed once, the queries are branches after them.
- response: mean attention of the queries' answer tokens to the demo, per demo token, the prefix left out, divided by the
  mean of its slot: the first slot draws 10 to 20 times the mass of the others, which would rank rows by the shuffle.
- quality: what `data.metric` makes of the queries' answers; the row's score is the product. The default is
  exp(log-likelihood per answer token with the demos, minus without). All metrics: METRICS.

Fast mode reads the masses alone: no answer is judged, and a group shows up to FAST_DEMOS rows.

Legend: B query, L layer, H query head, S slot of a demonstration, R row, N head counted through the layers, T token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from p2d import flops
from p2d.batches import answer_nlls
from p2d.branches import Tree, branching, plant
from p2d.config import Metric, icl_demos
from p2d.errors import Diverged
from p2d.generation import answer_limit, generate
from p2d.metrics import METRICS as TEXT_METRICS
from p2d.model_info import ModelInfo
from p2d.models import BaseModel
from p2d.probe import Probe, ProbePlan, Reader, Span, probe_attention
from p2d.rendering import RenderedRow
from p2d.response_matrix import ResponseShard
from p2d.responses import ResponseInput, Responses
from p2d.rows import Row

SLOT_ROWS = 8
"""Fewest rows whose mean a row's mass is divided by. A guess: a mean over 8 is good to a third of the spread."""

Floats = npt.NDArray[np.float64]

FOLDS = 2
"""Data Whisperer's k."""

QUERY_POOL = 32
"""Rows of each fold that serve as queries. A guess: few, so that their likelihood without demos is computed once and
the gains of different groups are against the same questions."""

KEPT_RENDERED = 1024
"""Rendered rows kept at most: each is asked for twice or more, close together."""


def icl(given: ResponseInput) -> Responses:
    """Masses and gains of every row of the span, but of those that leave no room for any query.

    Raises: Diverged if a likelihood or a mass is not finite.
    """
    base, info, data = given.base, given.base.info, given.config.data
    fast = data.mode == "fast"
    layers = range(info.n_layers)
    render = lru_cache(KEPT_RENDERED)(lambda row: base.renderer.render(given.rows[row]))
    collected = _Collected(given.wanted(), len(layers) * info.n_heads)
    judge = None if fast else METRICS[data.metric](base)
    tokens, operations = 0, 0.0
    with torch.no_grad(), probe_attention() as probe:
        for group in form_groups(given, render):
            scene = set_scene(base, [render(demo) for demo in group.demos], [render(query) for query in group.queries])
            mass_SN, h_TD = read_masses(base, probe, scene, layers)
            verdict = NO_VERDICT
            if judge is not None:
                verdict = judge(scene, [given.rows[query] for query in group.queries], h_TD)
            collected.add(group, mass_SN, verdict.quality)
            tokens += len(scene.ids) + verdict.tokens
            operations += scene.flops(info, judged=judge is not None) + verdict.flops
            given.progress(collected.rows_seen, collected.rows, {} if fast else {"quality": verdict.quality})
    row_R, response_RN, quality_R = collected.finish()
    if not (np.isfinite(response_RN).all() and np.isfinite(quality_R).all()):
        raise Diverged("A likelihood or an attention mass is not finite.")
    shard = ResponseShard(
        span=given.span,
        row_R=row_R,
        layers=layers,
        n_heads=info.n_heads,
        response_RN=response_RN.astype(np.float16),
        quality_R=None if fast else quality_R.astype(np.float32),
        scorer="icl",
        combine="response" if fast else "product",
    )
    return Responses(shard=shard, tokens=tokens, flops=round(operations))


# --- who is shown to whom --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Some demonstrations, in slot order, and the queries answered after them: indices of rows."""

    demos: tuple[int, ...]
    queries: tuple[int, ...]


def assign_folds(rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Fold of each row: equal sizes, at random, the same in every shard."""
    fold_R = np.arange(rows) % FOLDS
    return np.random.default_rng([seed, rows]).permutation(fold_R)


def query_pool(fold_R: npt.NDArray[np.int64], fold: int) -> list[int]:
    """Rows that serve as queries for demonstrations of `fold`: the first few of the other fold."""
    other = np.flatnonzero(fold_R != fold)
    return [int(row) for row in (other if len(other) else np.arange(len(fold_R)))[:QUERY_POOL]]


def form_groups(given: ResponseInput, render: Callable[[int], RenderedRow]) -> Iterator[Group]:
    """Groups that show every wanted row of the span at least once, one after another as they are asked for.

    A pure function of the span, the seed and the dataset. A group that would not fit the model's context has fewer
    demonstrations; where not even one fits before its queries, it has fewer queries or another one. A row that fits before
    no query at all is left out.
    """
    base, data, seed, span = given.base, given.config.data, given.config.training.seed, given.span
    fold_R = assign_folds(len(given.rows), seed)
    wanted = given.wanted()
    most = icl_demos(data, len(wanted))

    def length_of(query: int) -> int:
        row = render(query)  # behind the shared prefix, whatever system turn it has
        return len(base.renderer.prefix_ids) + len(row.prompt_ids) + len(row.answer_ids)

    def shown(demo: int) -> int:
        row = render(demo)
        return len(row.prompt_ids) + len(row.answer_ids) + len(base.renderer.separator_ids)

    turn = 0
    for fold in range(FOLDS):
        pool = query_pool(fold_R, fold)
        rows = wanted[fold_R[wanted] == fold]
        order = np.random.default_rng([seed, span.start, span.stop, fold]).permutation(rows)
        size = min(most, len(rows))
        # The last group is filled up with rows shown before, so that every slot is seen equally often.
        filling = order[: -len(order) % size] if size else order
        waiting = deque(int(row) for row in (*order, *filling))
        while waiting:
            queries = tuple(dict.fromkeys(pool[(turn + i) % len(pool)] for i in range(data.n_queries)))
            turn += data.n_queries
            queries = _that_fit(shown(waiting[0]), queries, pool, length_of, base.info.context_length)
            if not queries:
                waiting.popleft()
                continue
            room = base.info.context_length - max(length_of(query) for query in queries)
            demos: list[int] = []
            while waiting and len(demos) < size and shown(waiting[0]) <= room:
                room -= shown(waiting[0])
                demos.append(waiting.popleft())
            yield Group(tuple(demos), queries)


def _that_fit(
    shown: int, queries: tuple[int, ...], pool: Sequence[int], length_of: Callable[[int], int], context: int
) -> tuple[int, ...]:
    """Those of the queries that fit the context behind a demonstration of `shown` tokens, else the shortest of the pool, if
    that one does."""
    fitting = tuple(query for query in queries if shown + length_of(query) <= context)
    if fitting:
        return fitting
    shortest = min(pool, key=length_of)
    return (shortest,) if shown + length_of(shortest) <= context else ()


# --- one group -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scene:
    """A group as one line of tokens: prefix and demonstrations are the trunk, each query with its answer is a branch."""

    ids: list[int]
    tree: Tree
    demos: tuple[Span, ...]
    """Where each demonstration stands in the line."""
    answers: tuple[Span, ...]
    """Where each query's answer stands in the line."""
    queries: tuple[RenderedRow, ...]

    @property
    def trunk_ids(self) -> list[int]:
        """What is shown before the queries."""
        return self.ids[: self.tree.trunk]

    def flops(self, info: ModelInfo, *, judged: bool) -> float:
        """Of the pass that reads all masses, and of the logits at the answers if they are judged."""
        sizes = [(len(row.prompt_ids) + len(row.answer_ids), len(row.answer_ids)) for row in self.queries]
        return flops.icl_group(info, shown=self.tree.trunk, queries=sizes, judged=judged)


def set_scene(base: BaseModel, demos: Sequence[RenderedRow], queries: Sequence[RenderedRow]) -> Scene:
    """Lay a group out."""
    ids: list[int] = list(base.renderer.prefix_ids)
    spans: list[Span] = []
    for row in demos:
        spans.append((len(ids), len(ids) + len(row.prompt_ids) + len(row.answer_ids)))
        ids += [*row.prompt_ids, *row.answer_ids, *base.renderer.separator_ids]
    tree = plant(len(ids), [len(row.prompt_ids) + len(row.answer_ids) for row in queries])
    for row in queries:
        ids += [*row.prompt_ids, *row.answer_ids]
    answers = tuple((stop - len(row.answer_ids), stop) for (_, stop), row in zip(tree.branches, queries, strict=True))
    return Scene(ids, tree, tuple(spans), answers, tuple(queries))


def read_masses(base: BaseModel, probe: Probe, scene: Scene, layers: range) -> tuple[Floats, Tensor]:
    """One forward pass: mass of each demonstration per demo token, [S, N], mean over the queries; and the line's last
    hidden states h_TD."""
    readers = tuple(Reader(0, span, scene.tree.sees(b)) for b, span in enumerate(scene.answers))
    probe.plan = ProbePlan(readers=readers, spans=scene.demos, layers=layers)
    ids_1T = torch.tensor([scene.ids], device=base.device)
    with branching(scene.tree):
        h_TD = base.hidden(ids_1T, position_ids=scene.tree.positions(base.device))[0]
    mass_LBHS = probe.take()
    length_S = torch.tensor([stop - start for start, stop in scene.demos], device=base.device)
    mass_SN = (mass_LBHS.mean(dim=1) / length_S).permute(2, 0, 1).flatten(1)
    return mass_SN.double().cpu().numpy(), h_TD


class _Collected:
    """Masses by row and by slot, until all groups of the span are read: one number per row and head, no more."""

    def __init__(self, row_R: npt.NDArray[np.int64], heads: int) -> None:
        self._row_R = row_R
        self._place = {int(row): place for place, row in enumerate(row_R)}
        self._mass_RN = np.zeros((len(row_R), heads), dtype=np.float32)
        self._slot_R = np.full(len(row_R), -1)
        self._quality_R = np.zeros(len(row_R))
        self._sum_SN: list[Floats] = []
        self._times_S: list[int] = []
        self.rows, self.rows_seen = len(row_R), 0

    def add(self, group: Group, mass_SN: Floats, quality: float) -> None:
        """Note a group. A row that fills a group up, having been shown before, counts for its slot's mean alone."""
        for slot, demo in enumerate(group.demos):
            if slot == len(self._sum_SN):
                self._sum_SN.append(np.zeros(mass_SN.shape[1]))
                self._times_S.append(0)
            self._sum_SN[slot] += mass_SN[slot]
            self._times_S[slot] += 1
            place = self._place[demo]
            if self._slot_R[place] < 0:
                self._mass_RN[place] = mass_SN[slot]
                self._slot_R[place], self._quality_R[place] = slot, quality
                self.rows_seen += 1

    def finish(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], Floats]:
        """The rows that were shown; their response [R, N], each divided by its slot's mean per head; and quality [R]."""
        for slots in share_means(self._times_S):
            times = sum(self._times_S[slot] for slot in slots)
            mean_N = (np.sum([self._sum_SN[slot] for slot in slots], axis=0) / times).astype(np.float32)
            rows = np.isin(self._slot_R, slots)
            self._mass_RN[rows] = np.divide(
                self._mass_RN[rows], mean_N, out=np.zeros_like(self._mass_RN[rows]), where=mean_N != 0
            )
        seen = self._slot_R >= 0
        if seen.all():  # nearly always: without a copy
            return self._row_R, self._mass_RN, self._quality_R
        return self._row_R[seen], self._mass_RN[seen], self._quality_R[seen]


def share_means(times_S: Sequence[int]) -> list[list[int]]:
    """Slots in runs that share a mean, so that each is over SLOT_ROWS rows or more where there are so many.

    Late slots are rare where groups are cut to fit the context. The first slot draws far more mass than any other: it
    shares with none.
    """
    if not times_S:
        return []
    runs: list[list[int]] = []
    for slot in range(len(times_S) - 1, 0, -1):
        if runs and sum(times_S[other] for other in runs[-1]) < SLOT_ROWS:
            runs[-1].append(slot)
        else:
            runs.append([slot])
    if len(runs) > 1 and sum(times_S[other] for other in runs[-1]) < SLOT_ROWS:
        last = runs.pop()
        runs[-1] += last
    return [[0], *runs]


# --- metrics ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a group's queries are worth after its demonstrations."""

    quality: float
    """>= 0."""
    tokens: int = 0
    """Of passes besides the one that reads the masses, as are `flops`."""
    flops: float = 0.0


NO_VERDICT = Verdict(1.0)

Judge = Callable[[Scene, Sequence[Row], Tensor], Verdict]
"""(scene, the queries' rows, h_TD of the scene)."""


class _LogLikelihoodGain:
    """exp(mean over queries of the log-likelihood per answer token with the demonstrations, minus without)."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._alone: dict[tuple[int, ...], float] = {}

    def __call__(self, scene: Scene, rows: Sequence[Row], h_TD: Tensor) -> Verdict:
        logits_NV, target_N = _forced(self._base, scene, h_TD)
        nll_N = functional.cross_entropy(logits_NV, target_N, reduction="none").double()
        of_queries = nll_N.cpu().split([stop - start for start, stop in scene.answers])
        nll = [float(nll_N.mean()) for nll_N in of_queries]
        without, sizes = self._without(scene.queries)
        operations = flops.forward(self._base.info, flops.work_of(sizes))
        gain = float(np.mean(without) - np.mean(nll))
        return Verdict(float(np.exp(gain)), sum(length for length, _ in sizes), operations)

    def _without(self, queries: Sequence[RenderedRow]) -> tuple[list[float], list[tuple[int, int]]]:
        """Nats per answer token without demonstrations; of each query only once, since many groups ask the same ones.
        And (tokens, answer tokens) of those that were computed now."""
        keys = [(*query.prompt_ids, -1, *query.answer_ids) for query in queries]
        new = [query for query, key in zip(queries, keys, strict=True) if key not in self._alone]
        sizes = [(self._base.renderer.length(query), len(query.answer_ids)) for query in new]
        for indices, nll_B, tokens_B in answer_nlls(self._base, new, packed=False):
            for index, nll in zip(indices, (nll_B / tokens_B).tolist(), strict=True):
                self._alone[(*new[index].prompt_ids, -1, *new[index].answer_ids)] = nll
        return [self._alone[key] for key in keys], sizes


def _token_accuracy(base: BaseModel) -> Judge:
    """Share of the queries' answer tokens that are the model's first choice, each given the right ones before it."""

    def judge(scene: Scene, rows: Sequence[Row], h_TD: Tensor) -> Verdict:
        logits_NV, target_N = _forced(base, scene, h_TD)
        return Verdict(float((logits_NV.argmax(-1) == target_N).double().mean()))

    return judge


def _forced(base: BaseModel, scene: Scene, h_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] fp32 that predict each answer token of the scene, query after query, and those tokens."""
    at_N = torch.cat([torch.arange(start, stop) for start, stop in scene.answers]).to(h_TD.device)
    target_N = torch.tensor(scene.ids, device=h_TD.device)[at_N]
    # A token is predicted from the one before it; prompts are never empty, so that one is in the same branch.
    return base.logits(h_TD[at_N - 1]).float(), target_N


def _written(metric: str) -> Callable[[BaseModel], Judge]:
    """A metric on the answers that the model writes itself, greedily and all queries at once, up to the length of the
    longest reference. Decoding dominates the cost, by far."""

    def for_base(base: BaseModel) -> Judge:
        def judge(scene: Scene, rows: Sequence[Row], h_TD: Tensor) -> Verdict:
            answers = generate(
                base,
                [query.prompt_ids for query in scene.queries],
                limit=answer_limit(scene.queries),
                after=scene.trunk_ids,
            )
            scores = [
                TEXT_METRICS[metric](base.renderer.decode(ids), row.answer)
                for ids, row in zip(answers, rows, strict=True)
            ]
            trunk = scene.tree.trunk
            sizes = [len(query.prompt_ids) + len(ids) for query, ids in zip(scene.queries, answers, strict=True)]
            pairs = flops.causal_pairs(trunk) + sum(flops.causal_pairs(size, past=trunk) for size in sizes)
            work = flops.Work(tokens=trunk + sum(sizes), pairs=pairs, logits=sum(len(ids) for ids in answers))
            return Verdict(sum(scores) / len(scores), trunk + sum(sizes), flops.forward(base.info, work))

        return judge

    return for_base


METRICS: dict[Metric, Callable[[BaseModel], Judge]] = {
    "log_likelihood": _LogLikelihoodGain,
    "token_accuracy": _token_accuracy,
    "exact_match": _written("exact_match"),
    "rouge_l": _written("rouge_l"),
}
"""`data.metric` -> how the answers of a group are judged."""
