"""`p2d webhooks`: who is told what becomes of the project's jobs, asked through `p2d.client` and printed."""

from __future__ import annotations

import sys
from itertools import islice
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from app.service_commands import DEFAULT_URL, Url
from p2d.client import Client

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)

webhooks = typer.Typer(
    help="Who is told what becomes of jobs. Needs an admin key once there are keys.", no_args_is_help=True
)


@webhooks.command()
def create(
    to: Annotated[str, typer.Argument(metavar="URL", help="Where to send: https, of a public host.")],
    event: Annotated[list[str], typer.Option(help="A status to tell of, such as job.running; repeatable.")] = [],  # noqa: B006
    description: Annotated[str, typer.Option(help="A text of your own.")] = "",
    named: Annotated[
        bool, typer.Option("--named", help="Tell it only of jobs that name it in their `webhooks`.")
    ] = False,
    url: Url = DEFAULT_URL,
) -> None:
    """Have a URL told of jobs, of their ends unless events are named; prints its secret, this once."""
    with Client(url) as client:
        jobs = "named" if named else "all"
        made = client.create_webhook(to, events=event, description=description, jobs=jobs)
    told = ", ".join(made["events"]) + (" of jobs that name it" if named else "")
    err.print(f"{made['id']} is told of {told}. Keep its secret; it is not shown again.", markup=False)
    out.print(made["secret"], markup=False)


@webhooks.command("list")
def show(url: Url = DEFAULT_URL) -> None:
    """Show the webhooks of your project, newest first."""
    table = Table("id", "url", "events", "jobs", "state", "description")
    with Client(url) as client:
        for one in client.webhooks():
            state = "enabled" if one["enabled"] else f"disabled ({one['disabled_reason'] or 'by you'})"
            table.add_row(one["id"], one["url"], ", ".join(one["events"]), one["jobs"], state, one["description"])
    out.print(table)


@webhooks.command("test")
def send_trial(webhook_id: str, url: Url = DEFAULT_URL) -> None:
    """Send a trial; `deliveries` tells what became of it."""
    with Client(url) as client:
        out.print(f"{client.test_webhook(webhook_id)['id']} is on its way.", markup=False)


@webhooks.command()
def deliveries(
    webhook_id: str,
    status: Annotated[str, typer.Option(help="Only those: pending, delivered or failed.")] = "",
    limit: Annotated[int, typer.Option(help="The newest so many.", min=1)] = 50,
    url: Url = DEFAULT_URL,
) -> None:
    """Show what was sent to a webhook, newest first."""
    table = Table("id", "at", "event", "job", "status", "tries", "answer")
    with Client(url) as client:
        for one in islice(client.deliveries(webhook_id, **({"status": status} if status else {})), limit):
            answer = " ".join(str(said) for said in (one["response_status"], one["error"]) if said)
            at = one["created_at"][:19].replace("T", " ")
            row = (one["id"], at, one["type"], one["job_id"] or "", one["status"], str(one["attempts"]), answer)
            table.add_row(*row)
    out.print(table)


@webhooks.command()
def redeliver(webhook_id: str, delivery_id: str, url: Url = DEFAULT_URL) -> None:
    """Send a delivery again, whatever became of it."""
    with Client(url) as client:
        out.print(f"{client.redeliver(webhook_id, delivery_id)['id']} is on its way.", markup=False)


@webhooks.command()
def delete(webhook_id: str, url: Url = DEFAULT_URL) -> None:
    """Remove a webhook; what waits to be sent is not sent."""
    with Client(url) as client:
        client.delete_webhook(webhook_id)
    out.print(f"{webhook_id} is deleted.", markup=False)
