"""`sliceway init`: a first configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from gateway.cli.output import Json, out, print_json
from gateway.config import load_config
from gateway.starter import starter_config, summary
from model_registry.atomic import write_atomically
from model_registry.errors import ConfigError
from placement.inventory import observe
from placement.schema import FleetConfig


def register(app: typer.Typer) -> None:
    """Add `sliceway init`."""
    app.command()(init)


def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("sliceway.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented configuration for this machine."""
    if path.is_dir():
        raise ConfigError(
            "this is a directory", where=str(path), remedy=f"Name a file: sliceway init {path / 'sliceway.yaml'}"
        )
    if path.exists() and not force:
        raise ConfigError(
            "this file is there already", where=str(path), remedy="Name another, or replace it with --force."
        )
    inventory = observe(FleetConfig())
    try:
        write_atomically(path, starter_config(inventory, name=str(path)).encode())
    except OSError as error:
        raise ConfigError(
            f"it cannot be written: {error.strerror}",
            where=str(path),
            remedy="Choose a directory that you may write to.",
        ) from error
    load_config(path)
    if as_json:
        print_json({"path": str(path), "slices": len(inventory.slices), "notes": list(inventory.notes)})
        return
    out.print(f"wrote [bold]{escape(str(path))}[/] for {escape(summary(inventory))}", highlight=False)
    out.print(
        f"[dim]Name a model in it, then: sliceway doctor {escape(str(path))} && sliceway up {escape(str(path))}[/]",
        highlight=False,
    )
