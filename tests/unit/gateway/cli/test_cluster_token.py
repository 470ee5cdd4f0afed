from __future__ import annotations

from pathlib import Path

import pytest

from gateway.cli.cluster_token import own_token, states_here, token_for
from model_registry.errors import ConfigError


def first_machine(state: Path, port: str = "6380") -> Path:
    token = own_token(state)
    (state / "cluster.port").write_text(port, encoding="utf-8")
    return token


def test_a_token_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    token = own_token(tmp_path / "state")
    first = token.read_bytes()
    assert own_token(tmp_path / "state").read_bytes() == first
    assert token.stat().st_mode & 0o777 == 0o600


def test_on_the_first_machine_the_token_is_known(tmp_path: Path) -> None:
    token = first_machine(tmp_path / "state")
    states = [tmp_path / "other", tmp_path / "state"]
    assert token_for("127.0.0.1:6380", None, states, {}) == token
    assert token_for("localhost:6380", None, states, {"RAY_AUTH_TOKEN": ""}) == token


@pytest.mark.parametrize("address", ["127.0.0.1:6381", "198.51.100.7:6380", "127.0.0.1", ":6380", "\udcff:6380"])
def test_it_is_shown_to_nobody_else(address: str, tmp_path: Path) -> None:
    """Another cluster of this machine, another machine, and what is no address."""
    first_machine(tmp_path)
    assert token_for(address, None, [tmp_path], {}) is None


def test_rays_own_variables_and_a_named_file_count_before_it(tmp_path: Path) -> None:
    first_machine(tmp_path)
    named = tmp_path / "named"
    named.write_text("t", encoding="utf-8")
    assert token_for("127.0.0.1:6380", None, [tmp_path], {"RAY_AUTH_TOKEN": "t"}) is None
    assert token_for("127.0.0.1:6380", named, [tmp_path], {}) == named
    with pytest.raises(ConfigError, match="no token here"):
        token_for("127.0.0.1:6380", tmp_path / "nowhere", [tmp_path], {})


def test_a_command_without_a_configuration_looks_where_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(states_here()) == [Path(".sliceway")]
    (tmp_path / "sliceway.yaml").write_text(f"version: v1\nstate_dir: {tmp_path}/state\nmodels: []\n", encoding="utf-8")
    assert list(states_here()) == [tmp_path / "state", Path(".sliceway")]
    (tmp_path / "sliceway.yaml").write_text("version: [", encoding="utf-8")
    assert list(states_here()) == [Path(".sliceway")], "what is wrong with it, commands say that need it"
