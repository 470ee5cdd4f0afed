"""`sliceway down`: stop whatever runs for a configuration, whoever started it, however much of it is left.

Of a cluster that is its `up`, which ends the whole cluster, or else what this machine has in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from gateway.config import Config
from gateway.processes import WatchedProcess, read_record
from placement.clock import SystemClock
from placement.cluster.here import LocalNode, local_nodes
from placement.locks import exclusive, holder
from placement.replicas.ending import end_process, first_of
from placement.replicas.journal import Journal
from placement.replicas.probe import Probe
from placement.replicas.process import EngineProcess, LocalLauncher
from placement.replicas.procfs import ProcessIdentity
from placement.state import StatePaths

_LAST_SECONDS = 10.0
_CLUSTER_SECONDS = 300.0
"""For one that ends the processes of every node first."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """What was running and is no longer: `up`, `gateway`, `controller`, replicas by name, and of a cluster's node the same, with `(node
    NAME)`; `join (node NAME)` is its `sliceway node join`.
    """

    names: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """The stable JSON shape."""
        return {"stopped": list(self.names)}


async def stop_everything(config: Config) -> Stopped:
    """Stop `up` if it runs, which stops the rest; else each of them, the gateway first."""
    paths = StatePaths(config.state)
    engine, gateway = config.engine, config.gateway
    engines_seconds = engine.drain_timeout_seconds + engine.stop_timeout_seconds + _LAST_SECONDS
    gateway_seconds = gateway.drain_timeout_seconds + _LAST_SECONDS
    names: list[str] = []
    record = read_record(paths.up_record)
    usual = gateway_seconds + engines_seconds + _LAST_SECONDS
    if await _end(_locked(paths.up_lock), usual if record is not None else max(usual, _CLUSTER_SECONDS)):
        names.append("up")
    for node in local_nodes(config.state):
        names += [f"{name} (node {node.name})" for name in await _end_node(config, node)]
    record = read_record(paths.up_record)
    row = record.processes.get("gateway") if record else None
    if await _end(WatchedProcess.find(row.identity) if row else None, gateway_seconds):
        names.append("gateway")
    if await _end(_locked(paths.controller_lock), engines_seconds):
        names.append("controller")
    names += await _end_engines(config, paths)
    paths.up_record.unlink(missing_ok=True)
    return Stopped(tuple(names))


async def _end_node(config: Config, node: LocalNode) -> list[str]:
    """What this machine runs as a node of a cluster: first what would start the rest again."""
    names: list[str] = []
    if await _end(_locked(node.lock), _CLUSTER_SECONDS):
        names.append("join")
    for name in ("raylet", "gateway", "controller"):
        owner = node.process(name)
        identity = ProcessIdentity(owner.pid, owner.start_ticks, owner.boot_id) if owner else None
        if await _end(WatchedProcess.find(identity) if identity else None, _CLUSTER_SECONDS):
            names.append(name)
            if name == "raylet" and identity is not None:
                _end_group(identity.pid)
            node.record(name).unlink(missing_ok=True)
    return names + await _end_engines(config, node.paths.engines)


def _end_group(leader: int) -> None:
    """What Ray has left of its servers; what agents start is in groups of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _locked(lock: Path) -> WatchedProcess | None:
    pid = holder(lock)
    identity = ProcessIdentity.of(pid) if pid else None
    return WatchedProcess.find(identity) if identity else None


async def _end(process: WatchedProcess | None, seconds: float) -> bool:
    """Whether there was one."""
    if process is None:
        return False
    process.send(signal.SIGTERM)
    await first_of(asyncio.sleep(seconds), process.wait())
    if not process.ended:
        process.send(signal.SIGKILL)
        await process.wait()
    return True


async def _end_engines(config: Config, paths: StatePaths) -> list[str]:
    """Engines that no controller looks after any more."""
    if not paths.root.exists():
        return []
    journal = Journal(paths)
    launcher = LocalLauncher(paths, journal, dict(os.environ))
    with exclusive(paths.controller_lock, what="controller", remedy="It was started a moment ago; run this again."):
        found = [(entry.replica, launcher.adopt(entry)) for entry in journal.entries()]
        alive = {replica: process for replica, process in found if process is not None}
        await asyncio.gather(*(_end_engine(process, config) for process in alive.values()))
        for replica, _ in found:
            launcher.discard(replica)
    return list(alive)


def _end_engine(process: EngineProcess, config: Config) -> Awaitable[None]:
    entry = process.entry
    probe = Probe(process.endpoint, entry.model, entry.task)
    return end_process(process, probe, config.engine, SystemClock(), serving=entry.ready_at is not None)
