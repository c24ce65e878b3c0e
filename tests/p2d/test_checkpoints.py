"""A checkpoint is whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from p2d.checkpoints import Checkpoint, load_checkpoint, save_checkpoint


def a_checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"a": torch.full((2, 2), 0.1 * step)}, {"loss": 0.1 + 0.2, "step": step})


def test_a_checkpoint_comes_back_bit_for_bit_by_its_own_or_its_parents_path(tmp_path: Path) -> None:
    written = save_checkpoint(tmp_path, a_checkpoint(7))

    for path in (written, tmp_path):
        found = load_checkpoint(path)
        assert found is not None
        assert (found.step, found.facts) == (7, {"loss": 0.1 + 0.2, "step": 7})
        assert torch.equal(found.tensors["a"], a_checkpoint(7).tensors["a"])


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, a_checkpoint(step))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]


@pytest.mark.parametrize("damage", ["tensors.safetensors", "checkpoint.json"])
def test_a_broken_newest_one_gives_way_to_the_one_before(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, a_checkpoint(1))
    newest = save_checkpoint(tmp_path, a_checkpoint(2))
    (newest / damage).write_bytes(b"{}")

    found = load_checkpoint(tmp_path)

    assert found is not None
    assert found.step == 1


def test_none_is_found_where_none_is(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "gone") is None
