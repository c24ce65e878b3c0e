"""Quality of a row = how many nats its prompt saves on its answer, at the base model; no head has a part in it.

    (NLL per token of the answer behind an empty prompt - NLL per token behind the row's own) * answer tokens
An answer that does not belong to its prompt saves nothing: AUROC 1.00 against another row's answers (docs/LOG.md). An
answer that repeats its prompt saves most of all, so this score alone is fooled by echoes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from p2d import flops
from p2d.batches import answer_nlls
from p2d.errors import Diverged
from p2d.models import BaseModel
from p2d.rendering import RenderedRow
from p2d.responses import ResponseInput, Responses, of_rows_alone
from p2d.rows import Row

Floats = npt.NDArray[np.float64]


def information(given: ResponseInput) -> Responses:
    """Information of every wanted row's answer. Raises Diverged if a likelihood is not finite."""
    base, row_R = given.base, given.wanted()
    rows = [base.renderer.render(given.rows[index]) for index in row_R]
    bare = without_prompts(base, rows)
    total = 2 * len(rows)
    given_R = answer_nats(base, rows, lambda done: given.progress(done, total, {}))
    bare_R = answer_nats(base, bare, lambda done: given.progress(len(rows) + done, total, {}))
    shard = of_rows_alone(given, saved_nats(bare_R, given_R, row_R), "information", "quality")
    sizes = [(base.renderer.length(row), len(row.answer_ids)) for row in (*rows, *bare)]
    operations = flops.forward(base.info, flops.work_of(sizes))
    return Responses(shard=shard, tokens=sum(length for length, _ in sizes), flops=round(operations))


def without_prompts(base: BaseModel, rows: Sequence[RenderedRow]) -> list[RenderedRow]:
    """The same answers behind an empty prompt, in the same template."""
    empty = base.renderer.render(Row(prompt="", answer="1", line=0)).prompt_ids
    return [RenderedRow(empty, row.answer_ids) for row in rows]


def answer_nats(base: BaseModel, rows: Sequence[RenderedRow], progress: Callable[[int], None]) -> Floats:
    """NLL of each row's whole answer, [R], in nats; `progress` hears how many rows are done."""
    nll_R, done = np.zeros(len(rows)), 0
    for indices, nll_B, _ in answer_nlls(base, rows, packed=False):
        nll_R[indices] = nll_B.double().cpu().numpy()
        done += len(indices)
        progress(done)
    return nll_R


def saved_nats(bare_R: Floats, given_R: Floats, row_R: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Information of each answer, [R]. Raises Diverged where it is not finite."""
    saved_R = bare_R - given_R
    bad = np.flatnonzero(~np.isfinite(saved_R))
    if len(bad):
        raise Diverged(
            f"The likelihoods of {len(bad)} rows are not finite.", rows=[int(row_R[row]) for row in bad[:20]]
        )
    return saved_R.astype(np.float32)
