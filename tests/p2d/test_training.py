"""Stage 3: only chosen slices move, a cut run ends as an uncut one, and bad rates are found and named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from p2d.adapters import load_adapter, save_adapter
from p2d.config import JobConfig, TrainingConfig
from p2d.errors import Cancelled, Diverged, OutOfMemory
from p2d.learning_rates import FIRST_RANK_RATE, FIRST_RATE
from p2d.models import BaseModel, load_base_model
from p2d.optimization import Schedule, SliceTrainer, epoch_order
from p2d.rendering import RenderedRow
from p2d.slices import HeadSlices
from p2d.training import TrainingResult, run_identity, train
from tests.factories import some_rows, tiny_model_dir
from tests.p2d.test_slices import HEADS, assert_same, weights_of

CONFIG = JobConfig(
    training=TrainingConfig(slices=("q", "k", "v", "o"), rank=None, epochs=3, learning_rate=1e-2, batch_size=3)
)


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


def test_a_run_is_known_by_what_stands_before_its_rows_too(
    tiny: BaseModel, rendered: list[RenderedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run_identity(tiny, rendered, rendered, HEADS, CONFIG)
    monkeypatch.setattr(tiny.renderer, "prefix_ids", tiny.renderer.prefix_ids[:-1])

    assert run_identity(tiny, rendered, rendered, HEADS, CONFIG) != one


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


@pytest.mark.parametrize("trial", [1, 2])
def test_a_search_interrupted_on_its_way_makes_no_trial_twice(
    tiny: BaseModel, rendered: list[RenderedRow], tmp_path: Path, trial: int
) -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, learning_rate="auto"))
    whole = run(tiny, rendered, config)
    steps = whole.trials[0].steps

    def cut(done: int, total: int, metrics: Mapping[str, float]) -> None:
        if done == trial * steps + 1:  # the first step of the next trial
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        train(tiny, rendered[:9], rendered[9:], HEADS, config, cut, checkpoint_dir=tmp_path)
    reported: list[int] = []

    def note(done: int, total: int, metrics: Mapping[str, float]) -> None:
        reported.append(done)

    resumed = train(tiny, rendered[:9], rendered[9:], HEADS, config, note, resume_from=tmp_path)

    assert reported[0] == trial * steps + 1
    assert (resumed.trials, resumed.learning_rate, resumed.tokens) == (whole.trials, whole.learning_rate, whole.tokens)
    assert_same(resumed.state, whole.state)


def test_a_rate_that_diverges_is_named_and_leaves_the_base_alone(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    before = weights_of(tiny)
    config = replace(CONFIG, training=replace(CONFIG.training, learning_rate=1e30))

    with pytest.raises(Diverged) as caught:
        run(tiny, rendered, config)

    assert caught.value.fault == "user"
    assert "rows" not in caught.value.hint  # the message names none: a step's rows are not known by their lines
    assert caught.value.facts["step"] > 1
    assert_same(weights_of(tiny), before)


def test_a_last_update_that_diverges_is_named_too(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    before = weights_of(tiny)
    one_step = replace(CONFIG.training, learning_rate=1e30, epochs=1, batch_size=9)

    with pytest.raises(Diverged, match="held-out rows was not finite after epoch 1"):
        run(tiny, rendered, replace(CONFIG, training=one_step))

    assert_same(weights_of(tiny), before)


def test_the_epoch_with_the_lowest_held_out_loss_is_kept(
    tiny: BaseModel, rendered: list[RenderedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 0.5, 0.7])
    monkeypatch.setattr("p2d.training.mean_answer_nll", lambda base, rows, **_: next(losses))

    result = run(tiny, rendered)
    two_epochs = run_two_of_three(tiny, rendered, monkeypatch)

    assert (result.kept_epoch, result.watched) == (1, [1.0, 0.5, 0.7])
    assert_same(result.state, two_epochs.state)


def run_two_of_three(base: BaseModel, rows: list[RenderedRow], monkeypatch: pytest.MonkeyPatch) -> TrainingResult:
    """Two epochs under the schedule of three."""
    monkeypatch.setattr("p2d.training.mean_answer_nll", lambda base, rows, **_: 1.0)
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


@dataclass
class Memory:
    """A machine whose memory holds the logits of so many positions and no more."""

    positions: int
    seen: list[int] = field(default_factory=list)

    def attach(self, base: BaseModel) -> None:
        base.module.get_submodule(base.spec.lm_head).register_forward_pre_hook(self._allocate)

    def _allocate(self, module: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        self.seen.append(len(given[0]))
        if len(given[0]) > self.positions:
            raise torch.OutOfMemoryError(f"no room for {len(given[0])} positions")


def test_where_memory_runs_out_smaller_micro_batches_reach_the_same_gradient(
    tiny: BaseModel, rendered: list[RenderedRow]
) -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, batch_size=9))
    roomy = run(tiny, rendered, config)
    answers = sorted(len(row.answer_ids) for row in rendered[:9])
    memory = Memory(positions=2 * answers[-1])
    memory.attach(tiny)

    tight = train(tiny, rendered[:9], [], HEADS, config, quiet)

    # Only the order of sums differs; Adam's first steps make much of that where a gradient is nearly zero.
    for ours, theirs in zip(tight.log, roomy.log, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)
        assert (ours.learning_rate, ours.tokens) == (theirs.learning_rate, theirs.tokens)
    assert tight.token_budget < roomy.token_budget
    assert [warning for warning in tight.warnings if "Memory ran out" in warning]
    assert not roomy.warnings
    failures = [positions > memory.positions for positions in memory.seen]
    assert 0 < sum(failures) == sum(failures[: len(failures) // 2])  # learnt once, in the first step


def test_a_run_that_ran_out_of_memory_resumes_with_the_micro_batches_that_fitted(
    tiny: BaseModel, rendered: list[RenderedRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2d.training.CHECKPOINT_S", 0.0)
    Memory(positions=20).attach(tiny)
    uncut = run(tiny, rendered)

    def cut(done: int, total: int, metrics: Mapping[str, float]) -> None:
        if done == 5:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        train(tiny, rendered[:9], rendered[9:], HEADS, CONFIG, cut, checkpoint_dir=tmp_path)
    resumed = train(tiny, rendered[:9], rendered[9:], HEADS, CONFIG, quiet, resume_from=tmp_path)

    assert (resumed.resumed_step, resumed.token_budget) == (5, uncut.token_budget)
    assert uncut.watched
    assert resumed.log == uncut.log


def test_a_row_that_alone_does_not_fit_ends_the_run_and_leaves_the_base(
    tiny: BaseModel, rendered: list[RenderedRow]
) -> None:
    before = weights_of(tiny)
    Memory(positions=min(len(row.answer_ids) for row in rendered) - 1).attach(tiny)

    with pytest.raises(OutOfMemory) as caught:
        train(tiny, rendered[:9], [], HEADS, CONFIG, quiet)

    assert caught.value.code == "engine.out_of_memory"
    assert_same(weights_of(tiny), before)


def no_room_for_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW finds no memory for its state, which its first step makes."""

    def allocate(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room for the moments")

    monkeypatch.setattr(torch, "zeros_like", allocate)


def test_no_room_for_the_optimizers_state_is_said_as_such_and_leaves_the_base(
    tiny: BaseModel, rendered: list[RenderedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weights_of(tiny)
    no_room_for_moments(monkeypatch)

    with pytest.raises(OutOfMemory, match="updating the slices") as caught:
        run(tiny, rendered)

    assert caught.value.code == "engine.out_of_memory"
    assert_same(weights_of(tiny), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("rank", [None, 2])
def test_a_cut_run_of_any_layout_and_rank_ends_bit_identical(
    tmp_path: Path, family: str, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2d.training.CHECKPOINT_S", 0.0)
    base = load_base_model(tiny_model_dir(tmp_path / family, family=family), precision="fp32", device="cpu")
    rows = [base.renderer.render(row) for row in some_rows(6)]
    config = replace(CONFIG, training=replace(CONFIG.training, rank=rank, epochs=2))
    before = weights_of(base)

    def cut(done: int, total: int, metrics: Mapping[str, float]) -> None:
        if done == 3:
            raise Cancelled("stop")

    uncut = train(base, rows, rows[:2], HEADS, config, quiet)
    with pytest.raises(Cancelled):
        train(base, rows, rows[:2], HEADS, config, cut, checkpoint_dir=tmp_path)
    resumed = train(base, rows, rows[:2], HEADS, config, quiet, resume_from=tmp_path)

    assert resumed.resumed_step == 3
    assert_same(resumed.state, uncut.state)
    assert resumed.log == uncut.log
    assert_same(weights_of(base), before)


def test_a_best_rate_at_the_end_of_what_was_tried_is_pointed_out(
    tiny: BaseModel, rendered: list[RenderedRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, learning_rate="auto"))
    losses = iter([1.0, 0.9, 0.8, 0.7])  # ever better, the higher the rate
    monkeypatch.setattr("p2d.learning_rates.mean_answer_nll", lambda base, rows, **_: next(losses))
    still_falling = run(tiny, rendered, config)
    losses = iter([1.0, 0.8, 0.9])
    enclosed = run(tiny, rendered, config)

    assert "highest that was tried" in still_falling.warnings[0]
    assert still_falling.learning_rate == max(trial.learning_rate for trial in still_falling.trials)
    assert enclosed.warnings == []


def test_the_search_for_a_rank_begins_higher(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, learning_rate="auto", rank=2))

    assert run(tiny, rendered, config).trials[0].learning_rate == FIRST_RANK_RATE > FIRST_RATE


@pytest.mark.parametrize("rank", [None, 2])
def test_a_gradient_that_is_not_finite_stops_before_anything_is_updated(
    tiny: BaseModel, rendered: list[RenderedRow], rank: int | None
) -> None:
    with HeadSlices(tiny, HEADS, ("v", "o"), rank) as slices:
        trainer = SliceTrainer(tiny, slices, rendered, batch_size=3, seed="0")
        trainer.advance(Schedule(1e-2, 10))
        before, weights = trainer.state(), weights_of(tiny)
        # The loss stays finite: only the way back is broken.
        spoil: Any = lambda _module, grads, _: (grads[0] * float("nan"),)  # noqa: E731
        broken = tiny.projection(2, "o").register_full_backward_hook(spoil)
        with pytest.raises(Diverged):
            trainer.advance(Schedule(1e-2, 10))
        broken.remove()

        assert_same(trainer.state(), before)
        assert_same(weights_of(tiny), weights)
        assert trainer.advance(Schedule(1e-2, 10)).step == 2
