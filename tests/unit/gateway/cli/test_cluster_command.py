"""`sliceway up --ray` and `sliceway node join` where no cluster comes about. Ray itself is never started."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gateway.cli import app, cluster, member
from gateway.cli.output import exit_code
from placement.cluster import processes
from placement.cluster.errors import ClusterUnreachable, NoAddress
from placement.errors import StateLocked

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


def machine(tmp_path: Path) -> Any:
    return start.Machine("n1", "127.0.0.1", tmp_path / "n1", {}, (), None)


def test_one_process_is_a_node_at_a_time(tmp_path: Path) -> None:
    with member.alone(machine(tmp_path)):
        holder = os.open(tmp_path / "n1" / "member.lock", os.O_RDWR)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(holder)
        with (
            pytest.raises(StateLocked, match=rf"'n1' is at work already \(pid {os.getpid()}\)"),
            member.alone(machine(tmp_path)),
        ):
            pass


def test_who_leaves_a_cluster_that_has_ended_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray would be waited for a minute, and then it would end this process."""

    def ended(_: str) -> None:
        raise ClusterUnreachable("nobody answers")

    def refuse(*_: str) -> None:
        pytest.fail("Ray was asked")

    stopped: list[float] = []
    monkeypatch.setattr(member, "knock", ended)
    monkeypatch.setattr(start, "connect", refuse)
    monkeypatch.setattr(processes.LocalProcesses, "stop", lambda _, *, seconds: stopped.append(seconds))
    member._leave(machine(tmp_path), "127.0.0.1:1")
    assert stopped == [member.STOP_SECONDS]
    assert "does not answer; leaving without it" in capsys.readouterr().out


def test_a_cluster_comes_back_where_its_members_look_for_it(tmp_path: Path) -> None:
    kept = tmp_path / "state" / "cluster.port"
    port = cluster._port(kept, "127.0.0.1")
    assert cluster._port(kept, "127.0.0.1") == port
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        other = cluster._port(kept, "127.0.0.1")
    assert other != port
    assert cluster._port(kept, "127.0.0.1") == other
    kept.write_text("99999999", encoding="utf-8")
    assert 0 < cluster._port(kept, "127.0.0.1") < 65536
