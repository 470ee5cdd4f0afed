"""What a wrong word on the command line is answered with: what is wrong, what there is, and exit code 2."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.cli.output import exit_code, run, show_error
from gateway.errors import OperatorError, UnknownSlice
from model_registry.catalogue import load_catalogue
from model_registry.errors import ConfigError, SlicewayError
from placement.locks import exclusive
from placement.simulator.machine import parse_fleet
from placement.state import StatePaths
from placement.status import ControllerStatus, write_status
from placement.table import RoutingTable, SliceRow, publish

CONFIG = """\
version: v1
state_dir: {state}
fleet: {{discover: cpu, cpu: {{slices: 1}}}}
models: [{{name: m, endpoints: ['http://127.0.0.1:9']}}]
tenants: [{{name: acme, models: [m]}}]
"""


def refused(*words: Any) -> SlicewayError:
    """The error that the command ends with; it must be one that is told with exit code 2."""
    error = CliRunner().invoke(app, [str(word) for word in words]).exception
    assert isinstance(error, SlicewayError), error
    assert exit_code(error) == 2
    return error


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "sliceway.yaml"
    path.write_text(CONFIG.format(state=tmp_path / "state"), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", ["up", "down", "controller", "gateway", "plan", "status", "reload", "upgrade"])
def test_every_command_takes_the_configuration_that_lies_here(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no sliceway.yaml here" in str(refused(command))
    (tmp_path / "sliceway.yaml").write_text("version: v9\n", encoding="utf-8")
    assert refused(command).where == "sliceway.yaml:1: version"
    assert "Is a directory" in str(refused(command, tmp_path))


def test_a_slice_that_there_is_not_takes_no_replica_off_its_own(config: Path, tmp_path: Path) -> None:
    paths = StatePaths(tmp_path / "state")
    error = refused("replica", "start", "m-0", "--on", "cpu-9", "-c", config)
    assert isinstance(error, UnknownSlice)
    assert "cpu-0" in str(error.remedy)
    assert not paths.orders.exists()


def test_slices_that_only_the_controller_sees_count(config: Path, tmp_path: Path) -> None:
    paths = StatePaths(tmp_path / "state")
    paths.prepare({})
    publish(RoutingTable(generation=1, idle=(SliceRow(id="GPU-1/1g.10gb@0", kind="mig"),)), paths.routing_table)
    done = CliRunner().invoke(app, ["replica", "start", "m-0", "--on", "GPU-1/1g.10gb@0", "-c", str(config)])
    assert "no controller runs here" in str(done.exception)  # so the slice itself was not in question
    assert "GPU-1/1g.10gb@0" in str(refused("replica", "start", "m-0", "--on", "GPU-1/1g", "-c", config).remedy)


@pytest.mark.parametrize("verb", ["drain", "stop", "start"])
def test_a_replica_that_there_is_not(verb: str, config: Path, tmp_path: Path) -> None:
    paths = StatePaths(tmp_path / "state")
    paths.prepare({})
    now = datetime(2026, 11, 21, tzinfo=UTC)
    told = {"pid": 1, "started_at": now, "updated_at": now, "state": "running", "config": "c", "generation": 1}
    unplaced = {"m-0": {"code": "no_free_slice", "message": "no room", "where": None, "remedy": None}}
    write_status(ControllerStatus.model_validate(told | {"unplaced": unplaced}), paths.controller_status)
    with exclusive(paths.controller_lock, what="controller", remedy=""):
        error = refused("replica", verb, "m-9", "-c", config)
    assert "there is no replica 'm-9'" in str(error)
    assert "m-0" in str(error.remedy)
    assert not paths.orders.exists()


@pytest.mark.parametrize("words", [("./missing.gguf",), ("nosuch",), ("/nowhere/config.json", "--json")])
def test_a_model_that_is_no_file_and_no_hub_id(words: tuple[str, ...]) -> None:
    assert "models import" in str(refused("size", *words).remedy)


@pytest.mark.parametrize("fleet", ["h100-sxm:x", "h100-sxm:0", "", "h100-sxm:100000", "h100:8", "nosuch:1"])
def test_a_simulated_fleet_that_is_none(fleet: str) -> None:
    with pytest.raises(SlicewayError) as caught:
        parse_fleet(load_catalogue(), fleet)
    assert exit_code(caught.value) == 2
    assert caught.value.remedy
    assert refused("slices", "--simulate", fleet).remedy


def test_a_word_that_is_neither_a_format_nor_a_file() -> None:
    error = refused("export", "mig-partedd")
    assert "neither a format nor a file" in str(error)
    assert "Did you mean 'mig-parted'?" in str(error.remedy)
    assert "init" not in str(error.remedy)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("version: v1\nmodels: []\n", "'models'"),
        ("a: [", "no YAML"),
        ("- 1\n", "no mig-parted"),
    ],
)
def test_what_mig_parted_did_not_write(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    error = refused("import", path)
    assert said in str(error)
    assert "Errno" not in str(error)
    assert "mig-parted" in str(error.remedy) or "mig-configs" in str(error.remedy)


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    assert refused("plan", tmp_path).remedy == "Name a file in it."


@pytest.mark.parametrize(
    ("field", "said"), [("weight=x", "a number"), ("priority=1.5", "a whole number"), ("limits=3", "a mapping")]
)
def test_a_tenants_field_of_the_wrong_type(field: str, said: str, config: Path) -> None:
    error = refused("tenants", "set", "acme", field, "-c", config)
    assert isinstance(error, OperatorError)
    assert f"tenants.acme.{field.partition('=')[0]}: must be {said}" in str(error)


def test_every_line_of_a_remedy_stands_below_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(ConfigError("it is so", where="here", remedy="Do this.\nOr that."), as_json=False)
    assert capsys.readouterr().err.splitlines() == ["error here: it is so", "      Do this.", "      Or that."]


def test_the_version_is_told() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"sliceway {version('sliceway')}\n")


def test_a_file_that_the_system_refuses_is_told_with_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").write_text("a file where a directory should be", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        run(lambda: (tmp_path / "state" / "keys.lock").open("rb"))
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error {tmp_path / 'state' / 'keys.lock'}: Not a directory\n")
    assert "state_dir" in told


def test_an_error_of_the_system_that_names_no_file_is_no_operators_business() -> None:
    def fails() -> None:
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        run(fails)
