"""Alignment is the cosine that autograd would give, without ever forming a row's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from p2d.arch import ARCHS
from p2d.batches import answer_nll, collate
from p2d.config import (
    FAST_ANSWER_TOKENS,
    FEWEST_LEFT,
    LOOK_APART,
    Auto,
    DataConfig,
    JobConfig,
    Kind,
    Projection,
    look_count,
)
from p2d.models import BaseModel, load_base_model
from p2d.response_matrix import ResponseShard
from p2d.responses import ResponseInput
from p2d.responses import alignment_likelihood as module
from p2d.responses.alignment import align, alignment, gradient_squares
from p2d.responses.alignment_likelihood import alignment_likelihood, plausibility
from p2d.rows import Row
from p2d.slices import HeadSlices
from tests.factories import some_rows, tiny_model_dir

ROWS, GUIDE = some_rows(6), some_rows(3, first=40)


def given(base: BaseModel, slices: tuple[Projection, ...], span: range = range(6)) -> ResponseInput:
    return ResponseInput(
        base=base, rows=ROWS, guide=GUIDE, span=span, slices=slices, config=JobConfig(data=DataConfig(mode="faithful"))
    )


def gradients(base: BaseModel, rows: list[Row], head: tuple[int, int], slices: tuple[Projection, ...]) -> list[Tensor]:
    """Each row's gradient for one head's slices, one backward pass a row, flattened."""
    found = []
    for row in rows:
        with HeadSlices(base, [head], slices) as sliced:
            nll_B, tokens_B = answer_nll(base, collate(base.renderer, [base.renderer.render(row)], [0]))
            (nll_B / tokens_B).sum().backward()
            found.append(torch.cat([g.flatten() for g in sliced.gradients().values()]))
    return found


@pytest.mark.parametrize("slices", [("v", "o"), ("q", "k", "v"), ("o",)])
def test_a_response_is_the_cosine_of_autograds_gradients(tiny: BaseModel, slices: tuple[Projection, ...]) -> None:
    response_RN = align(given(tiny, slices), range(tiny.info.n_layers), slices).cosine_RN

    for layer, head in [(0, 0), (1, 4), (2, 5)]:
        mean = torch.stack(gradients(tiny, GUIDE, (layer, head), slices)).mean(0)
        for row, gradient in enumerate(gradients(tiny, ROWS, (layer, head), slices)):
            expected = float(torch.nn.functional.cosine_similarity(gradient, mean, dim=0))
            assert response_RN[row, layer * tiny.info.n_heads + head] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", sorted(ARCHS))
def test_a_response_is_that_cosine_in_every_family(family: str, tmp_path: Path) -> None:
    slices: tuple[Projection, ...] = ("q", "k", "v", "o")
    base = load_base_model(tiny_model_dir(tmp_path / family, family=family), precision="fp32", device="cpu")

    found = align(given(base, slices, range(2)), range(1, base.info.n_layers), slices)

    head = (base.info.n_layers - 1, base.info.n_heads - 1)
    mean = torch.stack(gradients(base, GUIDE, head, slices)).mean(0)
    column = (head[0] - 1) * base.info.n_heads + head[1]
    for row, gradient in enumerate(gradients(base, ROWS[:2], head, slices)):
        expected = float(torch.nn.functional.cosine_similarity(gradient, mean, dim=0))
        assert found.cosine_RN[row, column] == pytest.approx(expected, abs=1e-5)


def test_the_default_reads_v_of_the_upper_third_and_no_graph_is_below(tiny: BaseModel) -> None:
    shard = alignment(given(tiny, ("v", "o"))).shard
    every = align(given(tiny, ("v", "o")), range(3), ("v",)).cosine_RN

    assert shard.layers == range(2, 3)
    np.testing.assert_allclose(shard.response_RN, every[:, 2 * tiny.info.n_heads :], atol=2e-3)  # fp16
    below = tiny.projection(1, "v")
    outputs: list[Tensor] = []
    handle = below.register_forward_hook(lambda _, args, output: outputs.append(output))
    alignment(given(tiny, ("v", "o")))
    handle.remove()
    assert outputs
    assert not any(output.requires_grad for output in outputs)


def test_a_head_whose_v_is_not_trained_is_read_where_it_is(tiny: BaseModel) -> None:
    shard = alignment(given(tiny, ("q", "o"))).shard

    expected = align(given(tiny, ("q", "o")), range(2, 3), ("q", "o")).cosine_RN
    assert shard.response_RN.tobytes() == expected.astype(np.float16).tobytes()


def test_the_forward_pass_knows_the_likelihood_as_well(tiny: BaseModel) -> None:
    found = align(given(tiny, ("v",)), range(2, 3), ("v",))

    for row, nll in zip(ROWS, found.nll_R, strict=True):
        with torch.no_grad():
            expected_B, _ = answer_nll(tiny, collate(tiny.renderer, [tiny.renderer.render(row)], [0]))
        assert nll == pytest.approx(float(expected_B), rel=1e-4)


def test_likelihood_joins_alignment_without_another_token(tiny: BaseModel) -> None:
    alone, joined = alignment(given(tiny, ("v", "o"))), alignment_likelihood(given(tiny, ("v", "o")))

    assert (joined.tokens, joined.flops) == (alone.tokens, alone.flops)
    assert joined.shard.guide_response_GN is None  # three guide rows tell too little
    assert joined.shard.response_RN.tobytes() == alone.shard.response_RN.tobytes()
    assert joined.shard.combine == "worse_rank"
    assert joined.shard.quality_R is not None
    for row, likelihood in zip(ROWS, joined.shard.quality_R, strict=True):
        with torch.no_grad():
            nll_B, tokens_B = answer_nll(tiny, collate(tiny.renderer, [tiny.renderer.render(row)], [0]))
        assert likelihood == pytest.approx(-float(nll_B / tokens_B), rel=1e-4)


def test_the_guides_answers_are_measured_in_the_pass_that_is_made_anyway(tiny: BaseModel) -> None:
    found = align(given(tiny, ("v",)), range(2, 3), ("v",))
    as_rows = align(replace(given(tiny, ("v",)), rows=GUIDE, span=range(3)), range(2, 3), ("v",))

    lengths = [len(row.answer_ids) for row in as_rows.rows]
    np.testing.assert_allclose(found.guide_likelihood_G, -as_rows.nll_R / lengths, rtol=1e-5)


def test_a_guides_row_is_rated_by_the_others(tiny: BaseModel) -> None:
    rated = align(given(tiny, ("v",)), range(2, 3), ("v",), rate_guide=True).guide_cosine_GN

    assert rated is not None
    for head in (0, 5):
        own = gradients(tiny, GUIDE, (2, head), ("v",))
        for row, gradient in enumerate(own):
            others = torch.stack(own[:row] + own[row + 1 :]).sum(0)
            expected = float(torch.nn.functional.cosine_similarity(gradient, others, dim=0))
            assert rated[row, head] == pytest.approx(expected, abs=1e-5)


def test_a_guide_that_says_enough_is_rated_by_the_pass_that_is_made_anyway(tiny: BaseModel) -> None:
    guide = some_rows(9, first=40)
    alone, joined = (scorer(replace(given(tiny, ("v",)), guide=guide)) for scorer in (alignment, alignment_likelihood))

    assert joined.tokens == alone.tokens
    assert alone.flops < joined.flops < 1.1 * alone.flops  # products of what the pass gave, and no other pass
    assert joined.shard.combine == "guide"
    assert joined.shard.guide_response_GN is not None
    assert joined.shard.guide_response_GN.shape == (9, joined.shard.response_RN.shape[1])
    as_rows = alignment_likelihood(replace(given(tiny, ("v",)), guide=guide, rows=guide, span=range(9))).shard
    assert as_rows.quality_R is not None
    assert joined.shard.guide_quality_G is not None
    np.testing.assert_allclose(as_rows.quality_R, joined.shard.guide_quality_G, rtol=1e-5)


GUIDED = np.array([-1.3, -1.2, -1.1, -1.0, -1.0, -0.9, -0.8, -0.7])
"""Median -1, spread 0.22: the bound lies at -0.55."""


def test_an_answer_is_as_plausible_as_it_is_likely_up_to_what_the_task_knows() -> None:
    likelihood_R = np.array([-9.0, -1.0, -0.6, -0.5, -0.1, 0.0])

    plausible_R = plausibility(likelihood_R, GUIDED)

    assert plausible_R[:3].tolist() == likelihood_R[:3].tolist()
    assert plausible_R[3] < likelihood_R[3]
    assert np.argsort(plausible_R).tolist() == [0, 5, 4, 1, 3, 2]  # what is too easy stands behind most of the task


def test_a_guide_that_knows_no_spread_sets_no_bound() -> None:
    likelihood_R = np.array([-2.0, 0.0])

    assert plausibility(likelihood_R, GUIDED[:7]).tolist() == likelihood_R.tolist()
    assert plausibility(likelihood_R, np.full(32, -1.0)).tolist() == likelihood_R.tolist()


def test_a_guide_of_which_less_than_half_is_bad_moves_the_bound_little() -> None:
    wrong = np.concatenate([GUIDED, [-5.0, -6.0, -7.0]])
    echoes = np.array([-0.1])

    assert plausibility(echoes, wrong)[0] < np.median(GUIDED)


def test_fast_mode_reads_only_how_answers_begin(tiny: BaseModel) -> None:
    long = [Row(row.prompt, row.answer + " and on" * 80, row.line) for row in ROWS]
    fast = JobConfig(data=DataConfig(mode="fast", ratio=1.0))
    opened = [tiny.renderer.render(row).answer_ids[:FAST_ANSWER_TOKENS] for row in long]

    whole = align(replace(given(tiny, ("v",)), rows=long), range(2, 3), ("v",))
    cut = align(replace(given(tiny, ("v",)), rows=long, config=fast), range(2, 3), ("v",))

    assert [row.answer_ids for row in cut.rows] == opened
    assert cut.tokens == whole.tokens - sum(len(row.answer_ids) - FAST_ANSWER_TOKENS for row in whole.rows)
    assert cut.flops < whole.flops
    for ids, row, nll in zip(opened, cut.rows, cut.nll_R, strict=True):
        with torch.no_grad():
            expected_B, _ = answer_nll(tiny, collate(tiny.renderer, [replace(row, answer_ids=ids)], [0]))
        assert nll == pytest.approx(float(expected_B), rel=1e-4)


def test_responses_do_not_depend_on_how_rows_are_sharded(tiny: BaseModel) -> None:
    whole = alignment(given(tiny, ("v", "o"))).shard.response_RN
    parts = [alignment(given(tiny, ("v", "o"), span)).shard.response_RN for span in (range(2), range(2, 6))]

    np.testing.assert_allclose(np.concatenate(parts).astype(float), whole.astype(float), atol=2e-3)


@pytest.mark.parametrize("tokens", [3, 40])  # pairs of tokens; one unit at a time
def test_both_ways_to_a_squared_norm_agree_with_forming_the_gradient(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    cut_BTUE = torch.randn(2, tokens, 3, 4, generator=generator)
    other_BTD = torch.randn(2, tokens, 5, generator=generator)

    expected_BU = torch.einsum("btue,btd->bued", cut_BTUE, other_BTD).square().sum((2, 3))

    torch.testing.assert_close(gradient_squares(cut_BTUE, other_BTD), expected_BU, rtol=1e-4, atol=1e-4)


TASK = some_rows(60, first=10)
LIKE_GUIDE = [row for place, row in enumerate(TASK) if place % 4]


def looks_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(module, "look_count", lambda rows: min(rows, count))


def looking(base: BaseModel, rows: list[Row], *, ratio: float | Auto, kind: Kind = "adapt") -> ResponseShard:
    """The shard of these rows; a sample is rated first where the ratio is left open."""
    asked = JobConfig(data=DataConfig(scorer="alignment_likelihood", mode="faithful", ratio=ratio), kind=kind)
    return alignment_likelihood(
        replace(given(base, ("v",)), rows=rows, guide=TASK[::4], span=range(len(rows)), config=asked)
    ).shard


def test_of_a_pool_like_the_guide_a_sample_alone_is_rated_where_the_ratio_is_left_open(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks_at(monkeypatch, 12)

    open_, named = looking(tiny, LIKE_GUIDE, ratio="auto"), looking(tiny, LIKE_GUIDE, ratio=0.5)

    assert (len(open_.row_R), open_.rest_like_guide) == (12, True)
    assert (len(named.row_R), named.rest_like_guide) == (45, False)
    assert open_.row_R.tolist() == sorted(set(open_.row_R.tolist())) != list(range(12))
    np.testing.assert_allclose(open_.response_RN, named.response_RN[open_.row_R], atol=1e-3)
    assert (
        len(looking(tiny, LIKE_GUIDE, ratio="auto", kind="select_data").row_R) == 45
    )  # scores are what such a job is for
    again = looking(tiny, LIKE_GUIDE, ratio="auto")
    assert again.response_RN.tobytes() == open_.response_RN.tobytes()


def test_a_pool_unlike_the_guide_is_rated_as_a_whole_as_if_no_sample_had_been_looked_at(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [Row(row.answer, row.prompt[::-1], line=row.line) for row in LIKE_GUIDE[:30]]
    whole = looking(tiny, rows, ratio="auto")
    looks_at(monkeypatch, 12)

    parts = looking(tiny, rows, ratio="auto")

    assert parts.row_R.tolist() == whole.row_R.tolist() == list(range(30))
    assert not parts.rest_like_guide
    np.testing.assert_allclose(parts.response_RN, whole.response_RN, atol=1e-3)
    assert parts.quality_R is not None
    assert whole.quality_R is not None
    np.testing.assert_allclose(parts.quality_R, whole.quality_R, rtol=1e-5)


UNLIKE = [Row(row.answer, f"{row.prompt[::-1]} {end}", line=row.line) for row in LIKE_GUIDE for end in "xyz"]
MIXED = [*LIKE_GUIDE, *UNLIKE]


def by_words(rows: Sequence[Row], row_R: npt.NDArray[np.int64], _: Sequence[Row]) -> npt.NDArray[np.bool_]:
    return np.array([rows[index] in UNLIKE for index in row_R.tolist()])


def test_rows_that_read_like_the_guide_are_vouched_for_by_those_of_the_sample_that_do(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks_at(monkeypatch, 30)
    monkeypatch.setattr(module, "unlike_guide", by_words)

    shard = looking(tiny, MIXED, ratio="auto")

    assert (int(shard.sample_R.sum()), len(shard.row_R), shard.rest_like_guide) == (30, 30 + LOOK_APART, True)
    assert shard.unlike_R is not None
    assert shard.unlike_R.tolist() == list(range(45, 180))
    looked_at = set(shard.row_R.tolist())
    assert shard.trusted_R.tolist() == [row for row in range(45) if row not in looked_at]
    assert shard.row_R[shard.sample_R].tolist() == [row for row in range(45) if row in looked_at]


def test_rows_that_words_set_apart_are_left_out_though_the_whole_sample_does_not_show_them(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks_at(monkeypatch, 40)
    rows = MIXED[:54]
    whole = looking(tiny, rows, ratio="auto")  # the words of these little sums say nothing
    monkeypatch.setattr(module, "unlike_guide", by_words)

    shard = looking(tiny, rows, ratio="auto")

    assert (whole.rest_like_guide, whole.unlike_R) == (True, None)
    assert shard.unlike_R is not None
    assert shard.unlike_R.tolist() == list(range(45, 54))


def test_rows_that_words_alone_speak_against_are_kept(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    looks_at(monkeypatch, 25)
    monkeypatch.setattr(module, "unlike_guide", lambda _, row_R, __: row_R % 3 == 0)

    shard = looking(tiny, LIKE_GUIDE, ratio="auto")

    assert (len(shard.row_R), shard.rest_like_guide, shard.unlike_R) == (25 + LOOK_APART, True, None)


def test_few_rows_that_words_set_apart_are_not_asked_about_by_themselves(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks_at(monkeypatch, 25)
    monkeypatch.setattr(module, "unlike_guide", lambda _, row_R, __: row_R < 5)

    shard = looking(tiny, LIKE_GUIDE, ratio="auto")

    assert (len(shard.row_R), shard.rest_like_guide, shard.unlike_R) == (25, True, None)


def test_in_the_whole_those_that_words_set_apart_count_for_as_many_as_there_are(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = MIXED[: len(LIKE_GUIDE) + 9]
    looks_at(monkeypatch, 25)
    monkeypatch.setattr(module, "unlike_guide", by_words)
    monkeypatch.setattr(module, "APART", 1.0)

    shard = looking(tiny, rows, ratio="auto")

    # A sixth of the rows, and a quarter of the sample: so many would show.
    assert (len(shard.row_R), shard.rest_like_guide, shard.unlike_R) == (25 + LOOK_APART, True, None)


@pytest.mark.parametrize(
    ("rows", "sampled"), [(12, 12), (40, 40), (41, 32), (250, 32), (264, 33), (600, 64), (2000, 64)]
)
def test_an_eighth_of_a_shard_is_sampled_within_bounds_where_that_spares_any(rows: int, sampled: int) -> None:
    assert look_count(rows) == sampled


def test_where_a_sample_would_spare_hardly_a_row_all_are_rated_at_once(tiny: BaseModel) -> None:
    few = looking(tiny, LIKE_GUIDE[:40], ratio="auto")
    more = looking(tiny, LIKE_GUIDE[:41], ratio="auto")
    repeated = looking(tiny, [*LIKE_GUIDE[:40], *LIKE_GUIDE[:40]], ratio="auto")

    assert [(len(shard.row_R), shard.rest_like_guide) for shard in (few, more, repeated)] == [
        (40, False), (32, True), (80, False)
    ]  # fmt: skip


def test_what_repeats_another_row_is_not_sampled(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    looks_at(monkeypatch, 36)

    shard = looking(tiny, [*LIKE_GUIDE, *LIKE_GUIDE], ratio="auto")

    assert (len(shard.row_R), shard.rest_like_guide) == (36, True)
    assert shard.row_R.max() < len(LIKE_GUIDE)
    assert len(shard.trusted_R) == 2 * len(LIKE_GUIDE) - 36


def test_where_words_leave_too_few_of_the_sample_or_such_as_the_model_doubts_all_rows_are_rated(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for rows, left in ((180, 0), (180, 22), (180, 23), (110, FEWEST_LEFT - 1), (110, FEWEST_LEFT)):
        looks_at(monkeypatch, rows - 20)
        monkeypatch.setattr(module, "unlike_guide", lambda _, row_R, __, left=left: row_R >= left)
        found[rows, left] = looking(tiny, MIXED[:rows], ratio="auto").unlike_R is not None
    monkeypatch.setattr(module, "unlike_guide", lambda rows, row_R, guide: ~by_words(rows, row_R, guide))

    wrong = looking(tiny, MIXED, ratio="auto")

    # An eighth, 16 at least.
    few, enough = [(180, 0), (180, 22), (110, FEWEST_LEFT - 1)], [(180, 23), (110, FEWEST_LEFT)]
    assert found == {**dict.fromkeys(few, False), **dict.fromkeys(enough, True)}
    assert (len(wrong.row_R), wrong.rest_like_guide, wrong.unlike_R) == (180, False, None)
