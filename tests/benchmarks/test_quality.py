"""The quality matrix: its pools are what they say, its arms train what they say, and no cell is computed twice."""

from __future__ import annotations

import argparse
import json
import queue
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks.quality.__main__ import _options
from benchmarks.quality.arms import ARMS, HEADS, RANDOM, REFERENCE, REFERENCE_ONCE, Arm, Weights
from benchmarks.quality.cells import Cell, Cells, Laboratory
from benchmarks.quality.matrix import joined, run
from benchmarks.quality.measures import Measured, Measures
from benchmarks.quality.plots import draw
from benchmarks.quality.pools import MAKERS, Pool, PoolSpec, Task, build
from benchmarks.quality.stages import Stages
from benchmarks.quality.tables import Before, Found, _over, page
from benchmarks.quality.weights import installed
from benchmarks.quality.workers import _work, share_out
from p2d import config
from p2d.batches import mean_answer_nll
from p2d.config import DATA_SCORERS
from p2d.models import BaseModel
from p2d.optimization import Schedule, SliceTrainer
from p2d.rows import write_rows
from p2d.slices import all_heads
from tests.factories import some_rows, tiny_model_dir

TASK = Task("gsm8k", tuple(some_rows(16)), tuple(some_rows(4, first=50)), tuple(some_rows(4, first=60)))
OTHER = Task("dialogsum", tuple(some_rows(8, first=70)), (), tuple(some_rows(3, first=80)))

EVERY = [
    Weights(kind="slices", slices=("v", "o")),
    Weights(kind="slices", slices=("v", "o"), rank=2),
    Weights(kind="lora", rank=2),
    Weights(kind="lora", rank=2, slices=("v", "o")),
    Weights(kind="lora", rank=2, variant="rslora"),
    Weights(kind="lora", rank=2, variant="dora"),
    Weights(kind="full"),
]


def laboratory(base: BaseModel, pool: Pool, path: Path, **more: Any) -> Laboratory:
    measures = Measures(TASK.held_out, OTHER.held_out)
    measures.prepare(base)
    stages = Stages(base, pool, TASK.validation, time.process_time)
    return Laboratory(
        base=base,
        pool=pool,
        task=TASK,
        stages=stages,
        measures=measures,
        cells=Cells(path),
        say=lambda line: None,
        **more,
    )


@pytest.mark.parametrize("kind", MAKERS)
def test_a_pool_has_as_many_bad_rows_as_it_says_and_they_differ_from_the_task_s(kind: str) -> None:
    rows = tuple(replace(row, answer=f"so it is {row.line} and {row.line + 1}") for row in TASK.train)
    task = replace(TASK, train=rows)

    pool = build(PoolSpec("gsm8k", 12, (kind,), 0.5), task, OTHER)

    assert len(pool.bad) == 6
    assert set(pool.clean) | pool.bad == set(range(12))
    changed = {index for index in range(12) if pool.rows[index] != rows[index]}
    assert changed == set(pool.bad)
    assert build(PoolSpec("gsm8k", 12, (kind,), 0.5), task, OTHER) == pool


def test_a_pool_that_cannot_be_built_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match="has 16 training rows; the pool wants 17"):
        build(PoolSpec("gsm8k", 17), TASK, OTHER)
    with pytest.raises(ValueError, match="another task"):
        build(PoolSpec("gsm8k", 8, ("off task",), 0.5), TASK, None)


@pytest.mark.parametrize("weights", EVERY, ids=lambda weights: f"{weights.kind}-{weights.rank}-{weights.variant}")
def test_each_kind_of_weights_learns_and_leaves_the_base_as_it_was(tiny: BaseModel, weights: Weights) -> None:
    before = {name: value.clone() for name, value in tiny.module.state_dict().items()}
    rows = [tiny.renderer.render(row) for row in TASK.train[:4]]
    untrained = mean_answer_nll(tiny, rows)

    with installed(tiny, weights, all_heads(tiny), seed=0) as trained:
        trainer = SliceTrainer(tiny, trained, rows, batch_size=4, seed="0")
        for _ in range(4):
            trainer.advance(Schedule(1e-2, 4))
        learned = mean_answer_nll(tiny, rows)

    assert learned < untrained
    after = tiny.module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_cell_is_computed_once_and_a_new_arm_costs_itself_alone(tiny: BaseModel, tmp_path: Path) -> None:
    pool = build(PoolSpec("gsm8k", 12, ("echo",), 0.5), TASK, OTHER)
    arm = Arm(name="one", weights=Weights(kind="lora", rank=2), epochs=1)
    first = laboratory(tiny, pool, tmp_path / "quality.json")
    cell = first.cell(arm, 0, 1e-3)
    assert cell is not None
    assert cell.measured is not None

    later = laboratory(tiny, pool, tmp_path / "quality.json", ends=0.0)  # there is no time to compute anything

    assert later.cell(replace(arm, name="called otherwise"), 0, 1e-3) == cell
    assert later.cell(arm, 1, 1e-3) is None
    assert later.cell(replace(arm, rows="random", ratio=0.5), 0, 1e-3) is None
    assert len(later.skipped) == 2
    assert str(later.skipped[0]).startswith("one, gsm8k, 12 rows, 50% echo, seed 1")


def test_a_cell_is_another_one_when_the_code_that_chooses_for_it_changes(
    tiny: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = laboratory(tiny, build(PoolSpec("gsm8k", 8), TASK, OTHER), tmp_path / "quality.json")
    every, chosen = ARMS[0], next(arm for arm in ARMS if arm.rows == "alignment" and arm.heads == "attribution")
    keys = [lab.key(arm, 0, 1e-3) for arm in (every, chosen)]
    scorer = tmp_path / "another.py"
    scorer.write_text("def alignment(given): return given\n")
    monkeypatch.setitem(DATA_SCORERS, "alignment", "another:alignment")
    monkeypatch.syspath_prepend(str(tmp_path))

    changed = [lab.key(arm, 0, 1e-3) for arm in (every, chosen)]
    scorer.write_text("# the same\ndef alignment(given): return given\n")
    commented = [lab.key(arm, 0, 1e-3) for arm in (every, chosen)]

    monkeypatch.setattr(config, "LOOK_SHARE", config.LOOK_SHARE / 2)
    numbered = [lab.key(arm, 0, 1e-3) for arm in (every, chosen)]

    assert changed[0] == numbered[0] == keys[0]
    assert changed[1] != keys[1]
    assert commented == changed
    assert numbered[1] != changed[1]


def test_the_oracle_takes_clean_rows_alone_and_random_rows_ignore_what_is_known(
    tiny: BaseModel, tmp_path: Path
) -> None:
    pool = build(PoolSpec("gsm8k", 16, ("echo",), 0.5), TASK, OTHER)
    made = laboratory(tiny, pool, tmp_path / "quality.json")
    arm = Arm(name="one", weights=EVERY[1], rows="oracle", ratio=0.25, epochs=1)

    oracle = made.cell(arm, 0, 1e-3)
    chosen = made.cell(replace(arm, rows="alignment"), 0, 1e-3)
    heads = made.cell(replace(arm, rows="alignment", heads="attribution", heads_ratio=0.25), 0, 1e-3)

    assert oracle is not None
    assert (oracle.rows, oracle.bad, oracle.stages) == (4, 0.0, [])
    assert chosen is not None
    assert [stage.name for stage in chosen.stages] == ["rows by alignment"]
    assert chosen.flops > oracle.flops
    assert heads is not None
    assert [stage.name for stage in heads.stages] == ["heads by attribution", "rows by alignment"]
    assert heads.parameters < chosen.parameters * 100


def options_of(tmp_path: Path, **more: Any) -> argparse.Namespace:
    """A run on tiny files and a tiny model."""
    model = tiny_model_dir(tmp_path / "tiny", n_layers=4)
    write_rows(tmp_path / "train.jsonl", some_rows(16))
    write_rows(tmp_path / "test.jsonl", some_rows(8, first=50))
    given = [f"--model={model}", f"--task=gsm8k={tmp_path}", f"--out={tmp_path / 'results'}", "--junk=echo"]
    given += ["--rows=16", "--validation=4", "--held-out=4", "--seeds=1", "--epochs=1", "--threads=1"]
    given += ["--precision=fp32", "--device=cpu"]
    return argparse.Namespace(**vars(_options(given)) | more)


def test_a_run_writes_a_page_with_every_arm_and_a_second_run_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(tmp_path, arm=["all rows, 1"])
    told: list[str] = []
    first = run(options, told.append)
    stored = json.loads((tmp_path / "results/quality.json").read_text())

    monkeypatch.setattr(Laboratory, "_compute", lambda *_, **__: pytest.fail("a cell was computed twice"))
    assert run(options, told.append) == first

    assert "## gsm8k, 16 rows, clean" in first
    assert "## gsm8k, 16 rows, 50% echo" in first
    for arm in ARMS:
        assert (f"| {arm.name} |" in first) == ("all rows, 1" in arm.name)
    assert {cell["arm"] for cell in stored["cells"].values()} == {arm.name for arm in ARMS if "all rows, 1" in arm.name}
    assert not (tmp_path / "results/quality.svg").exists()  # nothing to compare with


def test_a_run_without_time_writes_its_page(tmp_path: Path) -> None:
    text = run(options_of(tmp_path, arm=["all rows, 1 epoch"], minutes=0.0), lambda line: None)

    said = re.search(r"No time was left for (\d+) cells of (\d+) arms on 2 pools, nor", text)
    assert said is not None
    assert int(said[1]) == 2 * int(said[2])


def test_processes_that_share_the_work_compute_what_one_does(tmp_path: Path) -> None:
    options = options_of(tmp_path, arm=["10% random rows"], share=0.0)
    run(options, lambda line: None)
    alone = json.loads((tmp_path / "results/quality.json").read_text())["cells"]

    options.out, options.workers = tmp_path / "shared", 2
    page_of_both = run(options, lambda line: None)

    cells = json.loads((tmp_path / "shared/quality.json").read_text())["cells"]
    assert len(alone) > 1
    assert {key: cell["measured"] for key, cell in cells.items()} == {
        key: cell["measured"] for key, cell in alone.items()
    }
    assert "2 processes shared the device" in page_of_both


def test_processes_end_with_the_one_that_began_them_even_if_it_is_killed(tmp_path: Path) -> None:
    options_of(tmp_path)  # for its files
    endless = ["--epochs=100000", "--rows=16", "--validation=4", "--held-out=4", "--share=0", "--arm=random rows"]
    given = [f"--model={tmp_path / 'tiny'}", f"--task=gsm8k={tmp_path}", f"--out={tmp_path}", "--threads=1", *endless]
    with psutil.Popen([sys.executable, "-m", "benchmarks.quality", *given, "--workers=2", "--device=cpu"]) as parent:
        try:
            while len(workers := [one for one in parent.children() if "spawn_main" in " ".join(one.cmdline())]) < 2:
                assert parent.poll() is None
                time.sleep(0.05)
        finally:
            parent.kill()

    _, alive = psutil.wait_procs(workers, timeout=60)

    for one in alive:
        one.kill()
    assert not alive


def test_an_order_that_fails_is_named_and_one_that_needs_memory_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(tmp_path, arm=["10% random rows"], share=0.0)
    spec, told, waiting = PoolSpec("gsm8k", 16), queue.SimpleQueue[Any](), queue.SimpleQueue[Any]()
    trouble = iter([RuntimeError("no luck"), RuntimeError("CUDA error: out of memory")])
    monkeypatch.setattr(Laboratory, "best", lambda *_: (_ for _ in ()).throw(next(trouble)))
    for order in ((spec, ARMS[0]), (spec, ARMS[1]), (spec, ARMS[2])):
        waiting.put(order)

    _work(options, waiting, told, ends=time.monotonic() + 60)

    assert told.get() == ("failed", f"{REFERENCE} on gsm8k, 16 rows, clean failed: RuntimeError: no luck")
    assert told.get() == ("out of memory", (spec, ARMS[1]))
    assert waiting.get() == (spec, ARMS[2])  # the process ended and gave back what it held


def test_orders_given_back_are_done_by_fewer_processes_and_named_when_one_alone_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(workers=3)
    spec, rounds = PoolSpec("gsm8k", 16), []

    def fake(_: object, orders: list[Any], workers: int, ends: float) -> Any:
        rounds.append((len(orders), workers))
        yield from [("out of memory", order) for order in orders[-2:]]

    monkeypatch.setattr("benchmarks.quality.workers._round", fake)

    failed = share_out(options, [(spec, arm) for arm in ARMS[:5]], Cells(tmp_path / "q.json"), lambda _: None, ends=0.0)

    assert rounds == [(5, 3), (2, 1)]
    assert failed == [f"{arm.name} on gsm8k, 16 rows, clean needs more memory than there is." for arm in ARMS[3:5]]


def test_a_pool_of_which_nothing_was_computed_has_no_tables() -> None:
    text = page({"a pool": []}, base={"a pool": Before(4.0)}, facts={}, notes=[])

    assert text.endswith("## a pool\nHeld-out loss before training 4.0000.\n\nNo arm has been computed here.\n")


def test_a_measure_that_some_seeds_lack_is_shown_with_how_many_have_it_and_one_that_all_lack_is_not() -> None:
    one, other = found("one", 100, 1.0, 2.0), found("other", 100, 1.0, 3.0)
    assert one.cells[0].measured is not None
    written = replace(one.cells[0], seed=1, measured=replace(one.cells[0].measured, metric=0.25))
    one = replace(one, cells=[*one.cells, written])

    text = page({"a pool": [one, other]}, base={"a pool": Before(4.0)}, facts={}, notes=[])

    head, rule, first, second = text[text.index("| arm | rows") :].splitlines()[:4]
    assert head.endswith("| token accuracy | exact match or ROUGE-L |")
    assert first.endswith("| 0.5000 | 0.2500 (1 seed) |")
    assert second.endswith("| 0.5000 |  |")
    assert head.count("|") == rule.count("|") == first.count("|") == second.count("|")


def test_a_page_names_what_there_was_no_time_for(tiny: BaseModel, tmp_path: Path) -> None:
    pool = build(PoolSpec("gsm8k", 8), TASK, OTHER)
    made = laboratory(tiny, pool, tmp_path / "quality.json", ends=0.0)
    reference = next(arm for arm in ARMS if arm.name == REFERENCE)

    assert made.best(reference, seeds=3) == []
    assert [str(one) for one in made.skipped] == [
        f"{REFERENCE}, gsm8k, 8 rows, clean, seed 0, rate {reference.weights.first_rate:g}"
    ]


def test_heads_are_compared_with_random_ones_of_the_same_size_and_rows_with_rows_for_others() -> None:
    whole, low = Weights(kind="slices"), Weights(kind="slices", rank=8)
    heads = [
        found("whole, chosen", 10, 1.0, 2.0, weights=whole, heads="attribution", heads_ratio=0.1, groups=HEADS),
        found("whole, random", 10, 1.0, 2.5, weights=whole, heads=RANDOM, heads_ratio=0.1, groups=HEADS),
        found("low, chosen", 10, 1.0, 3.0, weights=low, heads="attribution", heads_ratio=0.3, groups=HEADS),
        found("low, random", 10, 1.0, 4.0, weights=low, heads=RANDOM, heads_ratio=0.3, groups=HEADS),
        found("own", 10, 1.0, 5.0, weights=whole, heads="pad", heads_ratio=0.1, rows="alignment", groups=HEADS),
        found(
            "others'",
            10,
            1.0,
            7.0,
            weights=whole,
            heads="pad",
            heads_ratio=0.1,
            rows="alignment",
            rows_for=RANDOM,
            groups=HEADS,
        ),
    ]

    text = page({"a pool": heads}, base={"a pool": Before(9.0)}, facts={}, notes=[])

    table = text.partition("### Heads")[2]
    assert "| whole, chosen | 0.00 M | 2.0000 | -0.5000 (" in table
    assert "| low, chosen | 0.00 M | 3.0000 | -1.0000 (" in table
    assert "| own | 0.00 M | 5.0000 | -2.0000 (" in table
    assert table.count("|\n") == 8


def test_a_rate_whose_search_had_no_time_to_end_is_marked_so() -> None:
    cut = replace(found("one", 100, 1.0, 2.0), cut=True)

    text = page({"a pool": [cut, found("other", 100, 1.0, 3.0)]}, base={"a pool": Before(4.0)}, facts={}, notes=[])

    assert "| one | 4 | 0% | 0.00 M | 0 MB | 0.001 (search cut) | 1 |" in text
    assert "| other | 4 | 0% | 0.00 M | 0 MB | 0.001 | 1 |" in text


def test_a_file_of_cells_names_every_machine_that_computed_some() -> None:
    assert joined({"Machine": "one"}, {"Machine": "other", "Model": "m"}) == {"Machine": "one; other", "Model": "m"}
    assert joined({"Machine": "one; other"}, {"Machine": "one"}) == {"Machine": "one; other"}


def found(name: str, parameters: int, flops: float, nll: float, **arm: Any) -> Found:
    """An arm with one cell: four rows of ten tokens, of this loss a token."""
    measured = Measured([10 * nll] * 4, [10] * 4, token_accuracy=0.5, metric=None, other_loss=None, other_kl=None)
    weights = arm.pop("weights", Weights(kind="lora", rank=8))
    cell = Cell("pool", name, 0, 1e-3, False, nll, 4, 0.0, 0, parameters, 1.0, flops, [], measured, 1.0, 1)
    return Found(Arm(name=name, weights=weights, **arm), [cell])


def test_seconds_of_a_shared_device_are_not_divided_by_those_of_a_processor_alone() -> None:
    one, other = found("one", 1, 100.0, 0.90), found("other", 1, 50.0, 0.91)
    shared = replace(other, cells=[replace(other.cells[0], workers=12)])

    assert (_over(other, one, "seconds"), _over(other, one, "flops")) == ("1.00", "0.50")
    assert (_over(shared, one, "seconds"), _over(shared, one, "flops")) == ("", "0.50")


def test_the_learning_curve_sets_more_rows_beside_more_epochs() -> None:
    joined = {"rows": "alignment_likelihood", "epochs": 2, "mode": "fast"}
    arms = [
        found("all", 1, 100.0, 0.90, epochs=2),
        found("all once", 1, 50.0, 0.91, epochs=1),
        found("a half at random", 1, 25.0, 0.95, rows="random", ratio=0.5, epochs=1),
        found("a quarter at random", 1, 25.0, 0.97, rows="random", ratio=0.25, epochs=2),
        found("a quarter, chosen", 1, 25.0, 0.93, ratio=0.25, **joined),
        found("a quarter, chosen from all", 1, 25.0, 0.70, ratio=0.25, **joined | {"mode": "faithful"}),
        found("other weights", 1, 25.0, 0.80, ratio=0.25, weights=EVERY[1], **joined),
    ]

    text = page({"pool": arms}, base={"pool": Before(1.4, 2.1)}, facts={}, notes=[])

    assert "before training 1.4000. The other task's loss before training 2.1000." in text

    assert "| rows x epochs | random rows | clean rows by an oracle | by alignment_likelihood, fast |" in text
    assert "| 25% x 2 | 0.9700 (4 rows, 0% bad) |  | 0.9300 (4 rows, 0% bad) |" in text
    assert text.index("| 50% x 1 |") < text.index("| 100% x 1 | 0.9100") < text.index("| 100% x 2 | 0.9000")


def test_the_tables_compare_at_equal_cost_and_at_equal_parameters(tmp_path: Path) -> None:
    weights = frozenset({"weights"})
    arms = [
        found(REFERENCE, 2_000_000, 100.0, 0.90, groups=weights),
        found("half of the time", 2_000_000, 50.0, 0.95, epochs=1),
        found("a third, chosen", 2_000_000, 35.0, 0.85, rows="alignment"),
        found("a tenth, chosen", 2_000_000, 12.0, 0.99, rows="alignment"),
        found("what nobody has", 2_000_000, 10.0, 0.80, rows="oracle"),
        found("in the heads", 1_500_000, 90.0, 0.92, groups=weights, weights=EVERY[1]),
        found("small", 300_000, 90.0, 0.94, groups=weights, weights=Weights(kind="lora", rank=1)),
    ]

    text = page({"pool": arms}, base={"pool": Before(1.4, 2.1)}, facts={}, notes=[])
    draw({"pool": arms}, tmp_path / "quality.svg")

    assert f"### Each arm against {REFERENCE}\n" in text
    assert "| 0.10 |  |  |  |  |  |" in text
    assert "| 0.20 | a tenth, chosen | 0.9900 |  |  |  |" in text
    assert "| 0.35 | a third, chosen | 0.8500 |  |  |  |" in text
    assert "| 0.50 | a third, chosen | 0.8500 | half of the time | 0.9500 | -0.1000 (-0.1000 to -0.1000) |" in text
    assert f"| 1.00 | a third, chosen | 0.8500 | {REFERENCE} | 0.9000 | -0.0500" in text
    assert "| 1.50 M | in the heads | 0.9200 | +0.0200 (+0.0200 to +0.0200) |" in text
    assert "| 0.30 M | small | 0.9400 |  |" in text
    assert "How many rows" not in text  # two sizes are no curve
    assert "<svg" in (tmp_path / "quality.svg").read_text()


def test_where_the_reference_was_not_computed_one_epoch_of_it_is_compared_with() -> None:
    arms = [found(REFERENCE_ONCE, 2_000_000, 50.0, 0.95), found("chosen", 2_000_000, 20.0, 0.90, rows="alignment")]

    text, alone = (page({"pool": some}, base={"pool": Before(1.4)}, facts={}, notes=[]) for some in (arms, arms[1:]))

    assert f"### Each arm against {REFERENCE_ONCE}\n" in text
    assert "0.9000 | -0.0500 (-0.0500 to -0.0500) | " in text
    assert "### Each arm\n" in alone
