"""Remembered activations are those of a fresh computation, bit for bit, and spare the layers below in every later pass."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from p2d.activation_cache import ActivationStore, remember_below
from p2d.arch import ARCHS
from p2d.batches import Batch, answer_nll, collate, hidden, pack
from p2d.config import JobConfig, TrainingConfig
from p2d.models import BaseModel, load_base_model
from p2d.rendering import RenderedRow
from p2d.slices import HeadSlices
from p2d.training import TrainingResult, train
from tests.factories import some_rows, tiny_model_dir
from tests.p2d.test_slices import assert_same

LAYER = 2
HEADS = [(2, 1), (2, 5)]
ORDER = [3, 0, 4, 7, 1]
CONFIG = JobConfig(training=TrainingConfig(slices=("v", "o"), rank=None, epochs=3, learning_rate=1e-2, batch_size=3))


def run(
    base: BaseModel, rows: list[RenderedRow], config: JobConfig = CONFIG, folder: Path | None = None
) -> TrainingResult:
    return train(base, rows[:9], rows[9:], HEADS, config, lambda *_: None, checkpoint_dir=folder)


@contextmanager
def counted_rows(base: BaseModel, layer: int) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of the inputs that really ran through a layer's attention."""
    shapes: list[tuple[int, ...]] = []
    module = base.projection(layer, "o")
    handle = module.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape[:2])))
    yield shapes
    handle.remove()


@pytest.fixture(scope="module", params=sorted(ARCHS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / request.param, family=request.param)


@pytest.mark.parametrize("form", [pack, collate])
def test_the_layers_above_give_the_hidden_states_of_all_layers_in_every_family(family: Path, form: object) -> None:
    base = load_base_model(family, precision="fp32", device="cpu")
    rows = [base.renderer.render(row) for row in some_rows(8)]
    batch: Batch = form(base.renderer, rows, ORDER)  # type: ignore[operator]
    own_BT = batch.attention_mask_BT.bool()
    with torch.no_grad():
        expected_BTD = hidden(base, batch)
        with remember_below(base, LAYER):
            found_BTD = hidden(base, batch)
            again_BTD = hidden(base, batch)

    torch.testing.assert_close(found_BTD[own_BT], expected_BTD[own_BT], rtol=1e-4, atol=1e-4)
    assert torch.equal(again_BTD, found_BTD)
    assert not [module for module in base.module.modules() if "forward" in vars(module)]


def test_gradients_of_slices_above_are_those_of_all_layers(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    batch = pack(tiny.renderer, rendered, ORDER)

    def gradients() -> dict[str, Tensor]:
        with HeadSlices(tiny, HEADS, ("q", "v", "o")) as slices:
            answer_nll(tiny, batch)[0].sum().backward()
            return slices.gradients()

    expected = gradients()
    with remember_below(tiny, LAYER):
        found = gradients()

    for key, gradient in expected.items():
        assert float((found[key] - gradient).norm() / gradient.norm()) < 1e-5


def test_layers_below_run_once_for_each_row_of_a_whole_training(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    config = replace(CONFIG, training=replace(CONFIG.training, learning_rate="auto"))
    with counted_rows(tiny, 1) as below, counted_rows(tiny, 2) as above:
        result = run(tiny, rendered, config)

    lengths = sorted(tiny.renderer.length(row) for row in rendered)
    assert sorted(below) == [(1, length) for length in lengths]
    assert len(above) > 3 * 3 + 2 * len(result.trials)
    assert result.remembered_below == LAYER


@pytest.mark.parametrize("room", ["nowhere", "one row in memory", "on disk"])
def test_training_has_the_same_bits_wherever_activations_are_kept(
    tiny: BaseModel, rendered: list[RenderedRow], room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remembered = run(tiny, rendered)
    with monkeypatch.context() as patch:
        width = tiny.info.hidden_size
        bytes_of_a_row = 4 * width * max(tiny.renderer.length(row) for row in rendered)
        free = bytes_of_a_row * 4 if room == "one row in memory" else 0
        patch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=free))
        with counted_rows(tiny, 0) as below:
            other = run(tiny, rendered, folder=tmp_path if room == "on disk" else None)

    assert_same(other.state, remembered.state)
    assert (other.log, other.watched) == (remembered.log, remembered.watched)
    assert (len(below) == len(rendered)) == (room == "on disk")


def test_a_run_resumed_in_the_middle_of_an_epoch_has_the_same_bits(
    tiny: BaseModel, rendered: list[RenderedRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2d.training.CHECKPOINT_S", 0.0)
    whole = run(tiny, rendered)

    class Stop(Exception):
        pass

    def cut(done: int, total: int, metrics: object) -> None:
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        train(tiny, rendered[:9], rendered[9:], HEADS, CONFIG, cut, checkpoint_dir=tmp_path)
    resumed = train(tiny, rendered[:9], rendered[9:], HEADS, CONFIG, lambda *_: None, resume_from=tmp_path)

    assert resumed.resumed_step == 5
    assert_same(resumed.state, whole.state)
    assert resumed.log == whole.log


def test_what_is_seen_once_is_not_remembered(tiny: BaseModel, rendered: list[RenderedRow]) -> None:
    once = replace(CONFIG, training=replace(CONFIG.training, epochs=1))

    assert run(tiny, rendered, once).remembered_below == 0


def test_a_store_keeps_to_its_budgets_and_forgets_the_rest() -> None:
    values = {bytes([n]): torch.full((2, 3), float(n), dtype=torch.bfloat16) for n in range(6)}
    with tempfile.TemporaryFile() as file:
        store = ActivationStore(memory_bytes=2 * 12, file=file, file_bytes=3 * 12 + 5)
        for key, value in values.items():
            store.put(key, value)
        kept = {key: store.get(key) for key in values}
        file.seek(0, 2)
        assert file.tell() == 3 * 12

    assert kept[bytes([5])] is None
    for key in list(values)[:5]:
        found = kept[key]
        assert found is not None
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, values[key])


def test_a_full_disk_only_means_computing_again() -> None:
    with Path("/dev/full").open("wb") as file:  # whose every write fails, the last one at closing too
        store = ActivationStore(memory_bytes=0, file=file, file_bytes=1000)
        store.put(b"a", torch.zeros(3))

        assert store.get(b"a") is None


def test_what_is_written_in_pieces_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr("p2d.activation_cache.os.pwrite", lambda file, data, start: pwrite(file, data[:5], start))
    values = {bytes([n]): torch.randn(4, 3) for n in range(3)}
    with tempfile.TemporaryFile() as file:
        store = ActivationStore(memory_bytes=0, file=file, file_bytes=1000)
        for key, value in values.items():
            store.put(key, value)

        for key, value in values.items():
            found = store.get(key)
            assert found is not None
            assert torch.equal(found, value)
