"""`sliceway models`: what it prints for people and programs, where models go, and how wrong sources end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.cli.models import models_directory
from model_registry.errors import ConfigError, ModelNotFound, ModelUnreadable
from model_registry.testing import write_gguf, write_model
from placement.errors import EngineMissing


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models directory of every command here."""
    monkeypatch.setenv("SLICEWAY_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_a_directory_is_imported_once_and_listed(tmp_path: Path, models: Path):
    source = write_model(tmp_path / "tiny")
    first = CliRunner().invoke(app, ["models", "import", str(source), "--json"])
    assert first.exit_code == 0, first.output
    told = json.loads(first.stdout)
    assert (told["name"], told["created"], told["path"]) == ("tiny", True, str(models / "tiny"))
    assert (told["architecture"], told["task"], told["max_context_tokens"]) == ("LlamaForCausalLM", "generate", 2048)
    assert json.loads(CliRunner().invoke(app, ["models", "import", str(source), "--json"]).stdout)["created"] is False
    [listed] = json.loads(CliRunner().invoke(app, ["models", "list", "--json"]).stdout)
    assert {k: told[k] for k in listed} == listed


def test_people_are_told_the_line_for_their_configuration(tmp_path: Path, models: Path):
    source = write_model(tmp_path / "tiny")
    answer = CliRunner().invoke(app, ["models", "import", str(source), "--name", "mine"])
    assert "mine is ready" in answer.stdout
    assert f"source: {models / 'mine'}" in answer.stdout
    assert "import: copying" in answer.stderr
    assert (
        "mine is already there" in CliRunner().invoke(app, ["models", "import", str(source), "--name", "mine"]).stdout
    )
    assert "LlamaForCausalLM" in CliRunner().invoke(app, ["models", "list"]).stdout


def test_into_wins_over_the_environment(tmp_path: Path, models: Path):
    source = write_model(tmp_path / "tiny")
    CliRunner().invoke(app, ["models", "import", str(source), "--into", str(tmp_path / "other")])
    assert (tmp_path / "other" / "tiny" / "config.json").is_file()
    assert not models.exists()
    assert "Import one: sliceway models import FILE.gguf" in CliRunner().invoke(app, ["models", "list"]).stdout


def test_models_are_kept_in_the_state_directory_by_default(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLICEWAY_MODELS")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert models_directory() == Path("/var/state/sliceway/models")


def test_wrong_sources_are_errors_of_ours(tmp_path: Path):
    for arguments, error in (
        (["org/name"], ModelNotFound),
        (["pypi:../x"], ModelNotFound),
        ([str(tmp_path)], ModelUnreadable),
        ([str(tmp_path), "--name", "a/b"], ConfigError),
    ):
        answer = CliRunner().invoke(app, ["models", "import", *arguments])
        assert isinstance(answer.exception, error), arguments


def test_an_interpreter_that_is_none_is_told_before_anything_is_converted(tmp_path: Path, models: Path):
    source = write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, [("token_embd.weight", (8, 8), 0)])
    answer = CliRunner().invoke(app, ["models", "import", str(source), "--python", str(tmp_path / "absent")])
    assert isinstance(answer.exception, EngineMissing)
    assert list(models.iterdir()) == []
