"""The command line `p2d`: parses, calls one function, prints. Runs the service, talks to one, or uses the engine alone.

    p2d up                       the whole service on this machine, until Ctrl-C
    p2d upload | submit | watch | download    datasets and jobs of a running service (P2D_URL)
    p2d jobs | show | logs | compare | usage | audit | webhooks    what it has on record, and whom it tells
    p2d keys                     who may use the service, in its database
    p2d run | apply | export | models    the engine on this machine, without a service

torch is imported by `run`, `apply`, `export` and `models add` only, inside of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from app import bench_commands, service_commands
from app.errors import JobFailure, ProcessFailed
from app.key_commands import keys
from app.model_commands import models
from app.processes import Terminated, raise_on_term
from app.progress import StepWatcher, watching, watching_steps
from app.report import foreseen, headline, ratios
from app.service_commands import DEFAULT_URL, Url
from app.settings import Settings
from app.webhook_commands import webhooks
from p2d.client import Client, DownloadCorrupt, Job, NoSuchFile, ServiceProblem, ServiceUnreachable
from p2d.config import JobConfig
from p2d.errors import DatasetFileMissing, ErrorDetail, P2DError
from p2d.pipeline import PlannedStep
from p2d.sources import named_source
from p2d.wording import counted
from p2d.work_folder import NAME as WORK_FOLDER

# Into a pipe or file there is no width to fit: tables get room for a line.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True, highlight=False, soft_wrap=True)

cli = typer.Typer(
    help="Adapt a language model through its attention heads.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",  # as docstrings are written; typer's default reads [/config/split] as a closing tag
)
cli.add_typer(models, name="models")
cli.add_typer(keys, name="keys")
cli.add_typer(webhooks, name="webhooks")
service_commands.add_to(cli)
bench_commands.add_to(cli)

Data = Annotated[
    str,
    typer.Option(
        help="Dataset file, id of a dataset, or where the service is to fetch one: https://..., s3://bucket/key, or "
        "hf:owner/name[@revision], and then /config/split or :path where it has several."
    ),
]
Validation = Annotated[str, typer.Option(help="Held-out rows likewise; without them, some of the dataset's.")]
Kind = Annotated[str, typer.Option(help="identify_heads, select_data or adapt.")]
Recipe = Annotated[str, typer.Option(help="default, or paper as published.")]
Map = Annotated[
    list[str],
    typer.Option(
        "--map",
        help="Where the files call a field otherwise, for example --map prompt=Frage; repeatable.",
        metavar="FIELD=COLUMN",
    ),
]
Set = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="Any other field of the job, for example --set heads.ratio=0.2; repeatable.",
        metavar="FIELD=VALUE",
    ),
]


def main() -> None:
    """The door: what users did wrong, or a server did, is told in words; our own mistakes keep their traceback."""
    try:
        cli(prog_name="p2d")
    except ValidationError as error:
        if error.title != Settings.__name__:
            raise
        for fault in error.errors():
            err.print(f"P2D_{str(fault['loc'][0]).upper()}: {fault['msg']}.", markup=False, style="red")
        sys.exit(2)
    except (P2DError, ServiceProblem) as error:
        _explain(error)
        sys.exit(2 if error.fault == "user" else 1)
    except (ServiceUnreachable, DownloadCorrupt, NoSuchFile) as error:
        err.print(f"{type(error).__name__}: {error}", markup=False, style="red")
        sys.exit(1)
    except Terminated:
        sys.exit(143)


# --- the service ------------------------------------------------------------------------------------------------------


@cli.command()
def up(port: Annotated[int | None, typer.Option(help="Port of the API; 0 = a free one.")] = None) -> None:
    """Run the whole service on this machine until Ctrl-C: embedded servers, API and one worker."""
    from app.service import running

    raise_on_term()
    settings = Settings() if port is None else Settings(port=port)
    try:
        with running(settings, say=lambda line: err.print(line, markup=False)) as service:
            out.print(f"P2D answers at {service.url} (data in {service.settings.home}). Ctrl-C stops it.", markup=False)
            service.wait()
    except (KeyboardInterrupt, Terminated):
        raise typer.Exit(0) from None


@cli.command()
def api() -> None:
    """Run the HTTP API alone, on servers named by P2D_DATABASE_URL, P2D_BROKER_URL and P2D_STORE_URL."""
    from app.logs import configure_logs
    from app.main import may_listen
    from app.serving import serve

    settings = _with_servers()
    configure_logs()
    may_listen(settings)
    serve(settings)


@cli.command()
def worker() -> None:
    """Run one worker alone, on the same servers."""
    from workers.celery_app import run_worker

    run_worker(_with_servers())


@cli.command()
def migrate() -> None:
    """Bring the schema of P2D_DATABASE_URL up to date."""
    from app.db.engine import make_engine
    from migrations import upgrade

    engine = make_engine(_with_servers("database_url").url("database_url"))
    upgrade(engine)
    engine.dispose()
    out.print("The schema is up to date.")


@cli.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed now.")] = False,
) -> None:
    """Delete jobs older than P2D_JOBS_KEPT_D, and what nothing refers to from the store, as workers do from time to time."""
    from app.blobs import BlobStore
    from app.core.garbage import clear, foresee
    from app.core.retention import old_jobs
    from app.db.engine import make_engine

    settings = _with_servers("database_url", "store_url")
    engine = make_engine(settings.url("database_url"))
    if dry_run:
        jobs = len(old_jobs(engine, kept_d=settings.jobs_kept_d))
        done = foresee(engine, kept_h=settings.unreferenced_kept_h)
    else:
        jobs, done = clear(engine, BlobStore.open(settings.url("store_url")), settings)
    engine.dispose()
    said = f"{counted(done.objects, 'object', 'objects')}, {done.size_bytes / 1e6:,.1f} MB"
    said = said if settings.jobs_kept_d is None else f"{counted(jobs, 'job', 'jobs')}, {said}"
    out.print(f"{said} would be removed." if dry_run else f"Removed {said}.")


# --- a running service -------------------------------------------------------------------------------------------------


@cli.command()
def submit(
    data: Data,
    base_model: Annotated[str, typer.Option(help="An installed model, or art_...: one that the project has merged.")],
    validation: Validation = "",
    kind: Kind = "adapt",
    recipe: Recipe = "default",
    map_: Map = [],  # noqa: B006
    set_: Set = [],  # noqa: B006 - typer reads it, nobody writes it
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Send a job; prints its id."""
    body = _body(kind, recipe, set_) | {"base_model": base_model}
    held_out, mapping = _dataset(validation) if validation else None, _mapping(map_)
    with Client(url) as client:
        if dry_run:
            found = client.estimate(body, dataset=_dataset(data), validation_dataset=held_out, mapping=mapping)
            out.print(foreseen(found))
            return
        job = client.submit(body, dataset=_dataset(data), validation_dataset=held_out, mapping=mapping)
        out.print(job.id)
        if watch:
            _follow(client, job)


@cli.command()
def upload(
    file: Annotated[Path | None, typer.Argument(help="Dataset file.")] = None,
    source: Annotated[str, typer.Option(help="Where the service is to fetch it instead, as for submit --data.")] = "",
    map_: Map = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="Send only the parts that are not there yet.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Store and check a dataset; prints its id, for any number of jobs. Large files go in parts; --resume goes on after a break."""
    if (file is None) == (not source):
        raise typer.BadParameter("give a file, or --source")
    if source and named_source(source) is None:
        raise typer.BadParameter("expected https://..., s3://... or hf:owner/name", param_hint="--source")
    if file is not None and not file.is_file():
        raise DatasetFileMissing(f"There is no file {str(file)!r}.")
    with Client(url) as client:
        if resume and file is not None:
            out.print(client.resume_upload(file, mapping=_mapping(map_)))
        else:
            out.print(client.upload(file or source, mapping=_mapping(map_)))


@cli.command()
def report(
    report_id: Annotated[str, typer.Argument(help="As the refusal of a file names it.")], url: Url = DEFAULT_URL
) -> None:
    """Print all that is wrong with a file that was refused, line by line."""
    with Client(url) as client:
        found = client.refusal(report_id)
        for fault in client.faults(report_id):
            out.print(_place(fault), markup=False)
    err.print(f"{found['name']}: {found['detail']} {_by_code(found['errors_by_code'])}", markup=False)
    if found["errors_listed"] < found["errors_total"]:
        err.print(f"The first {found['errors_listed']:,} of {found['errors_total']:,} are listed.")


@cli.command()
def watch(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Follow a job to its end."""
    with Client(url) as client:
        _follow(client, client.job(job_id))


@cli.command()
def cancel(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Ask a job to stop for good."""
    with Client(url) as client:
        _say_status(client.cancel(job_id))


@cli.command()
def pause(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Ask a job to stand still; it frees its worker, and later goes on from where it was."""
    with Client(url) as client:
        _say_status(client.pause(job_id))


@cli.command()
def resume(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Let a paused job go on."""
    with Client(url) as client:
        _say_status(client.resume(job_id))


@cli.command()
def retry(job_id: str, url: Url = DEFAULT_URL) -> None:
    """Queue a failed or cancelled job again; what it had finished is kept."""
    with Client(url) as client:
        _say_status(client.retry(job_id))


@cli.command()
def download(
    job_id: str,
    to: Annotated[Path, typer.Option("--out", help="Directory for the files.")],
    name: Annotated[list[str], typer.Option(help="Only these files; repeatable.")] = [],  # noqa: B006
    url: Url = DEFAULT_URL,
) -> None:
    """Fetch a job's files, verified; a download that was cut goes on where it stopped."""
    with Client(url) as client:
        for path in client.download(job_id, to, names=name or None):
            out.print(str(path), markup=False)


# --- the engine, without a service -------------------------------------------------------------------------------------


@cli.command()
def run(
    model: Annotated[Path, typer.Option(help="Directory of the base model.")],
    data: Annotated[Path, typer.Option(help="Dataset file.")],
    to: Annotated[Path, typer.Option("--out", help="Directory for the result.")],
    validation: Annotated[Path | None, typer.Option(help="File of held-out rows.")] = None,
    head_map: Annotated[Path | None, typer.Option(help="head_map.json of an earlier job: stage 1 is skipped.")] = None,
    selection: Annotated[
        Path | None, typer.Option(help="selection.jsonl of an earlier job over the same rows: stage 2 is skipped.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:0 or mps.")] = "auto",
    kind: Kind = "adapt",
    recipe: Recipe = "default",
    map_: Map = [],  # noqa: B006
    set_: Set = [],  # noqa: B006
) -> None:
    """Run a job in this process: same steps, same files, no service. Killed, the same command goes on where it was."""
    import p2d

    raise_on_term()  # so that TERM leaves what Ctrl-C leaves
    config = _config(_body(kind, recipe, set_))
    earlier = {name: path for name, path in (("head_map", head_map), ("selection", selection)) if path is not None}
    taken = {"identify_heads": set(), "select_data": {"head_map"}, "adapt": {"head_map", "selection"}}[config.kind]
    if unused := earlier.keys() - taken:
        option = "--" + min(unused).replace("_", "-")
        raise typer.BadParameter(f"a job of kind {config.kind} makes its own", param_hint=option)
    job: Callable[..., Any] = getattr(p2d, config.kind)  # adapt, identify_heads, select_data
    with watching_steps(out) as show:
        result = job(
            model=model,
            data=data,
            out=to,
            validation=validation,
            mapping=_mapping(map_),
            config=config,
            device=device,
            on_progress=_telling(to / WORK_FOLDER, show),
            **earlier,
        )
    lines = [headline(result.report), *ratios(result.report), *(f"Note: {one}" for one in result.report["warnings"])]
    out.print("\n".join([*lines, f"The result is in {to}."]), markup=False)


@cli.command()
def apply(model: Path, adapter: Path, to: Path) -> None:
    """Write base model + head adapter as an ordinary safetensors model directory."""
    from p2d.adapters import merge

    merge(model, adapter, to)
    out.print(f"The adapted model is in {to}.", markup=False)


@cli.command()
def export(model: Path, adapter: Path, to: Path) -> None:
    """Write a head adapter as a PEFT LoRA of the same base model."""
    from p2d.peft_export import export_peft

    export_peft(model, adapter, to)
    out.print(f"The LoRA is in {to}.", markup=False)


# --- both -------------------------------------------------------------------------------------------------------------


@cli.command()
def demo(
    to: Annotated[Path, typer.Option("--out", help="Directory for the result.")] = Path("demo-output"),
    rows: Annotated[
        int, typer.Option(help="Training rows of the sample, up to 300; all of them take half as long again.")
    ] = 200,
) -> None:
    """Run the main job on this machine: SmolLM2-135M-Instruct on a GSM8K sample."""
    from app.demo import demo as run_demo

    raise_on_term()
    run_demo(Settings(), to, out, rows=rows)


@cli.command()
def doctor() -> None:
    """Check what this machine has, and say what is missing."""
    from app.doctor import examine

    if not examine(Settings(), out):
        raise typer.Exit(1)


def _with_servers(*names: str) -> Settings:
    settings = Settings()
    for name in names or ("database_url", "broker_url", "store_url"):
        if getattr(settings, name) is None:
            raise ProcessFailed(f"P2D_{name.upper()} is not set. `p2d up` starts everything by itself.")
    return settings


def _dataset(given: str) -> Path | str:
    if Path(given).is_file():
        return Path(given)
    if given.startswith("ds_") or named_source(given) is not None:
        return given
    raise DatasetFileMissing(f"There is no file {given!r}.")


def _mapping(given: list[str]) -> dict[str, str]:
    """Field -> column. Which fields there are is checked where the files are read."""
    mapping = {}
    for one in given:
        name, equals, column = one.partition("=")
        if not equals:
            raise typer.BadParameter(f"{one!r}: expected FIELD=COLUMN", param_hint="--map")
        mapping[name] = column
    return mapping


def _body(kind: str, recipe: str, fields: list[str]) -> dict[str, Any]:
    """A job's JSON body from options. Names and types are checked where the body is read."""
    body: dict[str, Any] = {"kind": kind, "recipe": recipe}
    for field in fields:
        name, equals, text = field.partition("=")
        if not equals:
            raise typer.BadParameter(f"{field!r}: expected FIELD=VALUE", param_hint="--set")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *groups, leaf = name.split(".")
        place = body
        for group in groups:
            place = place.setdefault(group, {})
        place[leaf] = value
    return body


def _config(body: dict[str, Any]) -> JobConfig:
    """The same checks as POST /jobs makes. Raises RequestInvalid, ConfigError."""
    from app.job_bodies import job_config

    return job_config({**body, "base_model": "local"})


def _telling(work: Path, show: StepWatcher) -> StepWatcher:
    """`show`, which says what became of an earlier run's work once that is known: a run that is refused leaves it."""
    left, anew = work.exists(), False

    def shown(step: PlannedStep, done: int, total: int, metrics: Mapping[str, float]) -> None:
        nonlocal left, anew
        anew = anew or step.step == "validate"
        if left and step.step != "validate":
            left = False
            use = "was of no use to this job, and is gone" if anew else "is used"
            err.print(f"What an earlier run left in {work} {use}.", markup=False)
        show(step, done, total, metrics)

    return shown


def _say_status(job: Job) -> None:
    out.print(f"{job.id} {job.status}", markup=False)


def _follow(client: Client, job: Job) -> None:
    with watching(out) as show:
        job = client.wait(job.id, on_event=show)
    if job.status == "failed":
        error = job.error or {}
        raise JobFailure(f"The job failed: {error.get('detail')} {error.get('hint', '')}")
    if job.status == "succeeded" and job.kind != "export":
        out.print(headline(client.report(job.id)), markup=False)
    out.print(f"{job.id} {job.status}. `p2d download {job.id} --out DIR` fetches its files.")


def _place(fault: ErrorDetail) -> str:
    line = "" if fault.line is None else f"line {fault.line}"
    return f"{' '.join(part for part in (fault.pointer, line) if part)}: {fault.message}"


def _by_code(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{code} {count:,}" for code, count in sorted(counts.items(), key=lambda one: -one[1]))


def _explain(error: P2DError | ServiceProblem) -> None:
    err.print(f"[red]{error.code}[/]: ", end="")
    err.print(str(error), markup=False)
    if by_code := error.facts.get("errors_by_code"):
        err.print(_by_code(by_code))
    for detail in error.errors:
        err.print(f"  {_place(detail)}", markup=False)
    if (more := error.errors_total - len(error.errors)) > 0:
        err.print(f"  ... and {more:,} more")
    if error.report and isinstance(error, ServiceProblem):
        err.print(f"`p2d report {error.report.rpartition('/')[2]}` lists all of it.")
    elif error.report:
        err.print(f"{error.report} lists all of it.", markup=False)
    if error.hint:
        err.print(error.hint, markup=False, style="dim")


if __name__ == "__main__":
    main()
