"""How every command talks: tables on a terminal, JSON with `--json`, errors that say what to do, and exit codes.

0 done · 1 it could not be done · 2 the input (arguments or configuration) is wrong · 130 interrupted (Ctrl-C) · 143 ended by SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from textwrap import indent
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from gateway.errors import OperatorError
from model_registry.errors import (
    ConfigError,
    IllegalLayout,
    NoSuchSource,
    SlicewayError,
    UnknownProduct,
    UnknownProfile,
)
from placement.cluster.errors import NoAddress, TokenRefused
from placement.errors import NoSuchReplica, WrongFleet

_WRONG_INPUT = (
    ConfigError,
    UnknownProduct,
    UnknownProfile,
    IllegalLayout,
    OperatorError,
    WrongFleet,
    NoSuchReplica,
    NoSuchSource,
    NoAddress,
    TokenRefused,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


class FileRefused(SlicewayError):
    """The system refused what was to be done with a file: no right to it, no room, another kind of file in its place."""

    code = "file_refused"


def print_json(value: object) -> None:
    """Print `value` as JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def exit_code(error: SlicewayError) -> int:
    """2 for wrong input, 1 for everything else."""
    return 2 if isinstance(error, _WRONG_INPUT) else 1


@contextmanager
def found_at(where: str) -> Iterator[None]:
    """Errors from inside that name no place get this one: an option (`--gpu`), or a part of a file."""
    try:
        yield
    except SlicewayError as error:
        error.where = error.where or where
        raise


def show_error(error: SlicewayError, *, as_json: bool) -> None:
    """Tell what happened, where, and what to do: as text on standard error, or as `{"error": ...}` on standard output."""
    problems = error.problems if isinstance(error, ConfigError) else (error,)
    if as_json:
        print_json({"error": error.as_dict() | {"problems": [p.as_dict() for p in problems]}})
        return
    for problem in problems:
        where = f"{escape(problem.where)}: " if problem.where else ""
        err.print(f"[bold red]error[/] {where}{escape(problem.message)}")
        if problem.remedy:
            err.print(f"[dim]{indent(escape(problem.remedy), '      ')}[/]")


def run(app: Callable[..., Any]) -> None:
    """Call the typer application and turn deliberate errors, and files that the system refuses, into words and an exit code.

    SIGTERM unwinds a command as Ctrl-C does: what it has started for itself ends with it.
    """
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        app()
    except SlicewayError as error:
        _end(error)
    except OSError as error:
        if error.filename is None:  # nothing that an operator could look at
            raise
        _end(_refused(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, _: object) -> NoReturn:
    raise SystemExit(128 + number)


def _end(error: SlicewayError) -> NoReturn:
    show_error(error, as_json="--json" in sys.argv)
    raise SystemExit(exit_code(error)) from None


def _refused(error: OSError) -> FileRefused:
    return FileRefused(
        error.strerror or str(error),
        where=os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else str(error.filename),
        remedy="See that this user may write there and that there is room. `state_dir` in the configuration says where "
        "sliceway keeps its files.",
    )
