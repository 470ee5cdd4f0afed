"""`isolation`: the matrix of settings, the verdict, and the reports."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from loadtests.commands.base import add_context, add_output, check_writable, given, keep_samples, print_json
from loadtests.lab.measure import measure
from loadtests.lab.report import Report
from loadtests.lab.scenario import check_host, check_tenants, read_isolation
from loadtests.lab.tables import show
from loadtests.machine import usable_cores
from loadtests.report.files import write_reports
from loadtests.reports import console

EXIT_CODES = {"pass": 0, "none": 0, "fail": 1, "undecided": 3, "refused": 3}


def add_arguments(parser: ArgumentParser) -> None:
    """The scenario and where its results go."""
    parser.add_argument("file", type=Path, metavar="SCENARIO", help="YAML; with --context, - takes it from there")
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.html, report.md and report.json there")
    parser.add_argument("--command-line", default="", help="the command to repeat this, for the report")
    add_context(parser)
    add_output(parser)


def run(chosen: Namespace) -> int:
    """0 within the budget, or measured without one · 1 not within it · 3 no verdict."""
    source, context = given(chosen)
    scenario = read_isolation(source)
    check_tenants(scenario, context, source)
    check_host(scenario, source, usable_cores())
    check_writable(samples=chosen.samples, report=chosen.report)
    command = chosen.command_line or f"python -m loadtests isolation {chosen.file}"
    report, measured = measure(scenario, context, command)
    keep_samples(chosen.samples, [(f"{m.round}/{m.cell.key}", m.run.samples) for m in measured])
    finish(report, report_dir=chosen.report, as_json=chosen.json)
    return EXIT_CODES[report.verdict.status]


def finish(report: Report, *, report_dir: Path | None, as_json: bool) -> None:
    """Write the files that were asked for, and show the result."""
    if report_dir is not None:
        write_reports(report, report_dir)
    if as_json:
        print_json(report.as_dict())
    else:
        show(report, console())
