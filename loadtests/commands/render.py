"""`render`: HTML, Markdown and JSON from results; several deployments become one report."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from loadtests.commands.isolation import EXIT_CODES, finish
from loadtests.lab.merge import merge
from loadtests.lab.report import read_report


def add_arguments(parser: ArgumentParser) -> None:
    """The results and where the reports go."""
    parser.add_argument("files", type=Path, nargs="+", metavar="REPORT.json")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.html, report.md and report.json there")
    parser.add_argument("--json", action="store_true", help="the JSON report on standard output instead of a table")


def run(chosen: Namespace) -> int:
    """As `isolation`, by the verdict over all of them."""
    report = merge([read_report(path) for path in chosen.files])
    finish(report, report_dir=chosen.report, as_json=chosen.json)
    return EXIT_CODES[report.verdict.status]
