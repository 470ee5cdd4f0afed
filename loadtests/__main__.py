"""`python -m loadtests COMMAND`: measurements against a running gateway, and what is made of their results.

`sliceway bench` starts gateways and makes keys around these commands; they also work by themselves on any OpenAI endpoint.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from rich.console import Console

from loadtests.commands import COMMANDS
from loadtests.problems import LoadTestError, ScenarioError


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, and within the budget if there is one · 1 not done, or not within · 2 wrong input · 3 no verdict · 130 interrupted.

    SIGTERM unwinds as Ctrl-C does, so that the sending processes end, too.
    """
    parser = argparse.ArgumentParser(prog="python -m loadtests", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.help))
    chosen = parser.parse_args(arguments)
    console = Console(stderr=True, soft_wrap=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return COMMANDS[chosen.command].run(chosen)
    except ScenarioError as error:
        for problem in error.problems:
            console.print(f"error {problem}", markup=False, highlight=False)
        return 2
    except LoadTestError as error:
        console.print(f"error {error}", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
