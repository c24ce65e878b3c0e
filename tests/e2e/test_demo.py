"""`p2d demo` with the tiny model in the real one's place: its files, its words, and nothing left running."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from app import demo
from app.embedded import remove
from app.service import Service
from app.settings import Settings


def test_the_demo_leaves_its_result_and_nothing_else_running(
    service: Service, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The service's models directory has the tiny model under the demo's name, so nothing is fetched.
    settings = Settings.model_validate({"home": tmp_path / "home", "models_dir": service.settings.models_dir})
    monkeypatch.setattr(demo, "package_root", lambda: examples.parents[1])
    console = Console(file=StringIO(), width=160)
    before = {process.pid for process in psutil.Process().children()}

    try:
        demo.demo(settings, tmp_path / "out", console)
    finally:
        remove(settings.home / "demo")

    assert {path.name for path in (tmp_path / "out").iterdir()} == set(demo.RESULT)
    assert {process.pid for process in psutil.Process().children()} <= before
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "This job will take about",
        f"all {report['heads']['total']}: none had to be found",
        f"{report['selection']['kept']} of {report['selection']['rows']}",
        f"{report['evaluation']['loss_before']:.4f} before, {report['evaluation']['loss_after']:.4f} after",
        "exact match",
        *(line["name"] for line in report["cost"]["lines"] if line["seconds"] >= 0.05),
        f"AER = {report['cost']['counted_s']:.1f} / {report['cost']['full_s']:.1f}",
        "aer_lora = ",
        f"AER_flop = {report['cost']['counted_flops'] / 1e12:.2f} / ",
        "2 epochs on both sides",
        "(projected)",
        "Next:",
    ):
        assert words in said, words
