"""`p2d jobs`, `uploads`, `show`, `logs`, `compare`, `usage`, `audit`: what a service has on record, asked and printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.progress import stage_name, time_left
from app.report import side_by_side, verdicts
from p2d.client import Artifact, Client, Job

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)

Url = Annotated[str, typer.Option(envvar="P2D_URL", help="Address of the service.")]
DEFAULT_URL = "http://127.0.0.1:8321"


def add_to(cli: typer.Typer) -> None:
    """Register the seven commands."""
    for command in (jobs, uploads, show, logs, compare, usage, audit):
        cli.command()(command)


def jobs(
    status: Annotated[str, typer.Option(help="Only those of this status, for example running.")] = "",
    limit: Annotated[int, typer.Option(help="The newest so many.", min=1)] = 20,
    url: Url = DEFAULT_URL,
) -> None:
    """List jobs, newest first."""
    table = Table("id", "name", "kind", "status", "progress", "created")
    table.columns[4].justify = "right"
    asked = {"limit": str(min(limit, 100))} | ({"status": status} if status else {})
    with Client(url) as client:
        for job in islice(client.jobs(**asked), limit):
            cells = (job.id, job.raw["name"], job.kind, job.status, f"{job.progress:.0%}", _time(job.raw["created_at"]))
            table.add_row(*map(escape, cells))
    out.print(table)


def uploads(
    status: Annotated[str, typer.Option(help="open or completed.")] = "",
    limit: Annotated[int, typer.Option(help="The newest so many.", min=1)] = 20,
    url: Url = DEFAULT_URL,
) -> None:
    """List uploads in parts, newest first; `upload FILE --resume` goes on with one that is open."""
    table = Table("id", "name", "status", "parts", "bytes", "expires")
    table.columns[4].justify = "right"
    asked = {"limit": str(min(limit, 100))} | ({"status": status} if status else {})
    with Client(url) as client:
        for one in islice(client.uploads(**asked), limit):
            parts, size = f"{one['parts_there']} of {one['part_count']}", f"{one['size_bytes']:,}"
            cells = (one["id"], one["name"], one["status"], parts, size, _time(one["expires_at"]))
            table.add_row(*map(escape, cells))
    out.print(table)


def show(
    job_id: str,
    as_json: Annotated[bool, typer.Option("--json", help="All fields, as the service answers.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show a job: how far it is, what the run decided, what went wrong or is worth knowing, and its files."""
    with Client(url) as client:
        job = client.job(job_id)
        if as_json:
            typer.echo(json.dumps(job.raw, indent=2, ensure_ascii=False))
            return
        files = client.artifacts(job_id)
        report = client.report(job_id) if job.status == "succeeded" and job.kind == "adapt" else None
    for line in [*_told(job), *verdicts(report or {}), *_notes(job, report)]:
        out.print(line, markup=False)
    if files:
        out.print(_files(files))


def logs(
    job_id: str,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until the job ends.")] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Show what workers noted of a job's attempts, attempt by attempt."""
    with Client(url) as client:
        for line in client.follow_logs(job_id) if follow else client.logs(job_id):
            out.print(_log_line(line), markup=False)


def compare(
    job_ids: Annotated[list[str], typer.Argument(help="2 to 20 jobs, in the order in which they are shown.")],
    name: Annotated[str, typer.Option(help="A name of your own.")] = "",
    html: Annotated[Path | None, typer.Option(help="Write the page here too; it loads nothing else.")] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Put jobs side by side: settings, held-out loss, heads and rows in common, cost."""
    with Client(url) as client:
        found = client.compare(job_ids, name=name)
        out.print(side_by_side(found))
        out.print(f"Kept as {found['id']}.", markup=False)
        if html is not None:
            html.write_text(client.comparison_page(found["id"]), encoding="utf-8")
            out.print(f"The page is {html}.", markup=False)


def usage(url: Url = DEFAULT_URL) -> None:
    """Show what your project has, the most that it may have, and how far estimates were off."""
    with Client(url) as client:
        found = client.usage()
    table = Table("", "has", "may have", box=None, pad_edge=False)
    for name in ("unfinished_jobs", "stored_bytes", "rows", "webhooks"):
        table.add_row(name.replace("_", " "), f"{found[name]:,}", f"{found[f'{name}_quota']:,}")
    table.add_row("requests a minute", "", f"{found['requests_per_minute']:,}")
    out.print(table)
    for step, error in found["estimate_errors"].items():
        out.print(
            f"{step}: half of {error['runs']} estimates were off by more than {error['median']:.0%}", markup=False
        )


def audit(
    of: Annotated[str, typer.Option("--object", help="Only what was done to the thing of this id.")] = "",
    limit: Annotated[int, typer.Option(help="The newest so many.", min=1)] = 50,
    url: Url = DEFAULT_URL,
) -> None:
    """Show who did what and when, newest first. Needs an admin key once there are keys."""
    table = Table("at", "who", "did", "to", "facts")
    with Client(url) as client:
        for entry in islice(client.audit(**({"object": of} if of else {})), limit):
            table.add_row(
                _time(entry["created_at"]), entry["actor"], entry["action"], entry["object_id"], _facts(entry)
            )
    out.print(table)


def _told(job: Job) -> Iterator[str]:
    yield f"{job.id} {job.kind} {job.raw['name']}".rstrip()
    stage = f", {stage_name({'stage': job.stage})}" if job.stage and not job.is_final else ""
    left = "" if job.is_final else time_left(job.raw)
    yield f"{job.status}{stage}, {job.progress:.0%} {left}".rstrip()
    if job.error:
        yield f"{job.error['code']}: {job.error.get('detail', '')}"
        if hint := job.error.get("hint"):
            yield str(hint)


def _notes(job: Job, report: Mapping[str, Any] | None) -> Iterator[str]:
    """What the run decided, as far as it has, and what is worth knowing of the job."""
    training = (job.raw["resolved"] or {}).get("training", {}) if job.kind == "adapt" else {}
    decided = {name: training.get(name, "auto") for name in ("learning_rate", "precision")}
    if known := [f"{name.replace('_', ' ')} {value}" for name, value in decided.items() if value != "auto"]:
        yield ", ".join(known)
    for warning in (report or {}).get("warnings", job.raw["warnings"]):
        yield f"Note: {warning}"


def _files(files: Sequence[Artifact]) -> Table:
    table = Table("file", "bytes", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for file in files:
        table.add_row(escape(file.name), f"{file.size_bytes:,}")
    return table


def _log_line(line: Mapping[str, Any]) -> str:
    level = "" if line["level"] == "info" else f"{line['level'].upper()} "
    return (
        f"{_time(line['at'])} {line['step']}.{line['shard']} #{line['attempt']} {level}{line['event']} {_facts(line)}"
    )


def _time(at: str) -> str:
    return at[:19].replace("T", " ")


def _facts(entry: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in entry["facts"].items())
