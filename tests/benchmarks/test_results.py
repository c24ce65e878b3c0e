"""What a run writes: every ratio with its target and twin; a run that was cut goes on with the parts that are missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks.findings import Findings, Ratio, Table, Target, as_json, as_markdown, of_json
from benchmarks.sizes import findings_of
from benchmarks.workbench import Workbench, per_round

FOUND = Findings(
    ratios=(
        Ratio(name="theirs / ours", rounds=(9.0, 8.5, 10.0), target=Target(at="least", value=8), twin={"FLOP": 2.0}),
        Ratio(name="bytes", rounds=(1.5,), target=Target(at="most", value=1.2)),
    ),
    tables=(Table(title="Seconds", columns=("arm", "seconds"), lines=(("ours", 1234.5),)),),
    seconds={"ours": [1.0, 2.0, 3.0]},
    notes=("Nothing else ran.",),
)

runs: list[str] = []


def first(bench: Workbench) -> Findings:
    runs.append("first")
    return FOUND


def second(bench: Workbench) -> Findings:
    runs.append("second")
    if runs.count("second") == 1:
        raise KeyboardInterrupt
    return Findings()


@pytest.fixture(autouse=True)
def _parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    runs.clear()
    names = {name: f"tests.benchmarks.test_results:{name}" for name in ("first", "second")}
    monkeypatch.setattr(command, "PARTS", names)
    monkeypatch.setattr(command, "_function", lambda name: {"first": first, "second": second}[name])
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_findings_come_back_as_they_were_written() -> None:
    assert of_json(json.loads(json.dumps(as_json(FOUND)))) == FOUND


def test_a_ratio_is_the_median_and_says_whether_it_reaches_its_target() -> None:
    entries = as_json(FOUND)["ratios"]

    assert [(entry["value"], entry["met"]) for entry in entries] == [(9.0, True), (1.5, False)]
    assert per_round([4.0, 9.0], [2.0, 3.0], scale=0.5) == [1.0, 1.5]


def test_a_run_that_was_cut_goes_on_with_what_is_missing(tiny_dir: Path, tmp_path: Path) -> None:
    arguments = ["all", "--model", str(tiny_dir), "--device", "cpu", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        command.main(arguments)
    command.main(arguments)

    assert runs == ["first", "second", "second"]
    results = json.loads((tmp_path / "bench.json").read_text())
    assert list(results["parts"]) == ["first", "second"]
    page = (tmp_path / "bench.md").read_text()
    assert page == as_markdown(results)
    for words in ("| theirs / ours | 9 | 8.5 to 10 | >= 8, met | FLOP 2 |", "| bytes | 1.5 | exact | <= 1.2, MISSED |"):
        assert words in page
    assert "| ours | 1,234 |" in page


def test_a_named_part_and_other_settings_are_measured_anew(tiny_dir: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_dir), "--device", "cpu", "--out", str(tmp_path)]
    for more in (["first"], ["first"], ["first", "--rounds", "2"]):
        command.main([*more, *arguments])

    assert runs == ["first"] * 3
    assert json.loads((tmp_path / "bench.json").read_text())["settings"]["rounds"] == 2


def test_growth_is_read_off_the_two_largest_jobs() -> None:
    sizes = (1_000, 10_000)
    jobs = [{"rows": n, "seconds": n / 10, "written_bytes": 3 * n, "peak_bytes": 5_000_000} for n in sizes]

    assert [ratio.value for ratio in findings_of(jobs).ratios] == pytest.approx([1, 1, 0])


def test_help_asks_for_no_model_that_run_bench_fetches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])

    assert ended.value.code == 0
    assert "[--model MODEL]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "with --model"),
        (["--model", "nowhere"], "no directory 'nowhere'"),
        (["--rounds", "0"], "--rounds: '0' is not a whole number"),
    ],
)
def test_what_cannot_run_is_said_before_anything_is_loaded(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)

    assert ended.value.code == 2
    assert said in capsys.readouterr().err
    assert not runs
