"""What the commands share."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from loadtests.lab.scenario import Context
from loadtests.problems import LoadTestError, Problem, ScenarioError
from loadtests.samples import Sample
from loadtests.yamlfile import Source, load


@dataclass(frozen=True, slots=True)
class Command:
    """One command: what it is for, its arguments, and what it does, which ends in an exit code."""

    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]


def add_output(parser: ArgumentParser) -> None:
    """`--json`, `--samples`."""
    parser.add_argument("--json", action="store_true", help="JSON on standard output instead of a table")
    parser.add_argument(
        "--samples", type=Path, metavar="FILE", help="write every request to FILE, a JSON object a line"
    )


def add_context(parser: ArgumentParser) -> None:
    """`--context`: what `sliceway bench` knows of the gateway."""
    parser.add_argument(
        "--context",
        action="store_true",
        help="read address, keys and tenants of the gateway from standard input (JSON: loadtests/lab/scenario.py, Context)",
    )


def read_context(chosen: Namespace) -> Context:
    """The context on standard input, or an empty one."""
    if not chosen.context:
        return Context()
    try:
        data = json.loads(sys.stdin.read())
    except ValueError as error:
        raise ScenarioError(Problem(f"this is no JSON: {error}", "context")) from error
    return Source(data, "context").parse(Context)


def given(chosen: Namespace) -> tuple[Source, Context]:
    """The scenario and the context: both on standard input, as {scenario, context, options}, where the file is `-`."""
    if str(chosen.file) != "-":
        return read_source(chosen.file), read_context(chosen)
    both = read_source(chosen.file)
    if not isinstance(both.data, dict) or "scenario" not in both.data:
        return both, Context()
    scenario = Source(both.data["scenario"], "scenario", options=both.data.get("options"))
    return scenario, Source(both.data.get("context", {}), "context").parse(Context)


def read_source(path: Path) -> Source:
    """The scenario file at `path`; `-` is JSON on standard input, whose `options` are those that fields of it were made from."""
    if str(path) != "-":
        return load(path)
    try:
        data = json.loads(sys.stdin.read())
    except ValueError as error:
        raise ScenarioError(Problem(f"this is no JSON: {error}", "standard input")) from error
    if isinstance(data, dict) and "scenario" not in data:
        return Source(data, "standard input", options=data.pop("options", None))
    return Source(data, "standard input")


def print_json(value: Any) -> None:
    """On standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def check_writable(*, samples: Path | None = None, report: Path | None = None) -> None:
    """Raises ScenarioError where results could not be written: it is better known before a measurement than after it."""
    try:
        if report is not None:
            report.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=report):
                pass
    except OSError as error:
        raise _unwritable("--report", report, error, "Name a directory that you can write to.") from error
    try:
        if samples is not None:
            samples.open("a", encoding="utf-8").close()
    except OSError as error:
        raise _unwritable("--samples", samples, error, "Name a file in a directory that you can write to.") from error


def _unwritable(option: str, path: Path | None, error: OSError, remedy: str) -> ScenarioError:
    return ScenarioError(Problem(f"nothing can be written there: {error.strerror}", f"{option} {path}", remedy))


def keep_samples(path: Path | None, rows: Iterable[tuple[str, Iterable[Sample]]]) -> None:
    """Write every sample with the phase that it belongs to. Raises LoadTestError where that cannot be done."""
    if path is None:
        return
    try:
        with path.open("w", encoding="utf-8") as file:
            for phase, samples in rows:
                for sample in samples:
                    file.write(json.dumps({"phase": phase} | asdict(sample)) + "\n")
    except OSError as error:
        raise LoadTestError(f"the samples cannot be written: {error}", remedy="Name another file.") from error
