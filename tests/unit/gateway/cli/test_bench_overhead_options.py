"""What `sliceway bench overhead` says to options that do not go together, before it measures anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.bench import BenchError
from gateway.cli import app


def refused(*words: str) -> BenchError:
    error = CliRunner().invoke(app, ["bench", "overhead", *words]).exception
    assert isinstance(error, BenchError), error
    return error


@pytest.mark.parametrize("words", [("--only", "cpu"), ("--peers", "somewhere"), ("--markdown", "tables.md")])
def test_options_of_the_whole_measurement_are_not_passed_over(words: tuple[str, str]) -> None:
    assert refused(*words).remedy == f"Add --full, or leave {words[0]} out."


def test_peers_are_measured_by_the_part_that_compares_them(tmp_path: Path) -> None:
    assert refused("--full", "--only", "streams", "--peers", str(tmp_path)).remedy == (
        "Add --only cpu, or leave --peers out."
    )


def test_an_environment_that_is_none_is_named(tmp_path: Path) -> None:
    assert refused("--full", "--only", "cpu", "--only", "latency", "--peers", str(tmp_path)).where == str(tmp_path)


def test_a_part_that_does_not_exist_is_answered_with_those_that_do() -> None:
    result = CliRunner().invoke(app, ["bench", "overhead", "--full", "--only", "memory"])
    assert result.exit_code == 2
    assert all(part in result.output for part in ("latency", "streams", "cpu", "neighbours"))
