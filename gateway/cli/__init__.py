"""The `sliceway` command: one module per command group, each with `register(app)`."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from gateway.cli import (
    audit,
    bench,
    capacity,
    cluster,
    config,
    doctor,
    engines,
    export,
    keys,
    layouts,
    models,
    pack,
    profiles,
    replicas,
    serve,
    sizing,
    slices,
    status,
    tenants,
    upgrade,
)
from gateway.cli.output import run

app = typer.Typer(
    name="sliceway",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sliceway {version('sliceway')}")
        raise typer.Exit


@app.callback()
def sliceway(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Turn GPU slices into an OpenAI-compatible service."""


for _module in (
    cluster,
    serve,
    upgrade,
    layouts,
    export,
    config,
    doctor,
    models,
    slices,
    profiles,
    pack,
    sizing,
    capacity,
    engines,
    status,
    replicas,
    keys,
    tenants,
    audit,
    bench,
):
    _module.register(app)


def main() -> None:
    """Run the command line; errors that sliceway raises on purpose are told in words, never as a traceback."""
    sys.argv[1:] = cluster.with_ray_address(sys.argv[1:])
    run(app)
