"""`p2d models`: install, check and list the base models of this machine. torch is imported to convert a GGUF file only."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from app.settings import Settings
from p2d.errors import P2DError

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)

models = typer.Typer(help="The base models on this machine.", no_args_is_help=True)


@models.command("add")
def models_add(
    name: str,
    directory: Annotated[Path | None, typer.Argument(help="A safetensors model directory to copy.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="A GGUF file to convert instead.")] = None,
) -> None:
    """Install a base model under a name."""
    from app.models import install_directory, model_place

    models_dir = Settings().models_dir
    if (directory is None) == (gguf is None):
        raise typer.BadParameter("give a directory, or --gguf FILE")
    if directory is not None:
        info = install_directory(models_dir, name, directory)
    elif gguf is not None:
        from p2d.models import convert_gguf

        info = convert_gguf(gguf, model_place(models_dir, name))
    out.print(f"{name}: {info.model_type}, {info.parameters / 1e6:.0f} M parameters, digest {info.digest[:12]}")


@models.command("check")
def models_check(directory: Annotated[Path, typer.Argument(help="A safetensors model directory.")]) -> None:
    """Say by a directory's config and file headers whether it can be used, and why not.

    Weights, and values in config.json that are none of the model's sizes, are judged when it is loaded.
    """
    from p2d.model_info import read_model_info

    info = read_model_info(directory.resolve())
    groups = f"{info.n_heads} heads in {info.n_kv_groups} key-value groups"
    out.print(
        f"{info.name} can be used: {info.model_type}, {info.n_layers} layers of {groups}, digest {info.digest[:12]}"
    )


@models.command("list")
def models_list() -> None:
    """Show the installed base models."""
    from p2d.model_info import list_models

    table = Table("name", "family", "parameters", "heads", "digest")
    for name, info in list_models(Settings().models_dir):
        if isinstance(info, P2DError):
            table.add_row(name, f"not usable: {info.text}")
        else:
            heads = f"{info.n_layers} x {info.n_heads}"
            table.add_row(name, info.model_type, f"{info.parameters / 1e6:.0f} M", heads, info.digest[:12])
    out.print(table)
