"""Stage 3: only chosen slices move, a cut run ends as an uncut one, and bad rates are found and named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from p2d.adapters import load_adapter, save_adapter
from p2d.config import JobConfig, TrainingConfig
from p2d.errors import Cancelled, Diverged
from p2d.models import BaseModel
from p2d.optimization import Schedule, epoch_order
from p2d.rendering import RenderedRow
from p2d.training import TrainingResult, train
from tests.p2d.test_slices import HEADS, assert_same, weights_of

CONFIG = JobConfig(training=TrainingConfig(slices=("q", "k", "v", "o"), epochs=3, learning_rate=1e-2, batch_size=3))


def quiet(done: int, total: int, metrics: Mapping[str, float]) -> None:
    assert 0 <= done <= total


def run(base: BaseModel, rows: list[RenderedRow], config: JobConfig = CONFIG) -> TrainingResult:
    return train(base, rows[:9], rows[9:], HEADS, config, quiet)


def test_after_training_every_weight_but_the_chosen_slices_is_bit_identical(
    tiny: BaseModel, rendered: list[RenderedRow], tmp_path: Path
) -> None:
    before = weights_of(tiny)

    result = run(tiny, rendered)
    assert_same(weights_of(tiny), before)

    save_adapter(
        tmp_path,
        base=tiny,
        heads=HEADS,
        projections=("q", "k", "v", "o"),
        state=result.state,
        config=CONFIG,
        learning_rate=result.learning_rate,
    )
    load_adapter(tmp_path).apply(tiny)
    after = weights_of(tiny)
    changed = {
        name: (after[name] != before[name]).nonzero() for name in before if not torch.equal(after[name], before[name])
    }
    assert set(changed) == {f"model.layers.{n}.self_attn.{p}_proj.weight" for n in (1, 2) for p in "qkvo"}
    rows_of = {name: set(places[:, 1 if ".o_" in name else 0].tolist()) for name, places in changed.items()}
    unit = {number: set(range(16 * number, 16 * number + 16)) for number in range(6)}
    assert rows_of["model.layers.1.self_attn.q_proj.weight"] <= unit[0] | unit[4]
    assert rows_of["model.layers.1.self_attn.k_proj.weight"] <= unit[0] | unit[1]
    assert rows_of["model.layers.1.self_attn.o_proj.weight"] <= unit[0] | unit[4]
    assert rows_of["model.layers.2.self_attn.v_proj.weight"] <= unit[1]
    assert rows_of["model.layers.2.self_attn.o_proj.weight"] <= unit[5]


def test_training_lowers_the_loss_and_says_what_it_did(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    result = run(tiny, rendered)

    assert [log.step for log in result.log] == list(range(1, 10))
    assert result.log[-1].loss < result.log[0].loss * 0.9
    assert result.watched[-1] < result.watched[0]
    assert (result.kept_epoch, result.trials, result.resumed_step) == (2, [], 0)
    assert result.tokens == 3 * sum(
        len(tiny.renderer.prefix_ids) + len(r.prompt_ids) + len(r.answer_ids) for r in rendered[:9]
    )


def test_the_same_inputs_give_the_same_bits(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    one, other = run(tiny, rendered), run(tiny, rendered)

    assert_same(one.state, other.state)
    assert one.log == other.log


@pytest.mark.parametrize("cut_at", [2, 3, 7])
def test_a_run_cut_and_resumed_ends_bit_identical_to_an_uncut_one(
    tiny: BaseModel, rendered: list[RenderedRow], tmp_path: Path, cut_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2d.training.CHECKPOINT_S", 0.0)  # one after every step
    uncut, before = run(tiny, rendered), weights_of(tiny)
    announced: list[Path] = []

    def cut(done: int, total: int, metrics: Mapping[str, float]) -> None:
        if done == cut_at:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        train(
            tiny,
            rendered[:9],
            rendered[9:],
            HEADS,
            CONFIG,
            cut,
            checkpoint_dir=tmp_path,
            on_checkpoint=announced.append,
        )
    assert_same(weights_of(tiny), before)

    resumed = train(tiny, rendered[:9], rendered[9:], HEADS, CONFIG, quiet, resume_from=announced[-1])

    assert resumed.resumed_step == cut_at
    assert_same(resumed.state, uncut.state)
    assert resumed.log == uncut.log
    assert (resumed.watched, resumed.kept_epoch, resumed.tokens) == (uncut.watched, uncut.kept_epoch, uncut.tokens)


def test_a_checkpoint_of_another_run_or_a_broken_one_is_not_resumed(
    tiny: BaseModel, rendered: list[RenderedRow], tmp_path: Path
) -> None:
    train(tiny, rendered[:9], rendered[9:], HEADS, CONFIG, quiet, checkpoint_dir=tmp_path)
    other = replace(CONFIG, training=replace(CONFIG.training, seed=1))

    assert train(tiny, rendered[:9], rendered[9:], HEADS, other, quiet, resume_from=tmp_path).resumed_step == 0
    assert train(tiny, rendered[:9], rendered[9:], HEADS, CONFIG, quiet, resume_from=tmp_path).resumed_step == 6
    for file in tmp_path.glob("*/tensors.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    assert train(tiny, rendered[:9], rendered[9:], HEADS, CONFIG, quiet, resume_from=tmp_path).resumed_step == 0


def test_an_automatic_rate_is_searched_on_held_out_rows_and_counted(
    tiny: BaseModel, rendered: list[RenderedRow]
) -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, learning_rate="auto"))

    result = run(tiny, rendered, config)

    tried = {trial.learning_rate: trial.guide_loss for trial in result.trials}
    assert 2 <= len(tried) <= 4
    assert result.learning_rate in tried
    assert result.tokens > run(tiny, rendered).tokens
    assert result.search_seconds > 0
    assert result.log[0].loss == run(tiny, rendered).log[0].loss  # the search left the base as it was


def test_a_search_interrupted_after_its_end_is_not_repeated(
    tiny: BaseModel, rendered: list[RenderedRow], tmp_path: Path
) -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, learning_rate="auto"))
    whole = run(tiny, rendered, config)

    def cut(done: int, total: int, metrics: Mapping[str, float]) -> None:
        if "guide_loss" in metrics or "grad_norm" in metrics:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        train(tiny, rendered[:9], rendered[9:], HEADS, config, cut, checkpoint_dir=tmp_path)
    trials: list[bool] = []

    def note(done: int, total: int, metrics: Mapping[str, float]) -> None:
        trials.append("trial_learning_rate" in metrics)

    resumed = train(tiny, rendered[:9], rendered[9:], HEADS, config, note, resume_from=tmp_path)

    assert trials == [False] * 9
    assert_same(resumed.state, whole.state)


def test_a_rate_that_diverges_is_named_and_leaves_the_base_alone(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    before = weights_of(tiny)
    config = replace(CONFIG, training=replace(CONFIG.training, learning_rate=1e30))

    with pytest.raises(Diverged) as caught:
        run(tiny, rendered, config)

    assert caught.value.fault == "user"
    assert caught.value.facts["step"] > 1
    assert_same(weights_of(tiny), before)


def test_the_epoch_with_the_lowest_held_out_loss_is_kept(
    tiny: BaseModel, rendered: list[RenderedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 0.5, 0.7])
    monkeypatch.setattr("p2d.training.mean_answer_nll", lambda base, rows: next(losses))

    result = run(tiny, rendered)
    two_epochs = run_two_of_three(tiny, rendered, monkeypatch)

    assert (result.kept_epoch, result.watched) == (1, [1.0, 0.5, 0.7])
    assert_same(result.state, two_epochs.state)


def run_two_of_three(base: BaseModel, rows: list[RenderedRow], monkeypatch: pytest.MonkeyPatch) -> TrainingResult:
    """Two epochs under the schedule of three."""
    monkeypatch.setattr("p2d.training.mean_answer_nll", lambda base, rows: 1.0)
    monkeypatch.setattr("p2d.training.Schedule", lambda peak, steps: Schedule(peak, 9))
    return run(base, rows, replace(CONFIG, training=replace(CONFIG.training, epochs=2)))


def test_the_schedule_warms_up_and_ends_at_a_tenth() -> None:
    schedule = Schedule(1.0, 100)
    rates = [schedule.rate(step) for step in range(100)]

    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert Schedule(1.0, 1).rate(0) == 1.0


def test_the_order_of_rows_follows_from_seed_and_epoch_alone() -> None:
    assert epoch_order(5, "7", 0) == epoch_order(5, "7", 0)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in ("0", "1") for epoch in (0, 1)}) == 4
    assert sorted(epoch_order(50, "0", 3)) == list(range(50))
