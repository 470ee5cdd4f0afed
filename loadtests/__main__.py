"""`python -m loadtests run SCENARIO` and `python -m loadtests isolation PLAN`: one measurement, then a table or JSON.

A process of its own: Locust needs the standard library patched for gevent, before anything else is imported.
"""

from __future__ import annotations

import gevent.monkey

gevent.monkey.patch_all()

# Everything below must see the patched modules.
import argparse  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402

from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402

from loadtests import isolation, reports  # noqa: E402
from loadtests.run import OnProgress, run  # noqa: E402
from loadtests.run_result import Run  # noqa: E402
from loadtests.scenario import ScenarioError, load_scenario  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """0 measured · 1 nothing was answered · 2 the scenario is wrong or nobody answers at its address · 130 interrupted."""
    chosen = _parser().parse_args(arguments)
    try:
        return _run(chosen) if chosen.command == "run" else _isolation(chosen)
    except ScenarioError as error:
        Console(stderr=True, soft_wrap=True).print(f"error {error}", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="one scenario")
    one.add_argument("file", type=Path, metavar="SCENARIO")
    two = commands.add_parser("isolation", help="a victim alone, and beside a flooding neighbour")
    two.add_argument("file", type=Path, metavar="PLAN", help="JSON; - reads standard input")
    for command in (one, two):
        command.add_argument("--json", action="store_true", help="JSON on standard output instead of a table")
        command.add_argument(
            "--samples", type=Path, metavar="FILE", help="write every request to FILE, a JSON object a line"
        )
    return parser


def _run(chosen: argparse.Namespace) -> int:
    scenario = load_scenario(chosen.file)
    with _progress("load", 1) as advance:
        measured = run(scenario, advance("load"))
    _keep_samples(chosen.samples, [("", measured)])
    if chosen.json:
        _print_json(reports.as_dict(measured))
    else:
        console = reports.console()
        console.print(reports.table(reports.by_tenant_and_slice(measured.samples)))
        _print_warnings(console, reports.warnings([measured]))
    return 0 if any(sample.failure is None for sample in measured.samples) else 1


def _isolation(chosen: argparse.Namespace) -> int:
    plan = isolation.parse_plan(_read_json(chosen.file))
    phases = list(isolation.phases(plan))
    runs = []
    with _progress("isolation", len(phases)) as advance:
        for phase in phases:
            label = f"round {phase.round + 1} of {plan.rounds}: {isolation.LABELS[phase.setting]}"
            runs.append((phase, run(phase.scenario, advance(label))))
    _keep_samples(chosen.samples, [(f"{phase.round}/{phase.setting}", measured) for phase, measured in runs])
    result = isolation.evaluate(plan, runs)
    if chosen.json:
        _print_json(result.as_dict())
    else:
        console = reports.console()
        console.print(isolation.table(result))
        _print_warnings(console, result.warnings)
    return 0


def _read_json(path: Path) -> object:
    try:
        return json.loads(sys.stdin.read() if str(path) == "-" else path.read_text())
    except (OSError, ValueError) as error:
        raise ScenarioError(f"{path}: {error}") from error


def _print_json(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _print_warnings(console: Console, found: Sequence[str]) -> None:
    for text in found:
        console.print(f"note: {text}", markup=False, highlight=False)


def _keep_samples(path: Path | None, runs: Sequence[tuple[str, Run]]) -> None:
    if path is None:
        return
    with path.open("w") as file:
        for phase, measured in runs:
            for row in reports.raw(measured.samples):
                file.write(json.dumps({"phase": phase} | row) + "\n")


class _Steps:
    """Progress over several runs: a bar on a terminal, a line at the start of each run elsewhere."""

    def __init__(self, bar: Progress, console: Console, title: str, runs: int) -> None:
        self._bar, self._console = bar, console
        self._task = bar.add_task(title, total=runs)
        self._done = -1

    def __call__(self, label: str) -> OnProgress:
        self._done += 1
        done = self._done
        if not self._console.is_terminal:
            self._console.print(label, markup=False, highlight=False)

        def report(share: float, sent: int) -> None:
            self._bar.update(self._task, completed=done + share, description=f"{label} · {sent} requests")

        return report


@contextmanager
def _progress(title: str, runs: int) -> Iterator[_Steps]:
    console = Console(stderr=True, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        yield _Steps(bar, console, title, runs)


if __name__ == "__main__":
    raise SystemExit(main())
