"""The `sliceway` command: one module per command group, each with `register(app)`."""

from __future__ import annotations

import io
import sys

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
    version,
)
from gateway.cli.output import run

app = typer.Typer(
    name="sliceway",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


for _module in (
    version,
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 gets question marks and no traceback
    sys.argv[1:] = cluster.with_ray_address(sys.argv[1:])
    run(app)
