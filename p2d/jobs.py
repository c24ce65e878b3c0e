"""A whole job in this process, without the service: same steps, same files. Behind `from p2d import adapt` and `p2d run`.

The service's ledger, leases and retries are not here: a failure raises, and nothing is left behind but what was asked for.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2d.accounting import Attempt
from p2d.columns import Columns, mapped
from p2d.config import JobConfig, check
from p2d.errors import DatasetFileMissing
from p2d.files import read_json, write_json
from p2d.pipeline import SHARD_ROWS, STEPS, ModelCache, PlannedStep, StepCall, plan_steps, run_step
from p2d.validation import check_file

if TYPE_CHECKING:
    from datasets import Dataset

RESULTS = (
    "heads.safetensors",
    "manifest.json",
    "head_map.json",
    "selection.jsonl",
    "training.json",
    "evaluation.json",
    "report.json",
)
"""Files that a job leaves in `out`, those that its kind makes."""

OnProgress = Callable[[PlannedStep, int, int, Mapping[str, float]], None]


@dataclass(frozen=True, slots=True)
class Result:
    """Where the files of a finished job are, and its report."""

    out: Path
    report: dict[str, Any]

    def file(self, name: str) -> Path:
        """Path of one result, for example `heads.safetensors`."""
        assert name in RESULTS, name
        return self.out / name


def adapt(
    *,
    model: Path | str,
    data: Path | str | Dataset,
    out: Path | str,
    validation: Path | str | Dataset | None = None,
    mapping: Mapping[str, str] | None = None,
    config: JobConfig | None = None,
    head_map: Path | str | None = None,
    selection: Path | str | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> Result:
    """Find heads, select rows, train, evaluate; leaves the head adapter and the report in `out`.

    Args:    model: directory with config.json, tokenizer.json and safetensors.
             data, validation: a jsonl, json, csv or parquet file, plain, gzip or zstd; or a `datasets.Dataset` with the same
             field names.
             mapping: field -> column, where the files name their columns otherwise: `{"prompt": "Frage"}`.
             head_map, selection: files of an earlier job, instead of making them anew.
    Raises:  P2DError: every error that a user may see.
    """
    job = replace(config or JobConfig(), kind="adapt")
    return _run(job, model, data, out, validation, mapping, head_map, selection, device, on_progress)


def identify_heads(
    *,
    model: Path | str,
    data: Path | str | Dataset,
    out: Path | str,
    validation: Path | str | Dataset | None = None,
    mapping: Mapping[str, str] | None = None,
    config: JobConfig | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> Result:
    """Stage 1 alone: leaves head_map.json in `out`. Arguments as for `adapt`."""
    job = replace(config or JobConfig(), kind="identify_heads")
    return _run(job, model, data, out, validation, mapping, None, None, device, on_progress)


def select_data(
    *,
    model: Path | str,
    data: Path | str | Dataset,
    out: Path | str,
    validation: Path | str | Dataset | None = None,
    mapping: Mapping[str, str] | None = None,
    config: JobConfig | None = None,
    head_map: Path | str | None = None,
    device: str = "auto",
    on_progress: OnProgress | None = None,
) -> Result:
    """Stages 1 and 2: leaves head_map.json and selection.jsonl in `out`. Arguments as for `adapt`."""
    job = replace(config or JobConfig(), kind="select_data")
    return _run(job, model, data, out, validation, mapping, head_map, None, device, on_progress)


def _run(
    config: JobConfig,
    model: Path | str,
    data: Path | str | Dataset,
    out: Path | str,
    validation: Path | str | Dataset | None,
    mapping: Mapping[str, str] | None,
    head_map: Path | str | None,
    selection: Path | str | None,
    device: str,
    on_progress: OnProgress | None,
) -> Result:
    check(config)
    columns = mapped(mapping or {})
    with _result_folder(out) as folder, tempfile.TemporaryDirectory(prefix=".p2d-", dir=folder) as scratch:
        work = Path(scratch)  # inputs and outputs of all steps: each reads what earlier ones wrote
        rows = _take(data, work / "dataset.jsonl", columns)
        if validation is not None:
            _take(validation, work / "validation.jsonl", columns)
        if head_map is not None:
            shutil.copyfile(head_map, work / "head_map.json")
            config = replace(config, heads=replace(config.heads, head_map=Path(head_map).name))
        if selection is not None:
            shutil.copyfile(selection, work / "selection.jsonl")
            config = replace(config, data=replace(config.data, selection=Path(selection).name))
        _run_steps(config, Path(model), work, rows, device, on_progress)
        for name in RESULTS:
            if (work / name).exists():
                (work / name).replace(folder / name)
    return Result(folder, read_json(folder / "report.json"))


@contextmanager
def _result_folder(out: Path | str) -> Iterator[Path]:
    """The folder of the results; gone again if the job made it and ends without any."""
    folder = Path(out)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield folder
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()


def _take(data: Path | str | Dataset, normalised: Path, columns: Columns) -> int:
    """Check a user's rows and write their normalised form; the number of rows."""
    if isinstance(data, (str, Path)):
        path = Path(data)
        if not path.is_file():
            raise DatasetFileMissing(f"There is no file {str(path)!r}.")
    else:  # through a file, so that a table gets the same checks and the same messages
        path = normalised.with_suffix(".table.jsonl")
        data.to_json(path)
    return check_file(path, path.name, normalised=normalised, columns=columns).rows


def _run_steps(
    config: JobConfig, model: Path, work: Path, rows: int, device: str, on_progress: OnProgress | None
) -> None:
    models = ModelCache()
    attempts: list[Attempt] = []
    for planned in plan_steps(config, rows, SHARD_ROWS):
        call = StepCall(
            step=planned.step,
            shard=planned.shard,
            shards=planned.shards,
            config=config,
            model_dir=model,
            inputs=work,
            out=work,
            device=device,
        )
        if planned.step == "package":
            write_json(work / "steps.json", {"steps": [asdict(attempt) for attempt in attempts]})
        started = time.perf_counter()
        run_step(call, progress=_progress_of(planned, on_progress), models=models)
        seconds = time.perf_counter() - started
        attempts.append(Attempt(step=planned.step, shard=planned.shard, status="done", seconds=seconds))
        assert all(list(work.glob(name)) for name in STEPS[planned.step].writes), planned


def _progress_of(
    planned: PlannedStep, on_progress: OnProgress | None
) -> Callable[[int, int, Mapping[str, float]], None]:
    def progress(done: int, total: int, metrics: Mapping[str, float], /) -> None:
        if on_progress is not None:
            on_progress(planned, done, total, metrics)

    return progress
