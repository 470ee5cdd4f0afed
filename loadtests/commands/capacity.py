"""`capacity`: the highest load that meets an SLO."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from loadtests.capacity.measure import Capacity, measure
from loadtests.capacity.scenario import read_capacity
from loadtests.commands.base import add_context, given, print_json
from loadtests.reports import console, milliseconds


def add_arguments(parser: ArgumentParser) -> None:
    """The scenario."""
    parser.add_argument("file", type=Path, metavar="SCENARIO")
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of a table")
    add_context(parser)


def run(chosen: Namespace) -> int:
    """0 some load meets the SLO · 1 none does."""
    source, context = given(chosen)
    found = measure(read_capacity(source), context)
    if chosen.json:
        print_json(found.as_dict())
    else:
        _show(found)
    return 0 if found.bracket.holds else 1


def _show(found: Capacity) -> None:
    load = found.scenario.load
    shown = Table(title=f"{load.model}: {found.scenario.slo}", title_justify="left", box=SIMPLE, caption_justify="left")
    for heading in ("requests/s", "met", "TTFT p50 / p99", "ITL p99", "E2E p99", "tokens/s out", "requests", ""):
        shown.add_column(heading, justify="right")
    for probe in sorted(found.probes, key=lambda p: p.requests_per_second):
        shown.add_row(
            f"{probe.requests_per_second:.3g}",
            f"{probe.attainment:.1%}",
            f"{milliseconds(probe.ttft_p50_seconds)} / {milliseconds(probe.ttft_p99_seconds)}",
            milliseconds(probe.itl_p99_seconds),
            milliseconds(probe.e2e_p99_seconds),
            f"{probe.output_tokens_per_second:.1f}",
            str(probe.requests),
            Text("holds", style="green") if probe.held else Text("too much", style="red"),
        )
    shown.caption = f"milliseconds; {found.bracket.holds:.3g} requests/s hold" + (
        f", {found.bracket.fails:.3g} do not" if found.bracket.fails else ""
    )
    out = console()
    out.print(shown)
    for text in found.warnings:
        out.print(f"note: {text}", markup=False, highlight=False)
