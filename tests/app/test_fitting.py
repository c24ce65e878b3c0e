"""What fits a machine, and the nearest change of a job that does not."""

from __future__ import annotations

from dataclasses import replace

from app.core.fitting import Sizing, available_of, changes, fits, machine_of
from app.db.waiting import Equipment
from p2d.config import JobConfig, TrainingConfig
from p2d.memory import Peak
from p2d.plans import RowCounts
from p2d.resolution import resolve
from tests.p2d.test_estimate import SMOLLM2

GB = 10**9
BOX = Equipment(device="cpu", host_bytes=8 * GB, device_bytes=0, precision="fp32")
CONFIG = resolve(JobConfig(training=TrainingConfig(batch_size=16)), rows=300, context_length=8192, head_dim=64).config


def sizing(config: JobConfig = CONFIG, box: Equipment = BOX) -> Sizing:
    rows = RowCounts(rows=300, tokens=90_000, answer_tokens=30_000, longest=900)
    return Sizing(
        model=SMOLLM2,
        machine=machine_of(config, box, "auto"),
        counts={"train": rows, "guide": replace(rows, rows=30, tokens=9000), "evaluation": rows},
        shard_rows=2000,
        planned=frozenset({"train", "respond"}),
    )


def test_what_is_not_known_is_not_judged() -> None:
    assert available_of(None) is None
    assert fits(Peak(host=10**15, device=10**15), None)


def test_host_and_device_are_judged_apart() -> None:
    there = Peak(host=10, device=5)
    assert fits(Peak(host=10, device=5), there)
    assert not fits(Peak(host=11, device=0), there)
    assert not fits(Peak(host=0, device=6), there)


def test_each_change_fits_and_the_next_value_does_not() -> None:
    whole = sizing()
    least = whole.memory(replace(CONFIG, training=replace(CONFIG.training, batch_size=3)), None).peak.host
    available = Peak(host=least, device=0)
    assert not fits(whole.memory(CONFIG, available).peak, available)

    found = {change.pointer: change.value for change in changes(whole, CONFIG, available)}

    assert found["/training/batch_size"] == 3
    assert 8 <= found["/training/max_length"] < 900
    assert fits(whole.memory(CONFIG, available, found["/training/max_length"]).peak, available)
    assert not fits(whole.memory(CONFIG, available, found["/training/max_length"] + 1).peak, available)


def test_where_the_weights_alone_are_too_large_no_change_is_named() -> None:
    assert list(changes(sizing(), CONFIG, Peak(host=1 * GB // 10, device=0))) == []


def test_the_machine_is_the_one_that_steps_told_of() -> None:
    gpu = replace(BOX, device="cuda", device_bytes=80 * GB, precision="bf16")

    assert (machine_of(CONFIG, gpu, "cpu").on_gpu, machine_of(CONFIG, gpu, "cpu").wide) == (True, False)
    assert (machine_of(CONFIG, BOX, "cuda").on_gpu, machine_of(CONFIG, BOX, "cuda").wide) == (False, True)
    assert machine_of(CONFIG, None, "cuda:0").on_gpu
    asked = replace(CONFIG, training=replace(CONFIG.training, precision="fp32"))
    assert machine_of(asked, gpu, "auto").wide
