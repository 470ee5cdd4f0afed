"""The report on a terminal: the verdict, then a row per setting."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from loadtests.lab.report import Percentiles, Report, Setting
from loadtests.report.words import OUTCOMES, outcome_rows
from loadtests.reports import milliseconds
from loadtests.samples import METRICS

STYLES = {"pass": "bold green", "fail": "bold red", "undecided": "bold yellow", "refused": "bold yellow", "none": "dim"}
HEADINGS = ("requests", "failed", "TTFT p50 / p99", "ITL p50 / p99", "E2E p50 / p99")


def show(report: Report, console: Console) -> None:
    """Print the whole report."""
    console.print(Text(report.verdict.sentence, style=STYLES[report.verdict.status]))
    for reason in report.verdict.refusals[1:]:
        console.print(f"also: {reason}", markup=False, highlight=False)
    for status, told in outcome_rows(report):
        console.print(Text(f"{OUTCOMES[status]} {told}", style=STYLES[status]))
    console.print(table(report))
    for text in report.warnings:
        console.print(f"note: {text}", markup=False, highlight=False)


def table(report: Report) -> Table:
    """The victim's p50/p99 per setting, with the ratios to `alone` and their 95% intervals under each."""
    victim = report.victim
    where = f" on {victim['slice']}" if victim.get("slice") else ""
    shown = Table(
        title=f"{victim['name']} ({victim['model']}{where})",
        title_justify="left",
        caption=_caption(report),
        caption_justify="left",
        box=SIMPLE,
    )
    shown.add_column("setting")
    for heading in HEADINGS:
        shown.add_column(heading, justify="right")
    for key, setting in report.settings.items():
        cells = [_cell(key, setting, metric) for metric in METRICS]
        failed = sum(setting.victim.failures.values())
        shown.add_row(
            Text(_named(setting)),
            str(setting.victim.requests),
            Text(str(failed), style="red" if failed else ""),
            *cells,
        )
    return shown


def _named(setting: Setting) -> str:
    return f"{setting.deployment}: {setting.label}" if setting.deployment else setting.label


def _caption(report: Report) -> str:
    lines = ["milliseconds, on the client's clock; x: ratio to alone (95% interval of the p99's)"]
    rows = [getattr(s.victim, m) for s in report.settings.values() for m in METRICS]
    if any(row.p99_is_maximum for row in rows):
        lines.append("* fewer than 100 samples: this is the maximum")
    if report.simulated:
        lines.append("simulated engines: this is the gateway alone")
    return "; ".join(lines)


def _cell(key: str, setting: Setting, metric: str) -> str:
    row: Percentiles = getattr(setting.victim, metric)
    figures = f"{milliseconds(row.p50)} / {milliseconds(row.p99)}{'*' if row.p99_is_maximum else ''}"
    ratios = setting.ratio_to_alone[metric]  # type: ignore[index]
    if key == setting.baseline or ratios["p50"] is None or ratios["p99"] is None:
        return figures
    interval = setting.ratio_confidence[metric].get("p99")  # type: ignore[index]
    reach = f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else ""
    return f"{figures}\n{ratios['p50']:.2f}x / {ratios['p99']:.2f}x{reach}"
