"""`p2d keys`: make, list and revoke API keys in the service's database itself, which is how the first one comes to be."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from app.core.keys import make_key
from app.db.api_keys import list_keys, revoke_key
from app.db.audit import OPERATOR, append_entry
from app.db.projects import open_project
from app.errors import KeyNotFound
from app.key_schemas import MAX_DAYS, Scope
from app.settings import Settings

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False, soft_wrap=True)

keys = typer.Typer(help="API keys: who may use the service. Needs its database or its home.", no_args_is_help=True)


@keys.command()
def create(
    scope: Annotated[Scope, typer.Option(help="read, write (includes read) or admin (includes both).")],
    project: Annotated[str, typer.Option(help="Whose data it opens; made with its first key.")] = "default",
    name: Annotated[str, typer.Option(help="A name of your own.")] = "",
    expires: Annotated[
        float | None, typer.Option(help="Days until it opens nothing any more.", min=0, max=MAX_DAYS)
    ] = None,
) -> None:
    """Make a key and print it, this once. From the first one on, every request needs a key."""
    from app.service import ledger

    settings = Settings()
    if not (0 < len(project) <= 100 and project.isprintable()):
        raise typer.BadParameter("give 1 to 100 printable characters", param_hint="--project")
    with ledger(settings) as engine, engine.begin() as conn:
        project_id = open_project(conn, project)
        key, text = make_key(conn, settings, project_id=project_id, scope=scope, name=name, expires_days=expires)
        facts = {"scope": key.scope, "name": key.name}
        append_entry(conn, actor=OPERATOR, action="key.create", object_id=key.id, facts=facts, project_id=project_id)
    err.print(f"{key.id}: {key.scope} in the project {project!r}. Keep the key; it is not shown again.", markup=False)
    out.print(text, markup=False)


@keys.command("list")
def show() -> None:
    """Show the keys of all projects, newest first."""
    from app.service import ledger

    with ledger(Settings()) as engine, engine.connect() as conn:
        found = list_keys(conn)
    table = Table("id", "project", "scope", "state", "name", "expires", "last used")
    for key in found:
        times = (f"{time:%Y-%m-%d %H:%M}" if time else "" for time in (key.expires_at, key.used_at))
        table.add_row(key.id, key.project, key.scope, key.state, key.name, *times)
    out.print(table)


@keys.command()
def revoke(key_id: str) -> None:
    """Let a key open nothing any more, from its next request on."""
    from app.service import ledger

    with ledger(Settings()) as engine, engine.begin() as conn:
        key = revoke_key(conn, key_id)
        if key is None:
            raise KeyNotFound(id=key_id)
        append_entry(conn, actor=OPERATOR, action="key.revoke", object_id=key_id, facts={}, project_id=key.project_id)
    out.print(f"{key_id} is revoked.", markup=False)
