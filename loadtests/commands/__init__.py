"""The commands of `python -m loadtests`, one module each."""

from __future__ import annotations

from loadtests.commands import capacity, check, compare, isolation, render, run, schema
from loadtests.commands.base import Command

COMMANDS: dict[str, Command] = {
    "run": Command("one scenario", run.add_arguments, run.run),
    "check": Command("say what is wrong with a scenario, without sending anything", check.add_arguments, check.run),
    "isolation": Command("a victim alone, and beside aggressors", isolation.add_arguments, isolation.run),
    "capacity": Command("the highest load that meets an SLO", capacity.add_arguments, capacity.run),
    "render": Command("reports from one or several results", render.add_arguments, render.run),
    "compare": Command("two results, before and after", compare.add_arguments, compare.run),
    "schema": Command("the JSON schema of isolation reports", schema.add_arguments, schema.run),
}

__all__ = ["COMMANDS", "Command"]
