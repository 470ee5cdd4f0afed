from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from gateway.cli import app
from gateway.cli.operate import parse_lifetime
from gateway.errors import UnknownKey, UnknownTenant
from model_registry.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "sliceway.yaml"
    path.write_text(
        f"version: v1\nstate_dir: {tmp_path}/state\ntenants: [{{name: acme}}, {{name: beta}}]\n", encoding="utf-8"
    )
    return path


def run(*words: Any) -> Any:
    return CliRunner().invoke(app, ["keys", *map(str, words)], catch_exceptions=True)


def test_a_key_is_all_of_the_output_so_that_a_script_can_take_it(config: Path) -> None:
    done = run("create", "acme", config, "--expires", "30d")
    assert done.exit_code == 0
    assert done.stdout.startswith("sk-sliceway-")
    assert len(done.stdout.splitlines()) == 1
    assert "shown this once" in done.stderr


def test_list_and_revoke_by_json(config: Path) -> None:
    made = json.loads(run("create", "acme", "--config", config, "--name", "ci", "--expires", "2h", "--json").stdout)
    assert {"key", "id", "tenant", "name", "created", "expires", "revoked", "replaces", "state", "last_used"} == set(
        made
    )
    run("create", "beta", "--config", config)
    listed = json.loads(run("list", config, "--json").stdout)["keys"]
    assert [(k["tenant"], k["name"], k["state"]) for k in listed] == [("acme", "ci", "active"), ("beta", "", "active")]
    assert "key" not in listed[0]
    assert json.loads(run("revoke", made["id"], "-c", config, "--json").stdout)["state"] == "revoked"
    only = json.loads(run("list", config, "--tenant", "acme", "--json").stdout)["keys"]
    assert [k["state"] for k in only] == ["revoked"]
    assert "revoked" in run("list", config).stdout


def test_an_unknown_tenant_is_refused_with_the_nearest_name(config: Path) -> None:
    error = run("create", "acne", config).exception
    assert isinstance(error, UnknownTenant)
    assert "'acme'" in str(error)
    assert "acme, beta" in str(error)


def test_the_keys_of_a_tenant_that_there_is_not(config: Path) -> None:
    error = run("list", config, "--tenant", "acne").exception
    assert isinstance(error, UnknownTenant)
    assert "Did you mean 'acme'?" in str(error.remedy)
    assert "no keys yet" in run("list", config, "--tenant", "acme").stdout


def test_keys_of_a_tenant_that_was_taken_out_are_still_listed(config: Path) -> None:
    run("create", "beta", config)
    config.write_text(config.read_text(encoding="utf-8").replace(", {name: beta}", ""), encoding="utf-8")
    listed = json.loads(run("list", config, "--tenant", "beta", "--json").stdout)["keys"]
    assert [key["tenant"] for key in listed] == ["beta"]


def test_an_unknown_key_is_refused(config: Path) -> None:
    assert isinstance(run("revoke", "nothing", config).exception, UnknownKey)


def test_without_a_configuration_it_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = run("list").exception
    assert isinstance(error, ConfigError)
    assert "sliceway init" in str(error)


def test_the_file_in_the_working_directory_is_taken(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)
    assert "no keys yet" in run("list").stdout


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("30d", 30 * 86400), ("2w", 14 * 86400), ("5m", 300)]
)
def test_lifetimes_are_read(text: str, seconds: float) -> None:
    assert parse_lifetime(text, "--expires") == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "0d", "3x", "1 d"])
def test_other_lifetimes_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="like 30d") as refused:
        parse_lifetime(text, "--expires")
    assert refused.value.param_hint == "--expires"
