"""The README's curl walk, run as it is written."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

from app.service import Service
from tests.e2e.conftest import MODEL, ROOT


def walk() -> str:
    """The shell code between the markers of README.md."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marked = re.search(r"<!-- walk:start -->\n(.*?)<!-- walk:end -->", readme, re.DOTALL)
    assert marked is not None
    blocks = re.findall(r"^```sh\n(.*?)^```", marked[1], re.DOTALL | re.MULTILINE)
    assert blocks
    return "".join(blocks)


def test_the_walk_goes_from_post_to_download_as_written(service: Service, examples: Path) -> None:
    here = examples.parents[1]  # where ./examples/gsm8k/train.jsonl is
    script = walk()
    assert f"MODEL={MODEL}\n" in script
    # The one line that is not the reader's to keep: the address, here of a free port.
    script, changed = re.subn(r"^P2D=\S+$", f"P2D={service.url}", script, flags=re.MULTILINE)
    assert changed == 1

    done = subprocess.run(
        ["sh", "-eu", "-c", script],
        cwd=here,
        env=os.environ | {"no_proxy": "*"},
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "event: end" in done.stdout
    report = json.loads((here / "report.json").read_text())
    assert report["kind"] == "adapt"
    manifest = json.loads((here / "manifest.json").read_text())
    assert manifest["base_digest"] == report["base_model"]["digest"]
    assert (here / "heads.safetensors").stat().st_size > 0
