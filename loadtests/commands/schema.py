"""`schema`: the JSON schema of isolation reports."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from loadtests.commands.base import print_json
from loadtests.lab.report import Report


def add_arguments(parser: ArgumentParser) -> None:
    """None."""


def run(chosen: Namespace) -> int:
    """0."""
    print_json(Report.model_json_schema(by_alias=True))
    return 0
