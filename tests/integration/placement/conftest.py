from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from placement.locks import holder
from placement.replicas.journal import Journal, JournalEntry
from placement.state import StatePaths
from placement.status import ControllerStatus, ReplicaStatus, read_status
from placement.table import ReplicaState, RoutingTable, read

SCRIPTS = Path(__file__).parents[3] / "scripts"
SENTINEL = SCRIPTS / "sentinel.py"
SCRIPT_ENGINE = Path(__file__).with_name("script_engine.py")
SCRIPT = ["{python}", str(SCRIPT_ENGINE), "{uds}"]
FAST = {"first_delay_seconds": 0.1, "max_delay_seconds": 0.4, "max_fast_failures": 3, "fast_failure_seconds": 0.05}
HASTY = {
    "look_every": "100ms",
    "window": "1s",
    "scale_up_after": "300ms",
    "scale_down_after": "600ms",
    "cool_down": "200ms",
    "sleep_after": "1500ms",
}
PATIENCE_SECONDS = 60.0  # several Python processes start one after the other, on machines that do other things as well


def until(condition: Callable[[], Any], what: str, *, seconds: float = PATIENCE_SECONDS) -> Any:
    """The first true value of `condition`; a failure that says `what` was waited for if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        threading.Event().wait(0.02)
    pytest.fail(f"not within {seconds:g} s: {what}")


async def until_async(condition: Callable[[], Any], what: str, *, seconds: float = PATIENCE_SECONDS) -> Any:
    """The same where a loop has to go on."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if isinstance(found, Awaitable):
            found = await found
        if found:
            return found
        await asyncio.sleep(0.02)
    pytest.fail(f"not within {seconds:g} s: {what}")


class Marked:
    """An environment whose processes, and theirs, end with the test at the latest, also if the test is killed."""

    def __init__(self) -> None:
        mark = uuid.uuid4().hex
        self._sentinel = subprocess.Popen(
            [sys.executable, "-S", str(SENTINEL), mark], stdin=subprocess.PIPE, start_new_session=True
        )
        plain = {k: v for k, v in os.environ.items() if not k.startswith("SLICEWAY_NVML")}
        self.environment = plain | {"DRILL_MARK": mark}

    def end(self) -> None:
        """Kill what is left."""
        assert self._sentinel.stdin is not None
        self._sentinel.stdin.close()
        assert self._sentinel.wait(30) == 0, "something that was started here could not be ended"


class Site:
    """A configuration, its state directory, and the processes that serve it."""

    def __init__(self, directory: Path) -> None:
        self.paths = StatePaths(directory / "state")
        self.config = directory / "config.yaml"
        self.log = directory / "out.log"
        self.running: list[subprocess.Popen[bytes]] = []
        self._marked = Marked()

    def write(
        self,
        *models: dict[str, Any],
        slices: int = 2,
        memory: str = "1GiB",
        gateway: dict[str, Any] | None = None,
        **engine: Any,
    ) -> None:
        """A configuration with these models. JSON is YAML; slices share core 0, so that any machine has enough."""
        settings = {"command": SCRIPT, "restart": FAST, "stop_timeout_seconds": 5, "drain_timeout_seconds": 5, **engine}
        cores = sorted(os.sched_getaffinity(0))
        count = min(slices, len(cores))
        listed = [{"kind": "cpu", "id": f"cpu-{i}", "cores": str(cores[i]), "memory": memory} for i in range(count)]
        whole = {
            "version": "v1",
            "state_dir": str(self.paths.root),
            "fleet": {"slices": listed},
            "engine": settings,
            "models": [{"source": "simulated", **m} for m in models],
            "gateway": {"authentication": "none", **(gateway or {})},
        }
        self.config.write_text(json.dumps(whole), encoding="utf-8")

    def scale_hastily(self, **autoscale: str) -> None:
        """Let the configuration's replicas follow demand within moments; `autoscale` adds to the settings or overrides them."""
        raw = json.loads(self.config.read_text(encoding="utf-8"))
        raw["fleet"]["autoscale"] = HASTY | autoscale
        self.config.write_text(json.dumps(raw), encoding="utf-8")

    def run(self, *arguments: str) -> subprocess.Popen[bytes]:
        """`sliceway ...` in the background."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "gateway.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    @property
    def environment(self) -> dict[str, str]:
        """This process's, without its simulators, and with the mark by which everything is found again."""
        return self._marked.environment

    def controller(self) -> subprocess.Popen[bytes]:
        """A controller, working."""
        process = self.run("controller", str(self.config), "--state-dir", str(self.paths.root))
        until(
            lambda: holder(self.paths.controller_lock) == process.pid or process.poll() is not None,
            f"a controller: {self.said()}",
        )
        return process

    def said(self) -> str:
        """What everything here has written."""
        texts = [self.log, *sorted(self.paths.logs.glob("*.log"))]
        return "\n".join(
            f"== {p.name}\n{p.read_text(errors='replace', encoding='utf-8')[-3000:]}" for p in texts if p.exists()
        )

    def table(self) -> RoutingTable:
        """The routing table, empty while there is none."""
        return read(self.paths.routing_table) if self.paths.routing_table.exists() else RoutingTable(generation=0)

    def status(self) -> ControllerStatus | None:
        """What the controller tells."""
        return read_status(self.paths.controller_status)

    def replica(self, name: str) -> ReplicaStatus | None:
        """What it tells of one replica."""
        status = self.status()
        return next((r for r in status.replicas if r.replica == name), None) if status else None

    def entry(self, name: str) -> JournalEntry:
        """The journal's entry of one replica."""
        entry = Journal(self.paths).of(name)
        assert entry is not None
        return entry

    def wait_for(
        self, name: str, state: ReplicaState, *, other_than: int | None = None, seconds: float = PATIENCE_SECONDS
    ) -> ReplicaStatus:
        """Wait until a replica is in this state, in another process than `other_than`."""

        def there() -> ReplicaStatus | None:
            found = self.replica(name)
            return (
                found
                if found and found.state is state and (other_than is None or found.engine_pid != other_than)
                else None
            )

        status: ReplicaStatus = until(there, f"{name} {state}; {self.said()}", seconds=seconds)
        return status

    def ready(self, name: str, *, other_than: int | None = None) -> int:
        """Wait until a replica is ready; its engine's pid."""
        pid = self.wait_for(name, ReplicaState.READY, other_than=other_than).engine_pid
        assert pid is not None
        return pid

    def close(self) -> None:
        """End everything that this site has started, however it was left."""
        self._marked.end()
        for started in self.running:
            started.wait(30)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def marked() -> Iterator[dict[str, str]]:
    """The environment for a process that is to end with the test."""
    made = Marked()
    try:
        yield made.environment
    finally:
        made.end()


@pytest.fixture
def port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def drill(marked: dict[str, str]) -> Callable[..., Any]:
    """`drill("fleet_drill.py", "--gpus", "2")`: the report of one of `scripts/` that ran to its end."""

    def run(script: str, *options: str) -> Any:
        done = subprocess.run(
            [sys.executable, str(SCRIPTS / script), *options, "--json"],
            capture_output=True,
            encoding="utf-8",
            check=False,
            timeout=400,
            env=marked,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def eventually() -> Callable[..., Any]:
    return until


@pytest.fixture
def eventually_async() -> Callable[..., Any]:
    return until_async
