"""The `sliceway` command: one module per command group, each with `register(app)`."""

from __future__ import annotations

import re
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
)
from gateway.cli.output import run

app = typer.Typer(
    name="sliceway",
    help="Turn GPU slices into an OpenAI-compatible service.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
for _module in (
    cluster,
    serve,
    layouts,
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


def with_ray_address(arguments: list[str]) -> list[str]:
    """`--ray` may stand alone: then this machine is the first of a new cluster. What follows is its value if it is an address."""
    if "--ray" not in arguments:
        return arguments
    after = arguments.index("--ray") + 1
    if after < len(arguments) and re.fullmatch(r"local|auto|\S+:\d+", arguments[after]):
        return arguments
    return [*arguments[:after], cluster.LOCAL, *arguments[after:]]


def main() -> None:
    """Run the command line; errors that sliceway raises on purpose are told in words, never as a traceback."""
    sys.argv[1:] = with_ray_address(sys.argv[1:])
    run(app)
