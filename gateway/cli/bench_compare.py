"""`sliceway bench compare` and `sliceway bench report`: what is made of results that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gateway.cli.bench_isolation import ReportDir
from gateway.cli.bench_serving import loadtests
from gateway.cli.output import Json


def register(app: typer.Typer) -> None:
    """Add `compare` and `report`."""
    app.command()(compare)
    app.command()(report)


def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="The report before.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The report after.")],
    tolerance: Annotated[float, typer.Option(min=1.0, help="After over before, up to which nothing is said.")] = 1.1,
    as_json: Json = False,
) -> None:
    """Two isolation reports, before and after a change. Ends with 1 if a figure got worse, beyond doubt and tolerance."""
    words = ["compare", str(before), str(after), "--tolerance", str(tolerance)]
    raise typer.Exit(loadtests([*words, "--json"] if as_json else words))


def report(
    results: Annotated[list[Path], typer.Argument(metavar="REPORT.json...", help="Results of one scenario.")],
    into: ReportDir = None,
    as_json: Json = False,
) -> None:
    """HTML, Markdown and JSON from results, without measuring again; several deployments become one report with one verdict."""
    words = ["render", *map(str, results)]
    words += ["--report", str(into)] if into else []
    raise typer.Exit(loadtests([*words, "--json"] if as_json else words))
