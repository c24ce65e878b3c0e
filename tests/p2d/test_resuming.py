"""A run without the service that is killed goes on where it was: same bytes, nothing done twice, every second on the bill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from p2d import Result, adapt, identify_heads, jobs, select_data
from p2d import work_folder as folder_of_work
from p2d.config import DataConfig, HeadsConfig, JobConfig, TrainingConfig, config_json
from p2d.errors import ConfigError, OutInUse, OutOfMemory, OutUnusable
from p2d.jobs import RESULTS
from p2d.model_info import ModelInfo, read_model_info
from p2d.pipeline import PlannedStep
from p2d.rows import write_rows
from p2d.work_folder import NAME, work_folder
from tests.factories import some_rows

ROOT = Path(__file__).resolve().parents[2]

CONFIG = JobConfig(
    heads=HeadsConfig(proxy_rows=8, ratio=0.2),
    data=DataConfig(ratio=0.5, scorer="icl", n_demos=3, n_queries=2),
    training=TrainingConfig(epochs=2, learning_rate=1e-3, batch_size=2),
)

HELD_RUN = """
import json, sys
from p2d import adapt, jobs, work_folder
from p2d.config import config_from_json

asked = json.loads(sys.argv[1])
jobs.SHARD_ROWS, work_folder.SIGN_OF_LIFE_S = 8, 0.0

def show(planned, done, total, metrics):
    if [planned.step, planned.shard] == asked["at"][:2] and done >= asked["at"][2]:
        print("reached", flush=True)
        sys.stdin.read()

config = config_from_json(asked["config"])
adapt(model=asked["model"], data=asked["data"], out=asked["out"], config=config, device="cpu", on_progress=show)
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SHARD_ROWS", 8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    write_rows(path, some_rows(24))
    return path


def run(
    model: Path, data: Path, out: Path, config: JobConfig = CONFIG, *, stop: str = ""
) -> tuple[Result | None, list[str]]:
    """A run in this process, which runs out of memory at the step `stop`; its result and the steps that it worked on."""
    worked: list[str] = []

    def show(planned: PlannedStep, done: int, total: int, metrics: Mapping[str, float]) -> None:
        if (name := f"{planned.step} {planned.shard}") not in worked:
            worked.append(name)
        if planned.step == stop:
            raise OutOfMemory("as a test wants it")

    try:
        return adapt(model=model, data=data, out=out, config=config, device="cpu", on_progress=show), worked
    except OutOfMemory:
        return None, worked


def kill_at(model: Path, data: Path, out: Path, *at: str | int) -> None:
    """Run in a process of its own, and kill it with SIGKILL once it has come to a batch of a step."""
    asked = {"model": str(model), "data": str(data), "out": str(out), "config": config_json(CONFIG), "at": at}
    command = [sys.executable, "-c", HELD_RUN, json.dumps(asked)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"reached\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_a_run_killed_twice_ends_with_the_bytes_of_an_unbroken_one(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    unbroken, _ = run(tiny_dir, data, tmp_path / "unbroken")
    assert unbroken is not None
    out = tmp_path / "out"

    kill_at(tiny_dir, data, out, "respond", 1, 1)
    kill_at(tiny_dir, data, out, "train", 0, 7)  # of 10 steps; the first epoch has 5
    result, worked = run(tiny_dir, data, out)

    assert result is not None
    assert worked == ["train 0", "evaluate 0", "package 0"]
    assert {path.name for path in out.iterdir()} == {path.name for path in unbroken.out.iterdir()}
    for name in ("heads.safetensors", "manifest.json", "head_map.json", "selection.jsonl"):
        assert (out / name).read_bytes() == (unbroken.out / name).read_bytes(), name
    assert json.loads((out / "training.json").read_text())["resumed_step"] == 5
    cost = result.report["cost"]
    assert {(step["step"], step["shard"]) for step in cost["steps"]} >= {("heads", 0), ("respond", 0), ("respond", 2)}
    assert seconds_of(result, "heads: proxies and scores") > 0
    assert seconds_of(result, "attempts that were stopped") > 0
    assert seconds_of(unbroken, "attempts that were stopped") == seconds_of(result, "attempts that failed") == 0
    assert cost["counted_s"] == pytest.approx(sum(line["seconds"] for line in cost["lines"] if line["counted"]))


def test_what_a_run_does_before_its_first_step_is_on_the_bill(
    tiny_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []

    def slowly(model: Path) -> ModelInfo:
        reads.append(model)
        return read_model_info(model)

    monkeypatch.setattr(jobs, "read_model_info", slowly)
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + 1000 * len(reads))
    monkeypatch.setattr(folder_of_work, "time", clock)

    run(tiny_dir, data, tmp_path, stop="train")
    result, worked = run(tiny_dir, data, tmp_path)

    assert result is not None
    assert worked[0] == "train 0"
    assert 2000 <= seconds_of(result, "start processes, move files") < 3000
    assert 0 < seconds_of(result, "attempts that failed") < 1000  # it ran out of memory
    assert seconds_of(result, "attempts that were stopped") == 0


def seconds_of(result: Result, name: str) -> float:
    return float(next(line["seconds"] for line in result.report["cost"]["lines"] if line["name"] == name))


def test_a_run_that_would_give_another_result_starts_anew(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    other = replace(CONFIG, training=replace(CONFIG.training, seed=1))
    more = tmp_path / "more.jsonl"
    write_rows(more, some_rows(25))

    _, first = run(tiny_dir, data, tmp_path, stop="train")
    _, same = run(tiny_dir, data, tmp_path, stop="train")
    _, seed = run(tiny_dir, data, tmp_path, other, stop="train")
    _, rows = run(tiny_dir, more, tmp_path, other, stop="train")

    assert first[:2] == seed[:2] == rows[:2] == ["validate 0", "heads 0"]
    assert same == ["train 0"]
    assert (tmp_path / NAME).is_dir()


def test_a_run_whose_model_found_no_memory_keeps_what_it_had_done(
    tiny_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise RuntimeError("unable to mmap 269060552 bytes from file <model.safetensors>: Cannot allocate memory (12)")

    run(tiny_dir, data, tmp_path, stop="train")
    with monkeypatch.context() as no_memory:
        no_memory.setattr("p2d.models.AutoModelForCausalLM.from_pretrained", full)
        assert run(tiny_dir, data, tmp_path) == (None, [])
    _, worked = run(tiny_dir, data, tmp_path, stop="train")

    assert worked == ["train 0"]


def test_work_that_no_run_can_use_is_not_left_behind(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    run(tiny_dir, data, tmp_path / "out", stop="validate")
    assert not (tmp_path / "out").exists()

    run(tiny_dir, data, tmp_path / "out", stop="train")
    with pytest.raises(ConfigError):  # before any work: what the other run had done is still good
        adapt(model=tiny_dir, data=data, out=tmp_path / "out", config=CONFIG, head_map=tmp_path / "none.json")
    _, worked = run(tiny_dir, data, tmp_path / "out", stop="train")
    assert worked == ["train 0"]


def test_a_job_that_is_refused_leaves_the_work_of_another(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    refused = replace(CONFIG, training=replace(CONFIG.training, rank=9999))

    run(tiny_dir, data, tmp_path, stop="train")
    with pytest.raises(ConfigError):
        run(tiny_dir, data, tmp_path, refused)
    _, worked = run(tiny_dir, data, tmp_path, stop="train")

    assert worked == ["train 0"]


def test_two_runs_cannot_work_in_one_folder(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    with work_folder(tmp_path), pytest.raises(OutInUse):
        run(tiny_dir, data, tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_results_that_can_be_written_nowhere_are_said_in_words(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    for out, why in (("file", "File exists"), ("file/out", "Not a directory")):
        with pytest.raises(OutUnusable, match=rf"{out}' cannot be written to: {why}\.$"):
            adapt(model=tiny_dir, data=data, out=tmp_path / out, device="cpu")

    assert (tmp_path / "file").read_text() == "mine"


def test_results_of_an_earlier_job_do_not_stay_beside_another_s(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    by_chance = replace(CONFIG, heads=replace(CONFIG.heads, scorer="random"), data=DataConfig(scorer="random"))
    found = identify_heads(model=tiny_dir, data=data, out=tmp_path, config=by_chance, device="cpu")
    for name in (*RESULTS[:2], "evaluation.json", "mine.txt"):
        (tmp_path / name).write_text("{}")

    given = found.file("head_map.json")
    select_data(model=tiny_dir, data=data, out=tmp_path, config=by_chance, head_map=given, device="cpu")

    assert {path.name for path in tmp_path.iterdir()} == {
        "head_map.json",
        "selection.jsonl",
        "report.json",
        "mine.txt",
    }


def test_files_of_earlier_jobs_are_checked_before_the_model_works(tiny_dir: Path, data: Path, tmp_path: Path) -> None:
    other, done = tmp_path / "other.jsonl", run(tiny_dir, data, tmp_path / "done")[0]
    write_rows(other, some_rows(24, first=300))
    assert done is not None
    steps: list[str] = []

    def refused(
        data: Path, config: JobConfig = CONFIG, head_map: Path | None = None, selection: Path | None = None
    ) -> ConfigError:
        with pytest.raises(ConfigError) as caught:
            adapt(
                model=tiny_dir,
                data=data,
                out=tmp_path / "out",
                config=config,
                device="cpu",
                on_progress=lambda planned, done, total, metrics: steps.append(planned.step),
                head_map=head_map,
                selection=selection,
            )
        return caught.value

    missing = refused(data, head_map=tmp_path / "none.json", selection=tmp_path / "none.jsonl")
    assert [error.pointer for error in missing.errors] == ["/heads/head_map", "/data/selection"]
    named = refused(data, replace(CONFIG, heads=HeadsConfig(head_map="hm_1")))
    assert "give the file" in named.text
    assert "of another dataset" in refused(other, selection=done.file("selection.jsonl")).text
    assert "not a selection" in refused(data, selection=done.file("head_map.json")).text
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^mine\.json is not a head map"):
        adapt(model=tiny_dir, data=data, out=tmp_path / "out", config=CONFIG, head_map=tmp_path / "mine.json")
    assert not set(steps) - {"validate"}
