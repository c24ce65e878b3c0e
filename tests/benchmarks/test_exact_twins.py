"""The noise-free counts behind the published ratios, on tiny models: operations, passes, tokens, bytes. No times.

Each count by its closed form agrees with what PyTorch counts while the arm runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.counters import bytes_of, count_flops, peak_extra_bytes
from benchmarks.eager import demo_masses
from benchmarks.heads import PROJECTIONS, bytes_read_by_us, look_flops, look_with_gradients, moved_proxy, pad_flops
from benchmarks.peers import alps
from benchmarks.peers.data_whisperer import DataWhisperer, group_flops
from benchmarks.peers.training import backward, masked
from benchmarks.respond import scene_masses
from benchmarks.train import CACHED, DEFAULT, MASKED_DEFAULT, UPPER, Arm, bytes_held, chosen_heads, made_arms
from benchmarks.workbench import Workbench
from p2d import flops
from p2d.arch.spec import every_head, n_units, unit_view
from p2d.batches import mean_answer_nll, pack
from p2d.model_info import ModelInfo
from p2d.models import BaseModel, load_base_model
from p2d.responses.icl import set_scene
from p2d.rows import Row
from p2d.scorers import ScorerInput
from p2d.scorers.attribution import attribution
from p2d.scorers.pad import pad
from p2d.slices import HeadSlices
from tests.factories import some_rows, tiny_model_dir
from tests.p2d.test_estimate import SMOLLM2

TOLERANCE = 0.02
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def long_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for Data Whisperer's instructions, a token for every letter."""
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "long", context_length=4096)


@pytest.fixture(scope="module")
def base(long_dir: Path) -> BaseModel:
    return load_base_model(long_dir, precision="fp32", device="cpu")


@pytest.fixture
def rows() -> list[Row]:
    return some_rows(8)


# --- respond ----------------------------------------------------------------------------------------------------------


def test_data_whisperer_decodes_and_passes_its_prompt_again(long_dir: Path, base: BaseModel, rows: list[Row]) -> None:
    peer = DataWhisperer(long_dir, device=CPU, dtype=torch.float32, layer=1)
    scored = peer.score_group(rows[:5], rows[5:], max_new_tokens=6)

    found = count_flops(lambda: peer.score_group(rows[:5], rows[5:], max_new_tokens=6))

    assert scored.decode_steps == 6
    closed = group_flops(base.info, prompt=scored.prompt_tokens, steps=6, layer=1)
    assert closed == pytest.approx(found, rel=TOLERANCE)


def test_a_group_costs_one_forward_pass_of_its_tokens(base: BaseModel, rows: list[Row]) -> None:
    rendered = [base.renderer.render(row) for row in rows]
    scene = set_scene(base, rendered[:5], rendered[5:])
    passes: list[int] = []
    backbone = base.module.get_submodule(base.spec.backbone)
    hook = backbone.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )

    masses, _ = scene_masses(base, scene)
    hook.remove()

    assert passes == [len(scene.ids)]
    assert masses.shape == (5, base.info.n_layers * base.info.n_heads)


def test_eager_attention_is_told_the_same_masses(long_dir: Path, base: BaseModel, rows: list[Row]) -> None:
    rendered = [base.renderer.render(row) for row in rows]
    scene = set_scene(base, rendered[:5], rendered[5:])

    ours, _ = scene_masses(base, scene)

    assert ours == pytest.approx(demo_masses(long_dir, base, scene), rel=1e-4)


def test_a_group_never_holds_an_attention_matrix(long_dir: Path, base: BaseModel) -> None:
    rows = some_rows(28)
    rendered = [base.renderer.render(row) for row in rows]
    scene = set_scene(base, rendered[:25], rendered[25:])
    matrix = base.info.n_heads * len(scene.ids) ** 2 * 4
    peer = DataWhisperer(long_dir, device=CPU, dtype=torch.float32, layer=1)

    theirs = peak_extra_bytes(CPU, lambda: peer.score_group(rows[:25], rows[25:], max_new_tokens=1))
    ours = peak_extra_bytes(CPU, lambda: scene_masses(base, scene))

    assert ours < matrix / 2
    assert theirs > 2 * matrix


# --- heads ------------------------------------------------------------------------------------------------------------


def test_scoring_reads_the_trained_projections_once_and_multiplies_right_to_left(base: BaseModel) -> None:
    proxy = moved_proxy(base)
    read = sum(values.numel() * 4 for side in (proxy.before, proxy.after) for values in side.values())

    found = count_flops(lambda: pad(ScorerInput(base.info, proxy, 0)))

    assert bytes_read_by_us(base.info) == read
    assert found == pytest.approx(pad_flops(base.info), rel=TOLERANCE)


def test_attribution_looks_at_both_ends_and_at_most_once_between(base: BaseModel) -> None:
    proxy = moved_proxy(base)

    scores_LH = attribution(ScorerInput(base.info, proxy, 0))

    assert proxy.asked == {0.0, 0.5, 1.0}
    assert scores_LH.abs().min() > 0


def test_a_look_with_gradients_costs_what_its_closed_form_says(
    base: BaseModel, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flops, "causal_pairs", lambda tokens, past=0: tokens * (past + tokens))
    guide = [base.renderer.render(rows[0])] * 4
    slices = HeadSlices(base, every_head(base.info), PROJECTIONS)
    plain, full = look_flops(base, guide)

    with slices:
        found = count_flops(lambda: look_with_gradients(base, slices, guide))
        gradients = look_with_gradients(base, slices, guide)

    assert full == pytest.approx(found, rel=TOLERANCE)
    assert plain == pytest.approx(count_flops(lambda: mean_answer_nll(base, guide)), rel=TOLERANCE)
    assert gradients.keys() == moved_proxy(base).gradients.keys()


def test_alps_gives_heads_beyond_the_last_group_no_keys_and_values(long_dir: Path, base: BaseModel) -> None:
    model, _ = alps.load_models(long_dir, long_dir, CPU)

    weights = alps.head_weights(model, base.info.n_layers, base.info.n_heads)

    slice_size = base.info.head_dim * base.info.hidden_size
    groups = n_units(base.info, "k")
    sizes = [weights[f"layer_0_head_{head}"].numel() for head in range(base.info.n_heads)]
    assert sizes == [3 * slice_size] * groups + [slice_size] * (base.info.n_heads - groups)


def test_alps_finds_no_distance_between_equal_models(long_dir: Path, base: BaseModel) -> None:
    found = alps.analyse(long_dir, long_dir, CPU)

    assert len(found) == base.info.n_layers * base.info.n_heads
    assert set(found.values()) == {0.0}


# --- train ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def arms(long_dir: Path, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Arm]]:
    """All arms of one step of four rows of one length, each after a first step."""
    # The counter sees every token meet every other.
    monkeypatch.setattr(flops, "causal_pairs", lambda tokens, past=0: tokens * (past + tokens))
    bench = Workbench(
        model_dir=long_dir, rows=rows, scored=4, rounds=1, device="cpu", scratch=tmp_path, precision="fp32"
    )
    with made_arms(bench, [bench.base.renderer.render(rows[0])] * 4) as made:
        for arm in made.values():
            with arm.inside():
                arm.step()
        yield made


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about peft
def test_every_way_to_train_costs_what_its_closed_form_says(arms: dict[str, Arm]) -> None:
    for name, arm in arms.items():
        with arm.inside():
            assert arm.flops == pytest.approx(count_flops(arm.step), rel=TOLERANCE), name


def trained_numbers(info: ModelInfo) -> dict[str, int]:
    """By arm."""
    chosen, every = chosen_heads(info, 0), every_head(info)
    return {
        "full fine-tuning": info.parameters,
        "masked": flops.slice_weights(info, every, ("q", "k", "v")),
        "LoRA": info.n_layers * flops.lora_parameters(info, rank=128, projections=("q", "k", "v")),
        "slices": flops.slice_weights(info, chosen, ("q", "k", "v")),
        MASKED_DEFAULT: flops.slice_weights(info, every, ("v", "o")),
        DEFAULT: flops.slice_weights(info, chosen, ("v", "o")),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_trained_state_is_four_times_the_trained_numbers(arms: dict[str, Arm], base: BaseModel) -> None:
    numbers = trained_numbers(base.info)

    found = {name: bytes_of(arms[name].state()) for name in numbers}

    assert found == {name: 4 * 4 * count for name, count in numbers.items()}


def test_the_default_recipe_keeps_the_state_that_the_papers_slices_do_not_keep_small() -> None:
    numbers = trained_numbers(SMOLLM2)

    # Of 270 heads 27 at even distances: of q (or o) a tenth, of k and v 27 of 90 groups.
    assert numbers["slices"] == 27 * 64 * 576 * 3
    assert numbers[DEFAULT] == 27 * 64 * 576 * 2
    assert numbers["full fine-tuning"] / numbers["slices"] == pytest.approx(45, abs=0.1)
    assert numbers["masked"] / numbers["slices"] == pytest.approx(50 / 9)
    assert numbers["full fine-tuning"] / numbers[DEFAULT] == pytest.approx(67.6, abs=0.1)
    assert numbers[MASKED_DEFAULT] / numbers[DEFAULT] == pytest.approx(20 / 3)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about peft
def test_unchosen_columns_of_o_get_no_gradient_where_they_are_masked(base: BaseModel, rows: list[Row]) -> None:
    chosen = chosen_heads(base.info, 0)
    masters = masked(base, chosen, ("v", "o"))
    batch = pack(base.renderer, [base.renderer.render(row) for row in rows[:2]], range(2))
    before = [master.detach().clone() for master in masters.masters]
    with masters.trainable():
        backward(base, batch)
        masters.update()

    changed = [master.detach() != old for master, old in zip(masters.masters, before, strict=True)]
    of_o = [unit_view(base.spec, base.info, "o", change) for change in changed[1::2]]
    moved = {
        (layer, int(unit)) for layer, change_UED in enumerate(of_o) for unit in change_UED.flatten(1).any(1).nonzero()
    }
    assert moved == set(chosen)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_slices_keep_fewest_activations_and_fewer_still_above_the_middle(arms: dict[str, Arm], base: BaseModel) -> None:
    saved = {name: bytes_held(base, arm).saved for name, arm in arms.items()}

    assert saved[UPPER] < saved["slices"] < saved["masked"] < saved["full fine-tuning"]
    assert saved["slices"] < saved["LoRA"]
    assert saved[CACHED] == saved[UPPER]
