"""A node's processes: started once, found again, replaced, ended. The program is a stand-in that only waits."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from placement.cluster.node import NodePaths
from placement.cluster.processes import LocalProcesses

PROGRAM = "import signal; signal.sigwait([signal.SIGTERM])"


@pytest.fixture
def paths(tmp_path: Path) -> NodePaths:
    return NodePaths(tmp_path)


@pytest.fixture
def processes(paths: NodePaths) -> Iterator[LocalProcesses]:
    one = LocalProcesses(paths, (sys.executable, "-S", "-c", PROGRAM), dict(os.environ))
    yield one
    one.stop(seconds=0.0)
    for child in (*one._children.values(), *one._replaced):
        child.kill()
        child.wait()


def pid(paths: NodePaths, name: str) -> int:
    return int(json.loads((paths.root / f"{name}.pid.json").read_text(encoding="utf-8"))["pid"])


def test_one_of_each_runs_however_often_it_is_asked_for(processes: LocalProcesses, paths: NodePaths) -> None:
    processes.ensure_controller(paths.controller_config, paths.seats)
    first = pid(paths, "controller")
    processes.ensure_controller(paths.controller_config, paths.seats)
    LocalProcesses(paths, ("false",), {}).ensure_controller(paths.controller_config, paths.seats)
    assert pid(paths, "controller") == first, "also for another agent"


def test_both_are_replaced_and_the_gateway_ends_by_itself(processes: LocalProcesses, paths: NodePaths) -> None:
    processes.ensure_controller(paths.controller_config, paths.seats)
    processes.ensure_gateway(paths.gateway_config)
    gateway, controller = pid(paths, "gateway"), pid(paths, "controller")
    processes.renew()
    assert pid(paths, "gateway") != gateway
    assert pid(paths, "controller") != controller
    os.kill(gateway, 0)  # it serves until its connections are gone
    words = Path(f"/proc/{pid(paths, 'gateway')}/cmdline").read_bytes().split(b"\0")
    assert b"--take-over" in words


def test_nothing_is_replaced_where_nothing_runs(processes: LocalProcesses, paths: NodePaths) -> None:
    processes.renew()
    assert not list(paths.root.glob("*.pid.json"))
