"""The fidelity benchmark runs from end to end, keeps what it found on another pool, and says whether fast mode ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.fidelity import ARMS, Arm, Pool, judgement, main
from p2d.config import RECIPES
from p2d.rows import write_rows
from tests.factories import some_rows, tiny_model_dir


def a_pool(losses: dict[str, list[float]]) -> Pool:
    arms = [Arm(name, seed, loss, 1.0, 1, 0.0) for name in ARMS for seed, loss in enumerate(losses[name])]
    return Pool(rows=10, kept=2, junk=0.0, base_loss=2.0, arms=arms)


def test_fast_mode_ships_only_within_the_noise_of_the_seeds() -> None:
    noisy, random = [1.0, 1.1, 1.2], [1.3, 1.4, 1.5]

    assert a_pool({"faithful": noisy, "fast": [1.1, 1.2, 1.25], "random": random}).verdict()["ships"]
    assert not a_pool({"faithful": noisy, "fast": [1.25, 1.3, 1.35], "random": random}).verdict()["ships"]
    assert not a_pool({"faithful": [1.0], "fast": [0.9], "random": [1.0]}).verdict()["ships"]  # one seed has no noise


def test_the_spread_of_random_rows_is_no_excuse_for_fast_mode() -> None:
    steady, wild = [1.0, 1.001, 1.002], [1.1, 1.5, 1.9]

    assert not a_pool({"faithful": steady, "fast": [1.01, 1.02, 1.03], "random": wild}).verdict()["ships"]


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_a_run_writes_its_pool_beside_the_others(tmp_path: Path, recipe: str) -> None:
    model = tiny_model_dir(tmp_path / "tiny", n_layers=4)
    write_rows(tmp_path / "train.jsonl", some_rows(16))
    write_rows(tmp_path / "test.jsonl", some_rows(8, first=50))
    options = ["--model", str(model), "--train", str(tmp_path / "train.jsonl"), "--test", str(tmp_path / "test.jsonl")]
    options += ["--out", str(tmp_path / "results"), "--rows", "16", "--guide", "4", "--held-out", "4", "--seeds", "2"]
    options += ["--proxy-rows", "4", "--epochs", "1", "--ratio", "0.2", "--threads", "1", "--recipe", recipe]

    for junk in ("0", "0.5"):
        main([*options, "--junk", junk])

    pools = json.loads((tmp_path / "results/fast_mode.json").read_text())
    assert len(pools) == 2
    for entry in pools.values():
        assert {(arm["name"], arm["seed"]) for arm in entry["arms"]} == {
            (name, seed) for name in ARMS for seed in (0, 1)
        }
        assert len(entry["rank_correlation"]) == 2
        assert all(fast < whole for fast, whole in zip(entry["fast_flops"], entry["faithful_flops"], strict=True))
    page = (tmp_path / "results/fast_mode.md").read_text()
    assert page.count("seed noise") == 2


def test_the_page_says_on_which_side_of_the_noise_fast_mode_is() -> None:
    found = {"seeds": 3, "noise": 0.01, "ships": True}

    assert "better by more than" in judgement({**found, "difference": -0.02})
    assert "within the noise, fit" in judgement({**found, "difference": -0.005})
    assert "worse by more than" in judgement({**found, "difference": 0.02, "ships": False})
