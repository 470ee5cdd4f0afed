"""`sliceway up --ray` and `sliceway node join` where no cluster comes about. Ray itself is never started."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app
from gateway.cli.output import exit_code
from placement.cluster.errors import ClusterUnreachable, NoAddress

start = pytest.importorskip("placement.cluster.start", exc_type=ImportError)


class NeverJoins:
    """In the place of Ray on this machine."""

    made: list[NeverJoins]

    def __init__(self, *_: Any, **__: Any) -> None:
        self.address = "127.0.0.1:1"
        self.ended = self.stopped = False
        self.made.append(self)

    def wait_until_joined(self, node: str) -> None:
        raise ClusterUnreachable(f"{node} could not join")

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def raylets(monkeypatch: pytest.MonkeyPatch) -> list[NeverJoins]:
    made = list[NeverJoins]()
    monkeypatch.setattr(NeverJoins, "made", made, raising=False)
    monkeypatch.setattr(start, "Raylet", NeverJoins)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # what the command sets is taken back
    return made


def test_a_cluster_that_does_not_come_up_leaves_nothing_running(raylets: list[NeverJoins], tmp_path: Path) -> None:
    path = tmp_path / "sliceway.yaml"
    path.write_text(
        f"version: v1\nstate_dir: {tmp_path}/state\nfleet: {{discover: cpu, cpu: {{slices: 1}}}}\n"
        "models: [{name: m, endpoints: ['http://127.0.0.1:9']}]\ntenants: [{name: acme, models: [m]}]\n",
        encoding="utf-8",
    )
    error = CliRunner().invoke(app, ["up", str(path), "--ray", "local"]).exception
    assert isinstance(error, ClusterUnreachable), error
    assert [one.stopped for one in raylets] == [True]


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:port"])
def test_a_wrong_address_is_wrong_input_and_starts_nothing(
    address: str, raylets: list[NeverJoins], tmp_path: Path
) -> None:
    error = CliRunner().invoke(app, ["node", "join", address, "--state-dir", str(tmp_path)]).exception
    assert isinstance(error, NoAddress), error
    assert exit_code(error) == 2
    assert raylets == []
