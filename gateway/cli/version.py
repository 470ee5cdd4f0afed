"""`sliceway` itself: what it is, and `--version`."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the options that stand before every command."""

    @app.callback()
    def sliceway(
        version: Annotated[
            bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
        ] = False,
    ) -> None:
        """Turn GPU slices into an OpenAI-compatible service."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sliceway {version('sliceway')}")
        raise typer.Exit
