"""What `sliceway up` does: a controller and a gateway kept running beside each other, and stopped in the right order.

Neither is needed for the other to go on, and `up` itself is needed for neither: if it is killed, the next `up` finds both.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import aiohttp
from pydantic import ValidationError

from gateway.config import Config, load_config
from gateway.config_watch import ConfigWatch
from gateway.errors import GatewayError
from gateway.processes import UpRecord, WatchedProcess, read_record, write_record
from model_registry.atomic import write_atomically
from model_registry.errors import ConfigError
from placement.clock import Clock, SystemClock
from placement.errors import StateLocked
from placement.locks import holder
from placement.replicas.backoff import Restarts, after_end
from placement.replicas.ending import first_of
from placement.replicas.procfs import ProcessIdentity
from placement.schema import RestartConfig
from placement.state import StatePaths
from placement.status import ControllerStatus, read_status
from placement.table import ReplicaState

Name = Literal["controller", "gateway"]
NAMES: tuple[Name, ...] = ("controller", "gateway")

_RESTART = RestartConfig(first_delay_seconds=0.5, max_delay_seconds=30, fast_failure_seconds=10, max_fast_failures=4)
_GATEWAY_POLL_SECONDS = 0.25
_CONFIG_POLL_SECONDS = 1.0
# From the end of the drain to SIGKILL; the controller also has its engines to stop.
_LAST_SECONDS = 10.0
_TAIL_LINES = 12
_RENEWAL_SECONDS = 120.0


class ChildFailed(GatewayError):
    """The controller or the gateway could not be kept running."""

    code = "child_failed"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that can be shown. `notices` are lines that appeared since the last snapshot.

    `gateway_generation` is the routing table that the gateway goes by; None while it does not answer.
    """

    status: ControllerStatus | None
    gateway_generation: int | None
    stopping: bool
    notices: tuple[str, ...] = ()

    @property
    def settled(self) -> bool:
        """Whether nothing is about to change by itself: replicas are ready or have failed, and the gateway knows."""
        if self.status is None or self.gateway_generation is None:
            return False
        return self.status.settled and self.gateway_generation >= self.status.generation

    @property
    def ready(self) -> int:
        """Replicas that serve."""
        return sum(r.state is ReplicaState.READY for r in self.status.replicas) if self.status else 0

    @property
    def failed(self) -> int:
        """Replicas that do not run, and will not by themselves."""
        if self.status is None:
            return 0
        return len(self.status.unplaced) + sum(r.state is ReplicaState.FAILED for r in self.status.replicas)


class Front:
    """The controller and the gateway of one configuration."""

    def __init__(
        self,
        config: Config,
        config_path: Path,
        *,
        listen: str | None = None,
        simulate: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._config = config
        self._config_path = config_path.absolute()
        self._listen = listen or config.gateway.listen
        self._simulate = simulate
        self._paths = StatePaths(config.state)
        self._clock = clock or SystemClock()
        self._processes: dict[Name, WatchedProcess] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._renewing: set[Name] = set()
        self._replaced: dict[Name, asyncio.Event] = {name: asyncio.Event() for name in NAMES}
        self._retiring: list[WatchedProcess] = []
        self._notices: deque[str] = deque(maxlen=100)
        self._gateway_generation: int | None = None
        self._was_up = False
        self._stopping = False

    @property
    def url(self) -> str:
        """Where clients reach the gateway from this machine."""
        host, _, port = self._listen.rpartition(":")
        here = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        return f"{self._config.gateway.scheme}://{here}:{port}"

    def begin(self) -> None:
        """Find the processes that run already, and start the others.

        Raises StateLocked if those that run serve another configuration, and AddressInUse before anything is started.
        """
        from gateway.ingress.server import (
            listening_socket,
        )  # the web stack: half a second that only `up` should wait for

        record = read_record(self._paths.up_record)
        found = self._running(record)
        if found and record and (record.config, record.simulate) != (str(self._config_path), self._simulate):
            on = f" on simulated GPUs ({record.simulate})" if record.simulate else ""
            raise StateLocked(
                f"this state directory serves {record.config}{on}",
                where=str(self._paths.root),
                remedy=f"Stop that first: sliceway down {record.config}",
            )
        if "gateway" not in found:
            listening_socket(self._listen).close()
        for name in NAMES:
            if name in found:
                self._notices.append(f"{name} runs already (pid {found[name].identity.pid}); going on with it")
                self._processes[name] = found[name]
                found[name].send(signal.SIGHUP)
            else:
                self._spawn(name)
        self._remember(self._config)
        self._keepers = [asyncio.create_task(self._keep(name)) for name in NAMES]
        self._keepers.append(asyncio.create_task(self._ask_gateway()))
        if self._config.gateway.watch_config:
            self._keepers.append(asyncio.create_task(self._watch_config(ConfigWatch(self._config_path))))
        self._write_record()

    def snapshot(self) -> Snapshot:
        """The state of everything, and what has happened since the last snapshot.

        Raises ChildFailed if one of the two cannot be kept running.
        """
        for keeper in () if self._stopping else self._keepers:
            if keeper.done() and not keeper.cancelled():
                keeper.result()
        notices = tuple(self._notices)
        self._notices.clear()
        return Snapshot(self._status(), self._gateway_generation, self._stopping, notices)

    def reload(self) -> None:
        """Have both read the configuration again. They decide for themselves whether it is good."""
        with contextlib.suppress(ConfigError):
            self._remember(load_config(self._config_path))
        for process in self._processes.values():
            process.send(signal.SIGHUP)

    async def renew(self) -> None:
        """Replace both by new processes, of the program as it is installed by now. Engines run on, and no request fails.

        A new gateway that does not come to serve changes nothing.
        """
        if self._renewing or self._stopping:
            return
        self._renewing = set(NAMES)
        try:
            if await self._renew_gateway():
                await self._renew_controller()
        finally:
            self._renewing.clear()

    async def _renew_gateway(self) -> bool:
        from gateway.ingress.handover import handover_path, serving_pid

        door = handover_path(self._paths.runtime(os.environ), self._listen)
        before, successor = (
            self._processes["gateway"],
            WatchedProcess.spawn([*self._argv("gateway"), "--take-over"], self._paths.log("gateway")),
        )
        deadline = self._clock.monotonic() + _RENEWAL_SECONDS
        while await asyncio.to_thread(serving_pid, door) != successor.identity.pid:
            if successor.ended or self._clock.monotonic() > deadline:
                successor.send(signal.SIGKILL)
                self._notices.append(f"the new gateway did not come to serve{_how(successor)}; the one before goes on")
                return False
            await self._clock.sleep(_GATEWAY_POLL_SECONDS)
        self._retiring = [process for process in (*self._retiring, before) if not process.ended]
        self._put("gateway", successor)
        self._notices.append(f"another gateway serves (pid {successor.identity.pid}); the one before ends by itself")
        return True

    async def _renew_controller(self) -> None:
        """It may be killed at any moment, and the next one finds what runs: that is how it is replaced as well."""
        before = self._processes["controller"]
        before.send(signal.SIGKILL)
        await before.wait()
        successor = WatchedProcess.spawn(self._argv("controller"), self._paths.log("controller"))
        self._put("controller", successor)
        self._notices.append(f"another controller is at work (pid {successor.identity.pid})")

    def _put(self, name: Name, process: WatchedProcess) -> None:
        self._processes[name] = process
        self._replaced[name].set()
        self._write_record()

    async def stop(self) -> None:
        """The gateway first, so that streams end with the engines still there; then the controller, which stops these."""
        self._stopping = True
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        engine, gateway_seconds = self._config.engine, self._config.gateway.drain_timeout_seconds + _LAST_SECONDS
        retiring = [self._end_process(process, "gateway", gateway_seconds) for process in self._retiring]
        await asyncio.gather(self._end("gateway", gateway_seconds), *retiring)
        await self._end("controller", engine.drain_timeout_seconds + engine.stop_timeout_seconds + _LAST_SECONDS)
        self._paths.up_record.unlink(missing_ok=True)

    def hurry(self) -> None:
        """Wait for nothing any more: the controller kills its engines, the gateway drops its streams."""
        for process in self._processes.values():
            process.send(signal.SIGTERM)

    def _running(self, record: UpRecord | None) -> dict[Name, WatchedProcess]:
        identities: dict[Name, ProcessIdentity | None] = {}
        if record:
            identities = {name: row.identity for name in NAMES if (row := record.processes.get(name))}
        controller = holder(self._paths.controller_lock)
        if controller:
            identities["controller"] = ProcessIdentity.of(controller)
        found = {name: WatchedProcess.find(identity) for name, identity in identities.items() if identity}
        return {name: process for name, process in found.items() if process is not None}

    def _spawn(self, name: Name) -> None:
        self._processes[name] = WatchedProcess.spawn(self._argv(name), self._paths.log(name))

    def _argv(self, name: Name) -> list[str]:
        argv = [sys.executable, "-m", "gateway.cli", name, str(self._config_path), "--state-dir", str(self._paths.root)]
        if name == "gateway":
            argv += ["--listen", self._listen]
        elif self._simulate:
            argv += ["--simulate", self._simulate]
        return argv

    def _remember(self, config: Config) -> None:
        write_atomically(self._paths.last_good_config, config.model_dump_json().encode(), mode=0o600)

    def _write_record(self) -> None:
        rows = {name: process.row for name, process in self._processes.items()}
        write_record(
            UpRecord(config=str(self._config_path), listen=self._listen, simulate=self._simulate, processes=dict(rows)),
            self._paths.up_record,
        )

    async def _keep(self, name: Name) -> None:
        """Start it again whenever it ends. Gives up only if nothing has ever served: then the operator looks at it anyway."""
        restarts = Restarts()
        while True:
            process = self._processes[name]
            began = self._clock.monotonic()
            await first_of(process.wait(), self._replaced[name].wait())
            if name in self._renewing:
                await self._until_renewed(name)
            if self._processes[name] is not process:
                self._replaced[name].clear()
                continue
            uptime = self._clock.monotonic() - began
            decision = after_end(restarts, _RESTART, was_ready=True, uptime_seconds=uptime, jitter=random.random())
            restarts = decision.restarts
            if decision.delay_seconds is None and not self._was_up:
                raise self._failure(name, process)
            delay = _RESTART.max_delay_seconds if decision.delay_seconds is None else decision.delay_seconds
            self._notices.append(f"the {name} ended{_how(process)}; starting it again in {delay:.1f} s")
            await self._clock.sleep(delay)
            self._spawn(name)
            self._write_record()

    async def _ask_gateway(self) -> None:
        # Its certificate is for the name that clients use, not for this machine's loopback; nothing secret is sent or believed.
        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                generation = None
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError, ValueError):
                    async with session.get(f"{self.url}/readyz", ssl=False) as response:  # 503 is an answer too
                        generation = int((await response.json())["generation"] or 0)
                self._gateway_generation = generation
                self._was_up = self._was_up or generation is not None
                await self._clock.sleep(_GATEWAY_POLL_SECONDS)

    async def _watch_config(self, watch: ConfigWatch) -> None:
        while True:
            await self._clock.sleep(_CONFIG_POLL_SECONDS)
            if await asyncio.to_thread(watch.poll):
                self._notices.append("the configuration's files have changed; reading them again")
                self.reload()

    async def _until_renewed(self, name: Name) -> None:
        """Whoever replaces it starts the next one."""
        while name in self._renewing and not self._replaced[name].is_set():
            await self._clock.sleep(_GATEWAY_POLL_SECONDS)

    async def _end(self, name: Name, seconds: float) -> None:
        process = self._processes.get(name)
        if process is not None:
            await self._end_process(process, name, seconds)

    async def _end_process(self, process: WatchedProcess, name: Name, seconds: float) -> None:
        process.send(signal.SIGTERM)
        await first_of(self._clock.sleep(seconds), process.wait())
        if not process.ended:
            self._notices.append(f"the {name} did not end within {seconds:.0f} s and is killed")
            process.send(signal.SIGKILL)
            await process.wait()

    def _status(self) -> ControllerStatus | None:
        """The controller's own words, unless they are those of one that has ended."""
        status = read_status(self._paths.controller_status)
        controller = self._processes.get("controller")
        return status if status and controller and status.pid == controller.identity.pid else None

    def _failure(self, name: Name, process: WatchedProcess) -> ChildFailed:
        log = self._paths.log(name)
        return ChildFailed(
            f"the {name} ends as soon as it is started{_how(process)}:\n" + "\n".join(tail(log, _TAIL_LINES)),
            where=str(log),
            remedy="The lines above are its last words; `sliceway doctor CONFIG` looks for common causes.",
        )


def read_last_good(paths: StatePaths) -> Config | None:
    """The last configuration that `up` could read; None if there is none."""
    try:
        return Config.model_validate_json(paths.last_good_config.read_bytes())
    except (OSError, ValidationError):
        return None


def tail(path: Path, lines: int) -> Sequence[str]:
    """The last lines of a log."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 16 * 1024))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return ()


def _how(process: WatchedProcess) -> str:
    status = process.exit_status
    if status is None:
        return ""
    return f" (exit code {status})" if status >= 0 else f" (killed by {signal.Signals(-status).name})"
