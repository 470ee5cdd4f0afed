"""`compare`: two results, before and after."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from math import inf
from pathlib import Path

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from loadtests.commands.base import print_json
from loadtests.lab.compare import TOLERANCE_RATIO, Comparison, compare
from loadtests.lab.report import read_report
from loadtests.problems import ScenarioError
from loadtests.reports import console, milliseconds

STYLES = {"worse": "bold red", "better": "green", "same": "dim"}


def add_arguments(parser: ArgumentParser) -> None:
    """The two results, and how much worse is still the same."""
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE_RATIO, help="B over A up to which nothing is said")
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of a table")


def run(chosen: Namespace) -> int:
    """0 nothing is worse · 1 something is."""
    if not 1 <= chosen.tolerance < inf:
        raise ScenarioError(f"--tolerance {chosen.tolerance:g}: a ratio of after to before, 1 or more")
    found = compare(read_report(chosen.before), read_report(chosen.after), tolerance_ratio=chosen.tolerance)
    if chosen.json:
        print_json(found.as_dict())
    else:
        _show(found)
    return 1 if found.is_worse else 0


def _show(found: Comparison) -> None:
    shown = Table(box=SIMPLE, caption="milliseconds; 95% intervals in brackets", caption_justify="left")
    for heading in ("setting", "figure", "before", "after", "after / before", ""):
        shown.add_column(heading)
    for line in found.lines:
        shown.add_row(
            line.setting,
            f"{line.metric.removesuffix('_seconds').upper()} {line.percentile}",
            _with(line.before, line.before_interval),
            _with(line.after, line.after_interval),
            f"{line.ratio:.2f}x",
            Text(line.change, style=STYLES[line.change]),
        )
    for one in found.failed:
        if one.before[0] or one.after[0]:
            counted = ("{} of {}".format(*one.before), "{} of {}".format(*one.after))
            shown.add_row(one.setting, "failed", *counted, "", Text(one.change, style=STYLES[one.change]))
    out = console()
    out.print(shown)
    for text in found.notes:
        out.print(f"note: {text}", markup=False, highlight=False)


def _with(seconds: float, interval: tuple[float, float] | None) -> str:
    reach = f" [{milliseconds(interval[0])}, {milliseconds(interval[1])}]" if interval else ""
    return f"{milliseconds(seconds)}{reach}".replace("[", "\\[")
