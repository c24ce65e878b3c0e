"""One contract for every model family: its spec finds each head's own weights, and the engine treats it as it treats Llama.

The reference is the same model as transformers loads it, with eager attention: nothing of ours between.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from p2d.adapters import load_adapter, merge, save_adapter
from p2d.arch import ARCHS
from p2d.arch.spec import n_units, unit_rows, unit_view, units_of
from p2d.batches import answer_nll, collate, pack
from p2d.config import (
    DATA_SCORERS,
    HEAD_SCORERS,
    DataConfig,
    HeadsConfig,
    JobConfig,
    Precision,
    Projection,
    TrainingConfig,
)
from p2d.generation import generate
from p2d.identify import identify_heads
from p2d.models import BaseModel, load_base_model
from p2d.registry import load
from p2d.rendering import RenderedRow, load_renderer
from p2d.responses import DataScorer, ResponseInput
from p2d.responses.alignment import align
from p2d.rows import Row
from p2d.slices import HeadSlices
from tests.factories import TINY, WINDOW, some_rows, tiny_model_dir
from tests.loaded import as_transformers_has_it, loaded

ALL: tuple[Projection, ...] = ("q", "k", "v", "o")
HEADS = [(1, 0), (1, 4), (2, 5)]
LAYER = 1
ROWS, GUIDE = some_rows(16), some_rows(4, first=100)

TOGETHER: dict[str, set[Projection]] = {"olmo2": {"q", "k"}}
"""Projections whose outputs are normalised over all heads at once: a change of one head's weights reaches the others."""


@pytest.fixture(scope="module", params=sorted(ARCHS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of one family."""
    return tiny_model_dir(tmp_path_factory.mktemp("models") / request.param, family=request.param)


@pytest.fixture
def base(directory: Path) -> BaseModel:
    """It, of one test alone."""
    return loaded(directory)


@pytest.fixture
def reference(directory: Path) -> PreTrainedModel:
    """It, as transformers loads it, with eager attention and trainable weights."""
    return as_transformers_has_it(directory)


@pytest.fixture
def rendered(base: BaseModel) -> list[RenderedRow]:
    """Some rows as the model reads them, longer than its sliding window."""
    return [base.renderer.render(row) for row in ROWS[:8]]


def ids_of(base: BaseModel, row: RenderedRow) -> Tensor:
    return collate(base.renderer, [row], [0]).input_ids_BT


def module_weights(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def mean_loss(base: BaseModel, rendered: list[RenderedRow]) -> Tensor:
    nll_B, tokens_B = answer_nll(base, collate(base.renderer, rendered, range(len(rendered))))
    return nll_B.sum() / tokens_B.sum()


def eager_nll(reference: PreTrainedModel, base: BaseModel, row: RenderedRow) -> Tensor:
    """Nats of a row's answer, in sum."""
    ids_BT, answer = ids_of(base, row), len(row.answer_ids)
    logits_TV = reference(ids_BT).logits[0, -answer - 1 : -1]
    return torch.nn.functional.cross_entropy(logits_TV, ids_BT[0, -answer:], reduction="sum")


def full_gradient(module: PreTrainedModel, base: BaseModel, layer: int, projection: Projection) -> Tensor:
    """What autograd left at a whole weight, unit by unit."""
    gradient = module.get_parameter(base.spec.weight_name(layer, projection)).grad
    assert gradient is not None
    return unit_view(base.spec, base.info, projection, gradient)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_every_family_has_a_tiny_model() -> None:
    assert TINY.keys() == ARCHS.keys()


def test_the_description_counts_what_the_loaded_model_has(base: BaseModel, reference: PreTrainedModel) -> None:
    assert base.info.parameters == sum(weight.numel() for weight in reference.parameters())
    assert base.info.n_layers == len(reference.get_submodule(base.spec.layers))  # type: ignore[arg-type]
    mlp = reference.get_submodule(base.spec.layers + ".0.mlp")
    matrices = sum(weight.numel() for weight in mlp.parameters() if weight.ndim == 2)
    assert matrices == base.info.mlp_matrices * base.info.hidden_size * base.info.intermediate_size


def test_the_description_knows_the_window_of_the_loaded_model(
    base: BaseModel, reference: PreTrainedModel, rendered: list[RenderedRow]
) -> None:
    with torch.no_grad():
        attentions = reference(ids_of(base, rendered[0]), output_attentions=True).attentions

    seen = [int((prob_BHTT[0, :, -1] > 0).any(0).sum()) for prob_BHTT in attentions]
    windowed = [keys for keys in seen if keys < attentions[0].shape[-1]]
    assert (len(windowed), set(windowed)) == (base.info.n_windowed_layers, {WINDOW} if windowed else set())
    assert base.info.window == (WINDOW if windowed else None)


def test_the_slices_of_all_units_cover_each_weight_once(base: BaseModel) -> None:
    seen: dict[str, list[Tensor]] = {}
    for projection in ALL:
        weight = base.weight(LAYER, projection)
        place = torch.arange(weight.numel()).view(weight.shape)
        view_UED = unit_view(base.spec, base.info, projection, place)
        assert view_UED.shape == (n_units(base.info, projection), base.info.head_dim, base.info.hidden_size)
        seen.setdefault(base.spec.path(LAYER, projection), []).append(view_UED.flatten())

    for path, places in seen.items():
        size = base.module.get_parameter(f"{path}.weight").numel()
        assert torch.equal(torch.cat(places).sort().values, torch.arange(size)), path


@pytest.mark.parametrize("projection", ["q", "k", "v"])
def test_a_units_slice_decides_its_own_outputs_and_no_others(base: BaseModel, projection: Projection) -> None:
    x_TD = torch.randn(5, base.info.hidden_size, generator=torch.Generator().manual_seed(0))
    module = base.projection(LAYER, projection)
    for unit in range(n_units(base.info, projection)):
        before_TO = module(x_TD)
        kept = base.units(LAYER, projection)[unit].clone()
        base.units(LAYER, projection)[unit] = 0
        after_TO = module(x_TD)
        base.units(LAYER, projection)[unit] = kept

        changed_O = (before_TO != after_TO).any(0)
        assert changed_O.nonzero().flatten().tolist() == list(unit_rows(base.spec, base.info, projection, unit))


def head_outputs(base: BaseModel, ids_BT: Tensor) -> Tensor:
    """What o is given in one layer, head by head: [B, T, H, E]."""
    caught: list[Tensor] = []
    hook = base.projection(LAYER, "o").register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        base.hidden(ids_BT)
    hook.remove()
    x_BTHE: Tensor = caught[0].unflatten(-1, (base.info.n_heads, base.info.head_dim))
    return x_BTHE


@pytest.mark.parametrize("projection", ["q", "k", "v"])
def test_a_units_slice_decides_the_attention_of_its_heads_and_no_others(
    base: BaseModel, rendered: list[RenderedRow], projection: Projection
) -> None:
    coupled = projection in TOGETHER.get(base.info.model_type, ())
    ids_BT = ids_of(base, rendered[0])
    before_BTHE = head_outputs(base, ids_BT)
    for unit in range(n_units(base.info, projection)):
        kept = base.units(LAYER, projection)[unit].clone()
        base.units(LAYER, projection)[unit] = 0
        after_BTHE = head_outputs(base, ids_BT)
        base.units(LAYER, projection)[unit] = kept

        changed = {h for h in range(base.info.n_heads) if not torch.equal(before_BTHE[:, :, h], after_BTHE[:, :, h])}
        own = {h for h in range(base.info.n_heads) if unit in units_of(base.info, projection, [h])}
        assert changed == (set(range(base.info.n_heads)) if coupled else own)
    assert torch.equal(head_outputs(base, ids_BT), before_BTHE)


def test_a_heads_slice_of_o_is_what_reads_that_head(base: BaseModel) -> None:
    shape = (5, base.info.n_heads, base.info.head_dim)
    x_THE = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module = base.projection(LAYER, "o")
    for head in range(base.info.n_heads):
        without_THE = x_THE.clone()
        without_THE[:, head] = 0
        expected_TD = module(without_THE.flatten(1))
        kept = base.units(LAYER, "o")[head].clone()
        base.units(LAYER, "o")[head] = 0
        found_TD = module(x_THE.flatten(1))
        base.units(LAYER, "o")[head] = kept

        torch.testing.assert_close(found_TD, expected_TD)
        assert not torch.allclose(found_TD, module(x_THE.flatten(1)))


def test_logits_without_a_mask_are_those_of_eager_attention_beyond_the_window(
    base: BaseModel, reference: PreTrainedModel, rendered: list[RenderedRow]
) -> None:
    batch = collate(base.renderer, rendered, range(len(rendered)))
    with torch.no_grad():
        logits_BTV = base.logits(base.hidden(batch.input_ids_BT))
        for b, row in enumerate(rendered):
            ids_BT = ids_of(base, row)
            expected_TV = reference(ids_BT, attention_mask=torch.ones_like(ids_BT)).logits[0]
            assert len(expected_TV) > 2 * WINDOW
            torch.testing.assert_close(logits_BTV[b, : len(expected_TV)], expected_TV, rtol=1e-4, atol=1e-4)


def test_slice_gradients_are_the_masked_full_gradients(
    base: BaseModel, directory: Path, reference: PreTrainedModel, rendered: list[RenderedRow]
) -> None:
    sum(eager_nll(reference, base, row) for row in rendered).backward()  # type: ignore[union-attr]
    answer_tokens = sum(len(row.answer_ids) for row in rendered)
    twin = loaded(directory)
    twin.module.requires_grad_(True)
    mean_loss(twin, rendered).backward()

    with HeadSlices(base, HEADS, ALL) as slices:
        mean_loss(base, rendered).backward()
        gradients = slices.gradients()

    assert gradients.keys() == {f"layers.{layer}.{projection}" for layer in (1, 2) for projection in ALL}
    for site in slices.sites:
        own_UED = full_gradient(twin.module, base, site.layer, site.projection)[list(site.units)]
        eager_UED = full_gradient(reference, base, site.layer, site.projection)[list(site.units)] / answer_tokens
        assert relative(gradients[site.key], own_UED) < 1e-6, site.key
        assert relative(gradients[site.key], eager_UED) < 1e-5, site.key  # another kernel rounds otherwise


def test_training_moves_the_chosen_slices_and_no_other_bit(base: BaseModel, rendered: list[RenderedRow]) -> None:
    before = module_weights(base.module)
    allowed = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in before.items()}
    for projection in ALL:
        for layer in (1, 2):
            units = units_of(base.info, projection, [head for at, head in HEADS if at == layer])
            mask = allowed[base.spec.weight_name(layer, projection)]
            unit_view(base.spec, base.info, projection, mask)[units] = True

    with HeadSlices(base, HEADS, ALL) as slices:
        optimizer = torch.optim.AdamW(slices.parameters(), lr=1e-2)
        for _ in range(3):
            mean_loss(base, rendered).backward()
            optimizer.step()
            slices.zero_grad()
            slices.sync()
        trained = module_weights(base.module)

    for name, value in before.items():
        assert torch.equal(trained[name] != value, allowed[name]), name
    assert all(torch.equal(value, before[name]) for name, value in module_weights(base.module).items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_round_trips_bit_for_bit_and_merges_into_the_same_model(
    directory: Path, tmp_path: Path, precision: Precision
) -> None:
    base = load_base_model(directory, precision=precision, device="cpu")
    ids_BT = ids_of(base, base.renderer.render(ROWS[0]))
    generator = torch.Generator().manual_seed(5)
    with HeadSlices(base, HEADS, ALL) as slices:
        with torch.no_grad():
            for master in slices.parameters():
                master.add_(torch.randn(master.shape, generator=generator), alpha=0.1)
        slices.sync()
        state, config = slices.state(), JobConfig(training=TrainingConfig(rank=None))
        save_adapter(
            tmp_path / "a", base=base, heads=HEADS, projections=ALL, state=state, config=config, learning_rate=1e-3
        )
        with torch.no_grad():
            trained_TV = base.logits(base.hidden(ids_BT))

    with torch.no_grad():
        plain_TV = base.logits(base.hidden(ids_BT))
        previous = load_adapter(tmp_path / "a").apply(base)
        adapted_TV = base.logits(base.hidden(ids_BT))
        load_adapter(tmp_path / "a").revert(base, previous)
        reverted_TV = base.logits(base.hidden(ids_BT))
        merged = load_base_model(
            merge(directory, tmp_path / "a", tmp_path / "merged"), precision=precision, device="cpu"
        )
        merged_TV = merged.logits(merged.hidden(ids_BT))

    assert not torch.allclose(plain_TV, trained_TV)
    assert torch.equal(adapted_TV, trained_TV)
    assert torch.equal(reverted_TV, plain_TV)
    assert torch.equal(merged_TV, trained_TV)


@pytest.mark.parametrize("scorer", HEAD_SCORERS)
def test_every_head_scorer_ranks_all_heads_and_leaves_the_base_alone(base: BaseModel, scorer: str) -> None:
    before = module_weights(base.module)
    config = JobConfig(
        heads=HeadsConfig(scorer=scorer, proxy_rows=12, ratio=0.2),
        training=TrainingConfig(slices=("q", "k", "v") if scorer == "pad" else ("v", "o"), batch_size=3),
    )

    scores = identify_heads(base, ROWS, GUIDE, config, lambda done, total, metrics: None).scores

    assert torch.tensor(scores).isfinite().all()
    distinct = 1 if scorer == "uniform" else base.info.n_layers * base.info.n_heads
    assert len({score for row in scores for score in row}) == distinct
    assert all(torch.equal(value, before[name]) for name, value in module_weights(base.module).items())


def test_greedy_answers_side_by_side_are_those_of_transformers_one_by_one(
    base: BaseModel, reference: PreTrainedModel, rendered: list[RenderedRow]
) -> None:
    prompts = [base.renderer.asked(row) for row in rendered[:4]]

    answers = generate(base, prompts, limit=12, on_token=lambda: None)

    theirs: Any = reference
    for prompt, answer in zip(prompts, answers, strict=True):
        ids_BT = torch.tensor([prompt])
        mask_BT = torch.ones_like(ids_BT)
        expected = theirs.generate(ids_BT, attention_mask=mask_BT, do_sample=False, max_new_tokens=12)[0]
        stop = base.renderer.stop_ids
        assert answer == [token for token in expected[ids_BT.shape[1] :].tolist() if token not in stop]


def test_answers_behind_one_shared_beginning_are_those_of_whole_prompts(
    base: BaseModel, rendered: list[RenderedRow]
) -> None:
    shown = [*base.renderer.asked(rendered[0]), *rendered[0].answer_ids, *base.renderer.separator_ids]
    prompts = [rendered[1].prompt_ids[-9:], rendered[2].prompt_ids, rendered[3].prompt_ids]  # of different lengths

    answers = generate(base, prompts, limit=8, after=shown)

    assert answers == [generate(base, [[*shown, *prompt]], limit=8)[0] for prompt in prompts]


def given(base: BaseModel, slices: tuple[Projection, ...]) -> ResponseInput:
    return ResponseInput(
        base=base,
        rows=ROWS,
        guide=GUIDE,
        span=range(6),
        slices=slices,
        config=JobConfig(data=DataConfig(mode="faithful")),
    )


@pytest.mark.parametrize("name", DATA_SCORERS)
def test_every_data_scorer_gives_finite_responses_of_every_head(base: BaseModel, name: str) -> None:
    scorer: DataScorer = load(DATA_SCORERS, name, what="data scorer", pointer="/data/scorer")

    shard = scorer(given(base, ("v", "o"))).shard

    assert np.isfinite(shard.response_RN).all()
    assert shard.response_RN.shape == (6, len(shard.layers) * base.info.n_heads)


@pytest.mark.parametrize("slices", [("v", "o"), ("q", "k", "v")])
def test_an_aligned_row_is_one_whose_own_gradient_points_the_guides_way(
    base: BaseModel, reference: PreTrainedModel, slices: tuple[Projection, ...]
) -> None:
    def gradient(row: RenderedRow, layer: int, head: int) -> Tensor:
        reference.zero_grad()
        eager_nll(reference, base, row).backward()
        units = [(projection, units_of(base.info, projection, [head])) for projection in slices]
        return torch.cat([full_gradient(reference, base, layer, name)[unit].flatten() for name, unit in units])

    cosine_RN = align(given(base, slices), range(1, base.info.n_layers), slices).cosine_RN

    for layer, head in [(1, 0), (2, 4)]:
        guide = [base.renderer.render(row) for row in GUIDE]
        mean = torch.stack([gradient(row, layer, head) / len(row.answer_ids) for row in guide]).mean(0)
        for index in range(6):
            row = gradient(base.renderer.render(ROWS[index]), layer, head)
            expected = float(torch.nn.functional.cosine_similarity(row, mean, dim=0))
            assert cosine_RN[index, (layer - 1) * base.info.n_heads + head] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["phi3", "llama"])
def test_a_row_within_the_context_is_worth_the_same_beside_any_other(tmp_path: Path, family: str) -> None:
    rows = [Row(prompt="What is 1 plus 1?" + " And then?" * n, answer="2!", line=n + 1) for n in range(4)]
    renderer = load_renderer(directory := tiny_model_dir(tmp_path / family, family=family))
    lengths = [renderer.length(renderer.render(row)) for row in rows]
    context = lengths[2]  # so the last row is too long for the model
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {
        "phi3": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8},
        "llama": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    }[family]
    limit = "original_max_position_embeddings" if family == "phi3" else "max_position_embeddings"
    (directory / "config.json").write_text(json.dumps(config | {limit: context}))

    base = load_base_model(directory, precision="fp32", device="cpu")
    rendered = [base.renderer.render(row) for row in rows]
    with torch.no_grad():
        alone = torch.cat([answer_nll(base, collate(base.renderer, rendered, [n]))[0] for n in range(3)])
        together, packed = (answer_nll(base, make(base.renderer, rendered, range(3)))[0] for make in (collate, pack))
        beyond = answer_nll(base, collate(base.renderer, rendered, range(4)))[0][:3]

    assert base.info.context_length == context
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(beyond, alone, rtol=1e-2)  # which is why the context ends there
