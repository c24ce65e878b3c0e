"""`p2d bench`, `load` and `quality`: the benchmarks of this checkout, each in a process of its own that reads its own options."""

from __future__ import annotations

from functools import partial

import typer
from rich.console import Console

from app.processes import raise_on_term
from app.settings import Settings

err = Console(stderr=True, highlight=False, soft_wrap=True)


def add_to(cli: typer.Typer) -> None:
    """Register the three commands."""
    for command in (bench, load, quality):
        settings = {"allow_extra_args": True, "ignore_unknown_options": True}
        cli.command(context_settings=settings, add_help_option=False)(command)


def bench(context: typer.Context) -> None:
    """Measure what the engine costs beside its peers (15 to 25 minutes); `--help` lists parts and options."""
    _on_the_demos_model("benchmarks", context)


def load(context: typer.Context) -> None:
    """Measure what the service bears (six minutes); `--help` lists options."""
    from app.demo import run_benchmarks

    raise_on_term()
    raise typer.Exit(run_benchmarks("benchmarks.service", context.args))


def quality(context: typer.Context) -> None:
    """Measure what adapted models are worth (hours, in pieces); `--help` lists options."""
    _on_the_demos_model("benchmarks.quality", context)


def _on_the_demos_model(module: str, context: typer.Context) -> None:
    from app.demo import benchmark

    raise_on_term()
    raise typer.Exit(benchmark(Settings(), module, context.args, partial(err.print, markup=False)))
