"""The command line: what it says when something is wrong, and that its words mean what POST /jobs means."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from app.cli import _body, cli, main
from app.errors import RequestInvalid
from app.models import install_directory
from p2d.errors import ConfigError, ModelUnsupported, OutOfMemory, P2DError
from p2d.model_info import read_model_info
from p2d.rows import write_rows
from p2d.work_folder import NAME as WORK_FOLDER
from p2d.work_folder import work_folder
from tests.factories import some_rows, tiny_model_dir

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("P2D_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def p2d(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> tuple[int, str]:
    """Exit status and all that was printed."""
    monkeypatch.setattr(sys, "argv", ["p2d", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    status = ended.value.code
    assert isinstance(status, int)
    return status, " ".join((printed.out + printed.err).split())


def test_a_wrong_field_is_named_with_its_place_and_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments: list[str | Path] = ["run", "--model", tmp_path, "--data", tmp_path, "--out", tmp_path]

    status, said = p2d(capsys, monkeypatch, *arguments, "--set", "heads.ratio=2", "--set", "heads.proxy_rows=many")

    assert status == 2
    assert "request.invalid" in said
    assert "/heads/proxy_rows" in said
    assert "Traceback" not in said


def test_hints_of_the_engine_fit_whoever_never_sent_a_request() -> None:
    def kinds(of: type[P2DError]) -> Iterator[type[P2DError]]:
        yield of
        for kind in of.__subclasses__():
            yield from kinds(kind)

    hints = {
        kind.code: kind.hint for kind in kinds(P2DError) if kind.__module__ == "p2d.errors" and kind is not P2DError
    }
    assert len(hints) > 15
    for code, hint in {**hints, RequestInvalid.code: RequestInvalid.hint}.items():
        assert not re.search(r"errors\[\]|[Ss]end |GET |POST ", hint), code


def test_every_command_tells_of_itself() -> None:
    def commands(of: Any, *path: str) -> Iterator[tuple[str, ...]]:
        if of.add_help_option:  # benchmarks are told of by processes of their own
            yield path
        for name, inner in getattr(of, "commands", {}).items():
            yield from commands(inner, *path, name)

    found = list(commands(get_command(cli)))
    assert ("submit",) in found
    assert ("webhooks", "redeliver") in found
    for path in found:
        done = CliRunner().invoke(cli, [*path, "--help"])
        assert (done.exit_code, done.exception) == (0, None), path
        assert " ".join(path) in done.stdout


def test_bad_rows_are_listed_by_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": ""}\n' + "not json\n" * 150)

    status, said = p2d(capsys, monkeypatch, "run", "--model", model, "--data", data, "--out", tmp_path / "out")

    assert status == 2
    assert "line 2:" in said
    assert all(f"line {line}:" in said for line in range(3, 102))
    assert "row.not_json 150, row.empty 1" in said
    assert "... and 51 more" in said
    assert len((tmp_path / "out" / "bad_lines.jsonl").read_text().splitlines()) == 151


def test_run_takes_files_with_other_column_names(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "german.csv"
    data.write_text("Frage,Antwort\nq,a\nq,\n")
    run: list[str | Path] = ["run", "--model", model, "--data", data, "--out", tmp_path / "out", "--map"]

    _, read = p2d(capsys, monkeypatch, *run, "prompt=Frage", "--map", "completion=Antwort")
    assert "1 line of the dataset cannot be used" in read
    assert "/Antwort line 3" in read

    status, missing = p2d(capsys, monkeypatch, *run, "prompt=Fragen")
    assert status == 2
    assert "no column 'Fragen'; it has Frage, Antwort" in missing

    status, malformed = p2d(capsys, monkeypatch, *run, "prompt")
    assert status == 2
    assert "FIELD=COLUMN" in malformed


def test_run_takes_earlier_results_and_a_device_where_they_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data.jsonl", some_rows(30))
    run: list[str | Path] = ["run", "--model", model, "--data", tmp_path / "data.jsonl", "--set", "heads.proxy_rows=8"]
    to: list[str | Path] = ["--device", "cpu", "--out", tmp_path / "out"]

    status, found = p2d(capsys, monkeypatch, *run, *to, "--kind", "identify_heads")
    assert (status, "identify_heads, 2 of 18 heads" in found) == (0, True)
    head_map = tmp_path / "out" / "head_map.json"

    status, used = p2d(capsys, monkeypatch, *run, *to, "--kind", "select_data", "--head-map", head_map)
    assert status == 0
    assert "not counted: heads, given as files" in used

    for option, kind, said in [
        ("--head-map", "identify_heads", "makes its own"),
        ("--selection", "select_data", "makes its own"),
        ("--selection", "adapt", "is not a selection"),
    ]:
        status, refused = p2d(capsys, monkeypatch, *run, *to, "--kind", kind, option, head_map)
        assert status == 2
        assert said in refused
    status, refused = p2d(capsys, monkeypatch, *run, "--out", tmp_path / "out", "--device", "cuda:9")
    assert (status, "'cuda:9' is not available" in refused) == (2, True)


def test_a_run_ends_with_what_its_report_warns_of_and_says_where_the_job_was_not_cheaper(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "data.jsonl", some_rows(24))
    write_rows(tmp_path / "held_out.jsonl", [*some_rows(1), *some_rows(7, first=200)])
    files: list[str | Path] = ["--data", tmp_path / "data.jsonl", "--validation", tmp_path / "held_out.jsonl"]
    settings = ["--set", "training.learning_rate=0.001", "--set", "training.epochs=1"]

    status, said = p2d(
        capsys, monkeypatch, "run", "--model", model, *files, *settings, "--device", "cpu", "--out", tmp_path / "out"
    )

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert status == 0
    assert any(warning.startswith("1 held-out row stands in the training rows too:") for warning in report["warnings"])
    assert all(f"Note: {warning}" in said for warning in report["warnings"])
    for ratio in ("aer", "aer_lora"):
        verdict = "cheaper" if report["cost"][ratio] < 1 else "NOT cheaper at this size"
        assert re.search(rf"(?i){ratio} {report['cost'][ratio]:.2f} \(against [^)]*\): {verdict}", said)


def test_a_run_says_what_became_of_an_earlier_ones_work_once_that_is_known(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    def full(*_: object) -> NoReturn:
        raise OutOfMemory("as a test wants it")

    write_rows(tmp_path / "data.jsonl", some_rows(24))
    run: list[str | Path] = ["run", "--model", model, "--data", tmp_path / "data.jsonl", "--out", tmp_path / "out"]
    run += ["--kind", "select_data", "--device", "cpu", "--set", "heads.scorer=random", "--set", "data.scorer=random"]
    work = tmp_path / "out" / WORK_FOLDER
    work.parent.mkdir()

    with work_folder(tmp_path / "out"):
        status, said = p2d(capsys, monkeypatch, *run)
    assert (status, "run.out_in_use" in said, "earlier run" in said) == (2, True, False)

    with monkeypatch.context() as no_memory:
        no_memory.setattr("p2d.steps.select", full)
        status, said = p2d(capsys, monkeypatch, *run)
    assert (status, "earlier run" in said, work.exists()) == (1, False, True)

    status, said = p2d(capsys, monkeypatch, *run, "--set", "training.rank=9999")
    assert (status, "earlier run" in said) == (2, False)

    status, said = p2d(capsys, monkeypatch, *run)
    assert (status, f"What an earlier run left in {work} is used." in said) == (0, True)

    work.mkdir()
    status, said = p2d(capsys, monkeypatch, *run)
    assert (status, f"What an earlier run left in {work} was of no use to this job, and is gone." in said) == (0, True)


def test_a_dataset_file_that_is_not_there_is_said_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    none = tmp_path / "none.jsonl"

    commands: list[list[str | Path]] = [
        ["run", "--model", model, "--data", none, "--out", tmp_path / "out"],
        ["submit", "--base-model", "m", "--data", none],
    ]
    for arguments in commands:
        status, said = p2d(capsys, monkeypatch, *arguments)

        assert status == 2
        assert "dataset.file_missing" in said


def test_a_service_that_is_not_there_is_said_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2d.client.time.sleep", lambda seconds: None)
    monkeypatch.setattr("p2d.service_connection.backoff_s", lambda failures: 0.0)

    status, said = p2d(capsys, monkeypatch, "watch", "job_1", "--url", "http://127.0.0.1:1")

    assert status == 1
    assert "No answer from http://127.0.0.1:1" in said


@pytest.mark.parametrize("command", ["api", "worker", "migrate"])
def test_a_part_alone_asks_for_its_servers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path, command: str
) -> None:
    status, said = p2d(capsys, monkeypatch, command)

    assert status == 1
    assert "P2D_DATABASE_URL is not set" in said


def test_options_become_the_body_of_a_job() -> None:
    body = _body("adapt", "paper", ["heads.ratio=0.2", 'training.slices=["v"]', "name=first try", "data.ratio=auto"])

    assert body == {
        "kind": "adapt",
        "recipe": "paper",
        "heads": {"ratio": 0.2},
        "training": {"slices": ["v"]},
        "name": "first try",
        "data": {"ratio": "auto"},
    }


def test_a_model_is_added_listed_and_added_again_without_change(home: Path, model: Path) -> None:
    runner = CliRunner()

    first = runner.invoke(cli, ["models", "add", "mine", str(model)])
    second = runner.invoke(cli, ["models", "add", "mine", str(model)])
    listed = runner.invoke(cli, ["models", "list"])

    assert (first.exit_code, second.exit_code) == (0, 0)
    assert "mine" in listed.output
    assert read_model_info(home / "models" / "mine").digest == read_model_info(model).digest
    assert [path.name for path in (home / "models").iterdir()] == ["mine"]


def test_a_model_directory_is_checked_without_being_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path, model: Path, tmp_path: Path
) -> None:
    good = CliRunner().invoke(cli, ["models", "check", str(model)])
    status, said = p2d(capsys, monkeypatch, "models", "check", tmp_path)

    assert good.exit_code == 0
    assert "tiny can be used: llama" in good.stdout
    assert status == 2
    assert "model.invalid" in said
    assert "config.json is missing" in said
    assert not (home / "models").exists()


def test_a_name_that_could_leave_the_models_directory_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        install_directory(tmp_path, "../outside", model)

    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_family_is_refused_before_it_is_copied(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((model / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))

    with pytest.raises(ModelUnsupported):
        install_directory(tmp_path / "models", "other", other)

    assert not (tmp_path / "models").exists()


def test_the_commands_of_a_client_start_without_torch() -> None:
    script = "import sys; import app.cli, app.demo, app.doctor; print([m for m in ('torch', 'transformers') if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)

    assert done.stdout.strip() == "[]"


def test_run_finds_its_checkout_from_anywhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "app"  # a directory whose name could be taken for ours
    elsewhere.mkdir()
    (elsewhere / "__init__.py").write_text("raise SystemExit('wrong app')")
    if not (ROOT / ".venv" / "installed").exists():
        pytest.skip("this environment was not made by ./run")

    done = subprocess.run(
        [ROOT / "run", "models", "list"],
        cwd=tmp_path,
        env=os.environ | {"P2D_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
