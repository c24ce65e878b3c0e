"""A whole job in this process, without the service: same steps, same files. Behind `from p2d import adapt` and `p2d run`.

The service's ledger, leases and retries are not here: a failure raises. A run that is killed leaves its work in a hidden
folder in `out` (`p2d.work_folder`), and the same call goes on from there; any other end leaves what was asked for, or nothing.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2d.columns import Columns, mapped
from p2d.config import JobConfig, Kind, config_json
from p2d.config_checks import check, check_given_heads
from p2d.errors import ConfigError, DatasetError, DatasetFileMissing, ErrorDetail, OutUnusable, P2DError
from p2d.files import read_json, sha256_of, write_json
from p2d.head_maps import check_head_map
from p2d.model_info import ModelInfo, read_model_info
from p2d.pipeline import SHARD_ROWS, STEPS, ModelCache, PlannedStep, Progress, StepCall, plan_steps, run_step
from p2d.row_files import open_rows
from p2d.validation import DataFile, check_files
from p2d.versions import fingerprint
from p2d.work_folder import WorkFolder, work_folder

if TYPE_CHECKING:
    from datasets import Dataset

RESULTS = (
    "heads.safetensors",
    "manifest.json",
    "head_map.json",
    "selection.jsonl",
    "training.json",
    "evaluation.json",
    "row_losses.json",
    "report.json",
)
"""Files that a job leaves in `out`, those that its kind makes."""

BAD_LINES = "bad_lines.jsonl"
"""And the one that is left where a dataset has more bad lines than its error names."""

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
    job = _of_kind("adapt", config)
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
    job = _of_kind("identify_heads", config)
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
    job = _of_kind("select_data", config)
    return _run(job, model, data, out, validation, mapping, head_map, None, device, on_progress)


def _of_kind(kind: Kind, config: JobConfig | None) -> JobConfig:
    check(config or JobConfig())  # a mapping, say, could not even be given a kind
    return replace(config or JobConfig(), kind=kind)


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
    columns = mapped(mapping or {})
    config = _with_earlier(config, head_map, selection)
    with _result_folder(out) as folder, work_folder(folder) as work:
        inputs = work.incoming
        rows = _take(data, inputs / "dataset.jsonl", columns, folder)
        if validation is not None:
            _take(validation, inputs / "validation.jsonl", columns, folder)
        info = read_model_info(Path(model))
        if head_map is not None:
            check_given_heads(config, check_head_map(Path(head_map), info).scorer)
            shutil.copyfile(head_map, inputs / "head_map.json")
        if selection is not None:
            shutil.copyfile(selection, inputs / "selection.jsonl")
        run = _Run(config, Path(model), work, device, on_progress)
        plan = plan_steps(config, rows, SHARD_ROWS)
        found = _fingerprint_of(config, info, inputs, device)
        if anew := not work.is_of(found):
            run.step(plan[0], inputs)  # before the work of another job goes: this one may be refused
        work.begin(found)
        try:
            if anew:
                work.finish(plan[0])
            run.steps(plan)
        except P2DError as error:
            if error.fault == "user":  # mended, it is another job; as it is, it ends the same way
                work.discard()
            raise
        _leave_results(work.files, folder, _results_of(plan, config))
        work.discard()
    return Result(folder, read_json(folder / "report.json"))


def _with_earlier(config: JobConfig, head_map: Path | str | None, selection: Path | str | None) -> JobConfig:
    """The config with the files of earlier jobs named in it. Raises ConfigError with everything that is wrong with them."""
    errors = []
    for pointer, named, given in (
        ("/heads/head_map", config.heads.head_map, head_map),
        ("/data/selection", config.data.selection, selection),
    ):
        if given is None and named is not None:
            text = f"{named!r} is an id of the service; without it, give the file."
            errors.append(ErrorDetail(code="config.earlier_result", message=text, pointer=pointer))
        if given is not None and not Path(given).is_file():
            text = f"There is no file {str(given)!r}."
            errors.append(ErrorDetail(code="config.earlier_result", message=text, pointer=pointer))
    if errors:
        raise ConfigError(" ".join(error.message for error in errors), errors=errors)
    if head_map is not None:
        config = replace(config, heads=replace(config.heads, head_map=Path(head_map).name))
    if selection is not None:
        config = replace(config, data=replace(config.data, selection=Path(selection).name))
    return config


def _fingerprint_of(config: JobConfig, info: ModelInfo, inputs: Path, device: str) -> str:
    """Of everything that decides the results: what a killed run had finished is used by a run of the same one alone."""
    files = {path.name: sha256_of(path) for path in sorted(inputs.iterdir())}
    pick_device = import_module("p2d.device").pick_device  # by name: an import statement here would bring torch
    return fingerprint(
        {
            "config": config_json(config),
            "model": [info.name, info.digest],
            "files": files,
            "shard_rows": SHARD_ROWS,
            "device": str(pick_device(device)),
        }
    )


@contextmanager
def _result_folder(out: Path | str) -> Iterator[Path]:
    """The folder of the results; gone again if the job made it and ends without any. Raises OutUnusable."""
    folder = Path(out)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutUnusable(f"{str(folder)!r} cannot be written to: {error.strerror}.") from error
    try:
        yield folder
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()


def _results_of(plan: Sequence[PlannedStep], config: JobConfig) -> set[str]:
    """Names of the results that a job ends with: what its steps write, and what it was given."""
    names = {name for planned in plan for name in STEPS[planned.step].writes}
    names |= {"head_map.json"} if config.heads.head_map is not None else set()
    names |= {"selection.jsonl"} if config.data.selection is not None else set()
    return names.intersection(RESULTS)


def _leave_results(files: Path, folder: Path, names: set[str]) -> None:
    """Move a job's results to where they were asked for, and remove those that an earlier job alone had left there."""
    for name in RESULTS:
        if (files / name).exists():  # else a run that was killed here had moved it
            (files / name).replace(folder / name)
    for name in set(RESULTS) - names:
        (folder / name).unlink(missing_ok=True)


def _take(data: Path | str | Dataset, normalised: Path, columns: Columns, folder: Path) -> int:
    """Check a user's rows and write their normalised form; the number of rows. Many bad lines leave their list in `folder`."""
    if isinstance(data, (str, Path)):
        path = Path(data)
        if not path.is_file():
            raise DatasetFileMissing(f"There is no file {str(path)!r}.")
    else:  # through a file, so that a table gets the same checks and the same messages
        path = normalised.with_suffix(".table.jsonl")
        data.to_json(path)
    listed = folder / BAD_LINES
    listed.unlink(missing_ok=True)  # of an earlier run
    try:
        files = [DataFile(path=path, name=path.name)]
        return check_files(files, normalised=normalised, columns=columns, listed=listed).rows
    except DatasetError as error:
        if error.errors_total > len(error.errors):
            error.report = str(listed)
        else:
            listed.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class _Run:
    """The steps of one job, and what they are run with."""

    config: JobConfig
    model: Path
    work: WorkFolder
    device: str
    on_progress: OnProgress | None
    models: ModelCache = field(default_factory=ModelCache)

    def steps(self, plan: Sequence[PlannedStep]) -> None:
        """Run those that no earlier run has finished."""
        work = self.work
        for planned in plan:
            if work.is_done(planned):
                continue
            if planned.step == "package":
                write_json(work.files / "steps.json", {"steps": [asdict(attempt) for attempt in work.attempts]})
            work.start(planned)
            try:
                self.step(planned, work.files)
            except P2DError:
                work.finish(planned, "failed")
                raise
            work.finish(planned)

    def step(self, planned: PlannedStep, files: Path) -> None:
        """Run one on the files of a folder."""
        from p2d.selection_file import check_selection

        call = StepCall(
            step=planned.step,
            shard=planned.shard,
            shards=planned.shards,
            config=self.config,
            model_dir=self.model,
            inputs=files,
            out=files,
            checkpoint=self.work.checkpoint if planned.step == "train" else None,
            device=self.device,
        )
        run_step(call, progress=_progress_of(planned, self.work, self.on_progress), models=self.models)
        assert all(list(files.glob(name)) for name in STEPS[planned.step].writes), planned
        if planned.step == "validate" and self.config.data.selection is not None:
            check_selection(files / "selection.jsonl", open_rows(files / "rows.jsonl"))


def _progress_of(planned: PlannedStep, work: WorkFolder, on_progress: OnProgress | None) -> Progress:
    def progress(done: int, total: int, metrics: Mapping[str, float], /) -> None:
        work.tick(planned)
        if on_progress is not None:
            on_progress(planned, done, total, metrics)

    return progress
