"""Response of a head to a row = attention that answers pay to the row when it is shown as an example in context.

After Data Whisperer (arXiv 2505.12212): rows are split in two folds; groups of `n_demos` rows of one fold are shown
before `n_queries` rows of the other. Ours: answers are given (teacher forcing), so nothing is generated; the mass is read
inside the same forward pass; demonstrations are computed once for all queries of a group (their keys are shared).
- response: mean attention of the queries' answer tokens to the demo, per demo token, the prefix left out, divided by the
  mean of its slot: the first slot draws 10 to 20 times the mass of the others, which would rank rows by the shuffle.
- quality: exp(log-likelihood per answer token with the demos, minus without), positive; the row's score is the product.

Legend: B query, H head, L layer, S slot of a demonstration, N head counted through the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import DynamicCache

from p2d import flops
from p2d.batches import answer_nll, collate, token_budget_batches
from p2d.errors import Diverged
from p2d.models import BaseModel
from p2d.probe import Probe, ProbePlan, probe_attention
from p2d.rendering import RenderedRow
from p2d.response_matrix import ResponseShard
from p2d.responses import ResponseInput, Responses

FOLDS = 2
"""Data Whisperer's k."""

QUERY_POOL = 32
"""Rows of each fold that serve as queries. A guess: few, so that their likelihood without demos is computed once and
the gains of different groups are against the same questions."""

TOKENS = 4096
"""Tokens of one batch of queries without demos."""


@dataclass(frozen=True, slots=True)
class Group:
    """Some demonstrations, in slot order, and the queries answered after them: indices of rows."""

    demos: tuple[int, ...]
    queries: tuple[int, ...]


def icl(given: ResponseInput) -> Responses:
    """Masses and gains of every row of the span. Raises Diverged if a likelihood is not finite."""
    base, config = given.base, given.config
    fold_R = assign_folds(len(given.rows), config.training.seed)
    pools = [query_pool(fold_R, fold) for fold in range(FOLDS)]
    rendered = {row: base.renderer.render(given.rows[row]) for row in {*given.span, *pools[0], *pools[1]}}
    groups = list(form_groups(given, fold_R, pools, rendered))
    asked = sorted({query for group in groups for query in group.queries})
    with torch.no_grad():
        alone_nll = dict(zip(asked, _nll_alone(base, [rendered[row] for row in asked]), strict=True))
        collected = _Collected(len(given.span), base.info.n_layers * base.info.n_heads)
        tokens = sum(base.renderer.length(rendered[row]) for row in asked)
        alone = [(base.renderer.length(rendered[row]), len(rendered[row].answer_ids)) for row in asked]
        operations = flops.forward(base.info, flops.work_of(alone))
        with probe_attention(base.info.n_layers) as probe:
            for done, group in enumerate(groups, start=1):
                mass_SN, nll_B = read_group(base, probe, group, rendered)
                gain = float(np.mean([alone_nll[query] - nll for query, nll in zip(group.queries, nll_B, strict=True)]))
                collected.add(group, mass_SN, gain, start=given.span.start)
                tokens += sum(base.renderer.length(rendered[row]) for row in (*group.demos, *group.queries))
                operations += _group_flops(base, group, rendered)
                given.progress(done, len(groups), {"gain": gain})
    response_RN, quality_R = collected.finish()
    if not (np.isfinite(response_RN).all() and np.isfinite(quality_R).all()):
        raise Diverged("A likelihood or an attention mass is not finite.")
    shard = ResponseShard(
        start=given.span.start,
        response_RN=response_RN.astype(np.float16),
        quality_R=quality_R.astype(np.float32),
        scorer="icl",
        combine="product",
        n_heads=base.info.n_heads,
    )
    return Responses(shard=shard, tokens=tokens, flops=round(operations))


def assign_folds(rows: int, seed: int) -> npt.NDArray[np.int64]:
    """Fold of each row: equal sizes, at random, the same in every shard."""
    fold_R = np.arange(rows) % FOLDS
    return np.random.default_rng([seed, rows]).permutation(fold_R)


def query_pool(fold_R: npt.NDArray[np.int64], fold: int) -> list[int]:
    """Rows that serve as queries for demonstrations of `fold`: the first few of the other fold."""
    other = np.flatnonzero(fold_R != fold)
    return [int(row) for row in (other if len(other) else np.arange(len(fold_R)))[:QUERY_POOL]]


def form_groups(
    given: ResponseInput,
    fold_R: npt.NDArray[np.int64],
    pools: Sequence[Sequence[int]],
    rendered: dict[int, RenderedRow],
) -> Iterator[Group]:
    """Groups that show every row of the span at least once; a pure function of the span, the seed and the dataset.

    A group that would not fit the model's context has fewer demonstrations.
    """
    base, span = given.base, given.span
    turn = 0
    for fold in range(FOLDS):
        rows = [row for row in span if fold_R[row] == fold]
        order = np.random.default_rng([given.config.training.seed, span.start, span.stop, fold]).permutation(rows)
        waiting = [int(row) for row in order]
        size = min(given.config.data.n_demos, len(rows))
        # The last group is filled up with rows shown before, so that every slot is seen equally often.
        waiting += waiting[: -len(waiting) % size] if size else []
        while waiting:
            pool = pools[fold]
            queries = tuple(dict.fromkeys(pool[(turn + i) % len(pool)] for i in range(given.config.data.n_queries)))
            turn += given.config.data.n_queries
            room = base.info.context_length - max(base.renderer.length(rendered[query]) for query in queries)
            demos: list[int] = []
            while waiting and len(demos) < size:
                room -= _demo_length(base, rendered[waiting[0]])
                if demos and room < 0:
                    break
                demos.append(waiting.pop(0))
            yield Group(tuple(demos), queries)


def _demo_length(base: BaseModel, row: RenderedRow) -> int:
    return len(row.prompt_ids) + len(row.answer_ids) + len(base.renderer.separator_ids)


def _group_flops(base: BaseModel, group: Group, rendered: dict[int, RenderedRow]) -> float:
    shown = len(base.renderer.prefix_ids) + sum(_demo_length(base, rendered[demo]) for demo in group.demos)
    queries = [rendered[query] for query in group.queries]
    sizes = [(len(row.prompt_ids) + len(row.answer_ids), len(row.answer_ids)) for row in queries]
    return flops.icl_group(base.info, shown=shown, queries=sizes)


def _nll_alone(base: BaseModel, rendered: Sequence[RenderedRow]) -> list[float]:
    """Nats per answer token of each row without demonstrations."""
    nll = np.zeros(len(rendered))
    lengths = [base.renderer.length(row) for row in rendered]
    for indices in token_budget_batches(lengths, TOKENS):
        nll_B, tokens_B = answer_nll(base, collate(base.renderer, rendered, indices))
        nll[indices] = (nll_B / tokens_B).double().cpu().numpy()
    return [float(value) for value in nll]


def read_group(
    base: BaseModel, probe: Probe, group: Group, rendered: dict[int, RenderedRow]
) -> tuple[npt.NDArray[np.float64], list[float]]:
    """One group: mass per demo token [S, N], and each query's nats per answer token. Two passes over disjoint tokens."""
    ids: list[int] = list(base.renderer.prefix_ids)
    spans: list[tuple[int, int]] = []
    for demo in group.demos:
        row = rendered[demo]
        spans.append((len(ids), len(ids) + len(row.prompt_ids) + len(row.answer_ids)))
        ids += [*row.prompt_ids, *row.answer_ids, *base.renderer.separator_ids]
    cache = DynamicCache(config=base.module.config)
    base.hidden(torch.tensor([ids], device=base.device), past_key_values=cache)
    cache.batch_repeat_interleave(len(group.queries))

    queries = [rendered[query] for query in group.queries]
    width = max(len(row.prompt_ids) + len(row.answer_ids) for row in queries)
    longest = max(len(row.answer_ids) for row in queries)
    input_ids_BT = torch.full((len(queries), width), base.renderer.pad_id)
    position_BQ = torch.zeros((len(queries), longest), dtype=torch.long)
    valid_BQ = torch.zeros((len(queries), longest), dtype=torch.bool)
    for b, row in enumerate(queries):
        both = [*row.prompt_ids, *row.answer_ids]
        input_ids_BT[b, : len(both)] = torch.tensor(both)
        position_BQ[b, : len(row.answer_ids)] = torch.arange(len(row.prompt_ids), len(both))
        valid_BQ[b, : len(row.answer_ids)] = True
    input_ids_BT, position_BQ, valid_BQ = (t.to(base.device) for t in (input_ids_BT, position_BQ, valid_BQ))
    probe.plan = ProbePlan(position_BQ=position_BQ, valid_BQ=valid_BQ, past=len(ids), spans=tuple(spans))
    h_BTD = base.hidden(input_ids_BT, past_key_values=cache)
    mass_LBHS = probe.take()

    row_N, column_N = valid_BQ.nonzero(as_tuple=True)
    at_N = position_BQ[row_N, column_N]
    logits_NV = base.logits(h_BTD[row_N, at_N - 1]).float()  # a token is predicted from the one before it
    nll_N = functional.cross_entropy(logits_NV, input_ids_BT[row_N, at_N], reduction="none")
    nll_B = torch.zeros(len(queries), device=base.device).index_add(0, row_N, nll_N) / valid_BQ.sum(1)

    length_S = torch.tensor([stop - start for start, stop in spans], device=base.device)
    mass_SN = (mass_LBHS.mean(dim=1) / length_S).permute(2, 0, 1).flatten(1)
    return mass_SN.double().cpu().numpy(), [float(value) for value in nll_B]


class _Collected:
    """Masses by row and by slot, until all groups of the span are read."""

    def __init__(self, rows: int, heads: int) -> None:
        self._entries: list[tuple[int, int, npt.NDArray[np.float64]]] = []
        self._gain_R = np.zeros(rows)
        self._times_R = np.zeros(rows)
        self._shape = (rows, heads)

    def add(self, group: Group, mass_SN: npt.NDArray[np.float64], gain: float, *, start: int) -> None:
        for slot, demo in enumerate(group.demos):
            self._entries.append((demo - start, slot, mass_SN[slot]))
            self._gain_R[demo - start] += gain
            self._times_R[demo - start] += 1

    def finish(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Response [R, N], each divided by its slot's mean per head and averaged over groups; and quality [R]."""
        slots = 1 + max(slot for _, slot, _ in self._entries)
        sum_SN, times_S = np.zeros((slots, self._shape[1])), np.zeros(slots)
        for _, slot, mass_N in self._entries:
            sum_SN[slot] += mass_N
            times_S[slot] += 1
        mean_SN = sum_SN / times_S[:, None]
        response_RN = np.zeros(self._shape)
        for row, slot, mass_N in self._entries:
            response_RN[row] += np.divide(mass_N, mean_SN[slot], out=np.zeros_like(mass_N), where=mean_SN[slot] != 0)
        return response_RN / self._times_R[:, None], np.exp(self._gain_R / self._times_R)
