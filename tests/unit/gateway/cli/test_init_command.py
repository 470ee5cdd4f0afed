"""The configuration that `init` writes loads, on machines of every kind, and nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.config import load_config
from gateway.starter import starter_config
from model_registry.errors import ConfigError
from placement.slices import Gpu, Inventory, Slice, SliceKind

CARD = Gpu(uuid="GPU-1", index=0, product="H100-80GB-SXM", memory_bytes=80 * 2**30)
MIG = Slice(id="GPU-1/1g.10gb@0", kind=SliceKind.MIG, profile="1g.10gb", memory_bytes=2**30, uuid="MIG-1", gpu=CARD)
CORES = Slice(id="cpu-0", kind=SliceKind.CPU, profile=None, memory_bytes=2**30, cores=(0, 1))


@pytest.mark.parametrize(
    ("slices", "discover"), [((), "cpu"), ((CORES,), "cpu"), ((MIG,), "nvidia")], ids=["nothing", "cores", "mig"]
)
def test_what_is_written_loads_and_fits_the_machine(slices: tuple[Slice, ...], discover: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(starter_config(Inventory(slices), name="c.yaml"), encoding="utf-8")
    config = load_config(path)
    assert config.fleet.discover == discover
    assert [t.name for t in config.tenants] == ["acme"]
    assert all(one.id in path.read_text(encoding="utf-8") for one in slices)


def test_the_command_writes_a_file_that_loads_and_says_where(tmp_path: Path) -> None:
    path = tmp_path / "sliceway.yaml"
    answer = CliRunner().invoke(app, ["init", str(path), "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["path"] == str(path)
    assert load_config(path).models[0].name == "chat"


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    path = tmp_path / "sliceway.yaml"
    path.write_text("mine", encoding="utf-8")
    refused = CliRunner().invoke(app, ["init", str(path)])
    assert isinstance(refused.exception, ConfigError)
    assert "--force" in str(refused.exception)
    assert path.read_text(encoding="utf-8") == "mine"
    assert CliRunner().invoke(app, ["init", str(path), "--force"]).exit_code == 0
    assert load_config(path).version == "v1"


@pytest.mark.parametrize("path", ["", "missing-parent-of-a-file/as/a/file"])
def test_a_place_that_cannot_be_written_is_told(path: str, tmp_path: Path) -> None:
    (tmp_path / "missing-parent-of-a-file").write_text("a file, not a directory", encoding="utf-8")
    refused = CliRunner().invoke(app, ["init", str(tmp_path / path)])
    assert isinstance(refused.exception, ConfigError)
    assert refused.exception.remedy
