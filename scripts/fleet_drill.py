"""A simulated fleet under load while things happen to it: `python scripts/fleet_drill.py --gpus 8`.

`sliceway up --simulate h100-sxm:N` cuts N GPUs into seven slices each, with an engine on every one that answers nothing
true. While clients send requests all the time, one engine is killed, one replica is drained, stopped and started, and two
GPUs are cut anew by `sliceway apply --drain`. What is told at the end is counted, not assumed: replicas pinned to slices of
their own, requests that failed (and on which replica), engines of kept slices that are still the same processes.

Exits 1 if a request failed that was not in the killed engine's hands, or if anything is not where it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from placement.replicas.procfs import proportional_bytes, resident_bytes
from placement.state import StatePaths
from placement.status import ControllerStatus, ReplicaStatus, read_status
from placement.table import ReplicaState

SLICES = 7
_AFTER_FAILURE_SECONDS = 0.1
MODEL = "chat"
ENGINE = "{python} -m placement.fake_engine --uds {uds} --model {served_name} --max-model-len {max_model_len}"
TIMING = "--output-tokens 8 --ttft-seconds 0.05 --itl-seconds 0.01"
CUT = [f"1g.10gb@{i}" for i in range(SLICES)]
CUT_ANEW = ["1g.10gb@0", "1g.10gb@1", "1g.10gb@2", "1g.10gb@3", "3g.40gb@4"]


class DrillFailed(Exception):
    """Something did not come about; the message holds what was seen last."""


@dataclass
class Report:
    """What the drill counted. Times in seconds, memory in bytes."""

    gpus: int
    replicas: int = 0
    seconds_to_all_ready: float = 0.0
    engine_resident_bytes: int = 0
    engine_proportional_bytes: int = 0
    pinned: int = 0
    proven: int = 0
    requests: int = 0
    failed: int = 0
    failed_on_killed: int = 0
    failures: list[str] = field(default_factory=list)
    replicas_used: int = 0
    seconds_to_replace_killed: float = 0.0
    requests_while_drained: int = 0
    seconds_to_cut_two_gpus: float = 0.0
    kept_engines: int = 0
    kept_engines_replaced: int = 0
    replicas_after: int = 0

    @property
    def ok(self) -> bool:
        """Whether only what was killed was lost."""
        return (
            self.failed == self.failed_on_killed
            and self.pinned == self.proven == self.replicas
            and not (self.requests_while_drained or self.kept_engines_replaced)
        )


@dataclass(frozen=True)
class Answer:
    """One request's end."""

    at: float
    replica: str | None
    problem: str | None


class Fleet:
    """The configuration, the processes that serve it, and what the controller tells of them."""

    def __init__(self, directory: Path, gpus: int) -> None:
        self.paths = StatePaths(directory / "state")
        self.config = directory / "fleet.yaml"
        self.log = directory / "up.log"
        self.simulate = f"h100-sxm:{gpus}"
        self.port = _free_port()
        self.gpus = gpus
        self.up: subprocess.Popen[bytes] | None = None

    def write(self, *anew: int) -> int:
        """A configuration with the GPUs `anew` cut otherwise. Returns how many replicas it has."""
        layouts: list[dict[str, Any]] = [{"layout": CUT}]
        if anew:
            layouts.append({"gpus": list(anew), "layout": CUT_ANEW})
        replicas = SLICES * self.gpus - (len(CUT) - len(CUT_ANEW)) * len(anew)
        content = {
            "version": "v1",
            "state_dir": str(self.paths.root),
            "fleet": {"layouts": layouts},
            "engine": {"command": [*ENGINE.split(), *TIMING.split()], "drain_timeout_seconds": 30},
            "models": [{"name": MODEL, "source": "simulated", "max_model_len": 4096, "replicas": replicas}],
            "gateway": {"authentication": "none", "listen": f"127.0.0.1:{self.port}"},
        }
        self.config.write_text(json.dumps(content))  # JSON is YAML
        return replicas

    def sliceway(self, *words: str) -> subprocess.Popen[bytes]:
        """`sliceway ...`, its words appended to the log."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLICEWAY_NVML")}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gateway.cli", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    async def run(self, *words: str) -> None:
        """`sliceway ...` to its end. Raises DrillFailed if it does not end well."""
        process = self.sliceway(*words)
        code = await asyncio.to_thread(process.wait, 300)
        if code:
            raise DrillFailed(f"sliceway {' '.join(words)} exited with {code}:\n{self.said()}")

    def said(self) -> str:
        """The end of what everything has written."""
        texts = [self.log, *sorted(self.paths.logs.glob("c*.log"))[-3:]]
        return "\n".join(f"== {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in texts if p.exists())

    def status(self) -> ControllerStatus | None:
        """What the controller tells."""
        return read_status(self.paths.controller_status)

    def ready(self) -> dict[str, ReplicaStatus]:
        """Replicas that serve, by name."""
        status = self.status()
        return {r.replica: r for r in (status.replicas if status else ()) if r.state is ReplicaState.READY}

    def engines(self) -> dict[tuple[str, str], int | None]:
        """The process of each replica that serves, by replica and slice."""
        return {(r.replica, r.slice.id): r.engine_pid for r in self.ready().values()}

    def users(self) -> Counter[str]:
        """How many processes the simulated driver shows on each slice."""
        done = subprocess.run(
            [sys.executable, "-m", "gateway.cli", "slices", str(self.config), "--simulate", self.simulate, "--json"],
            capture_output=True,
            text=True,
            check=True,
        )
        return Counter({one["id"]: len(one["users"]) for one in json.loads(done.stdout)["slices"]})


async def until(condition: Callable[[], Any], what: str, fleet: Fleet, *, seconds: float = 300.0) -> float:
    """Wait for `condition`. Returns how long it took; raises DrillFailed if it took too long, or `up` has ended."""
    began = time.monotonic()
    while not condition():
        if fleet.up is not None and fleet.up.poll() is not None:
            raise DrillFailed(f"up ended with {fleet.up.returncode}:\n{fleet.said()}")
        if time.monotonic() - began > seconds:
            raise DrillFailed(f"not within {seconds:g} s: {what}\n{fleet.said()}")
        await asyncio.sleep(0.05)
    return time.monotonic() - began


class Clients:
    """Clients that send one request after another, every second one streamed, until they are told to stop."""

    def __init__(self, url: str, count: int) -> None:
        self._url = url
        self._count = count
        self._stop = asyncio.Event()
        self.answers: list[Answer] = []

    @contextlib.asynccontextmanager
    async def sending(self) -> AsyncIterator[None]:
        """For as long as the block runs."""
        timeout = aiohttp.ClientTimeout(total=60)
        connector = aiohttp.TCPConnector(limit=self._count)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            tasks = [asyncio.create_task(self._client(session, i)) for i in range(self._count)]
            try:
                yield
            finally:
                self._stop.set()
                await asyncio.gather(*tasks)

    async def more(self, count: int, fleet: Fleet) -> None:
        """Wait until so many more requests have been answered."""
        wanted = len(self.answers) + count
        await until(lambda: len(self.answers) >= wanted, f"{count} more answers", fleet)

    def since(self, at: float) -> list[Answer]:
        """What was answered after `at`."""
        return [a for a in self.answers if a.at > at]

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        turn = number
        while not self._stop.is_set():
            turn += 1
            answer = await self._ask(session, f"{number}-{turn} once upon a time", stream=turn % 2 == 0)
            self.answers.append(answer)
            if answer.problem is not None:
                await asyncio.sleep(_AFTER_FAILURE_SECONDS)

    async def _ask(self, session: aiohttp.ClientSession, words: str, *, stream: bool) -> Answer:
        """No two ask the same, or all would be sent to where the first one's prefix is cached."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": words}], "stream": stream}
        replica = None
        try:
            async with session.post(f"{self._url}/v1/chat/completions", json=body) as response:
                replica = response.headers.get("x-sliceway-replica")
                text = await response.text()
                whole = response.status == 200 and ("data: [DONE]" in text if stream else "choices" in text)
                problem = None if whole and '"error"' not in text else f"{response.status}: {text[-200:]}"
        except (aiohttp.ClientError, TimeoutError) as error:
            problem = repr(error)
        return Answer(time.monotonic(), replica, problem)


async def drill(fleet: Fleet, clients: Clients, report: Report) -> None:
    """Everything that happens, in order, with the clients sending all along."""
    wanted = fleet.write()
    fleet.up = fleet.sliceway("up", str(fleet.config), "--simulate", fleet.simulate)
    try:
        report.seconds_to_all_ready = await until(
            lambda: len(fleet.ready()) == wanted, f"{wanted} replicas ready", fleet
        )
        await _look(fleet, report)
        async with clients.sending():
            await clients.more(20 + 2 * wanted, fleet)
            report.replicas_used = len({a.replica for a in clients.answers})
            killed = await _kill_one(fleet, clients, report)
            await _drain_one(fleet, clients, report)
            await _cut_anew(fleet, clients, report)
        _count(clients, killed, report)
    finally:
        fleet.up.send_signal(signal.SIGINT)
        await asyncio.to_thread(fleet.up.wait, 120)


async def _look(fleet: Fleet, report: Report) -> None:
    """Is every replica on a slice of its own, by the driver's word and by the proof?"""
    ready = fleet.ready()
    report.replicas = len(ready)
    users = await asyncio.to_thread(fleet.users)
    taken = Counter(r.slice.id for r in ready.values())
    report.pinned = sum(taken[r.slice.id] == 1 and users[r.slice.id] == 1 for r in ready.values())
    report.proven = sum(_proven(r) for r in ready.values())
    pids = [r.engine_pid for r in ready.values() if r.engine_pid]
    report.engine_resident_bytes = resident_bytes(pids) // len(pids)
    report.engine_proportional_bytes = proportional_bytes(pids) // len(pids)


def _proven(row: ReplicaStatus) -> bool:
    """On its slice, and with the context length that it was started with."""
    found = {(f["check"], f["verdict"]) for f in (row.placement or {}).get("findings", ())}
    return (
        {("processes", "proven"), ("limits", "proven")} <= found and row.placement is not None and row.placement["ok"]
    )


async def _kill_one(fleet: Fleet, clients: Clients, report: Report) -> str:
    victim = next(iter(fleet.ready().values()))
    if victim.engine_pid is None:
        raise DrillFailed(f"{victim.replica} is ready and has no process")
    os.kill(victim.engine_pid, signal.SIGKILL)

    def replaced() -> bool:
        now = fleet.ready().get(victim.replica)
        return now is not None and now.engine_pid != victim.engine_pid

    report.seconds_to_replace_killed = await until(replaced, "another engine in the place of the killed one", fleet)
    await clients.more(2 * report.replicas, fleet)
    return victim.replica


async def _drain_one(fleet: Fleet, clients: Clients, report: Report) -> None:
    name = sorted(fleet.ready())[-1]
    for verb in ("drain", "stop"):
        await fleet.run("replica", verb, name, "--config", str(fleet.config))
        gone = time.monotonic()
        await clients.more(report.replicas, fleet)
        report.requests_while_drained += sum(a.replica == name for a in clients.since(gone))
    await fleet.run("replica", "start", name, "--config", str(fleet.config))
    await clients.more(report.replicas, fleet)


async def _cut_anew(fleet: Fleet, clients: Clients, report: Report) -> None:
    anew = (fleet.gpus - 2, fleet.gpus - 1)
    before = fleet.engines()
    wanted = fleet.write(*anew)
    began = time.monotonic()
    await fleet.run("apply", str(fleet.config), "--drain", "--simulate", fleet.simulate)
    await until(lambda: len(fleet.ready()) == wanted, f"{wanted} replicas on the new slices", fleet)
    report.seconds_to_cut_two_gpus = time.monotonic() - began
    after = fleet.engines()
    kept = before.keys() & after.keys()
    report.kept_engines = len(kept)
    report.kept_engines_replaced = sum(before[one] != after[one] for one in kept)
    report.replicas_after = len(after)
    await clients.more(2 * wanted, fleet)


def _count(clients: Clients, killed: str, report: Report) -> None:
    report.requests = len(clients.answers)
    bad = [a for a in clients.answers if a.problem is not None]
    report.failed = len(bad)
    report.failed_on_killed = sum(a.replica == killed for a in bad)
    report.failures = [f"{a.replica}: {a.problem}" for a in bad][:10]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _run(gpus: int, clients: int, directory: Path) -> Report:
    fleet, report = Fleet(directory, gpus), Report(gpus)
    await drill(fleet, Clients(f"http://127.0.0.1:{fleet.port}", clients), report)
    return report


def main() -> int:
    """Run the drill; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=8, help="simulated H100s, at least 2; seven replicas on each")
    parser.add_argument("--clients", type=int, default=16, help="clients that send one request after another")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    chosen = parser.parse_args()
    if chosen.gpus < 2:
        parser.error("two GPUs are cut anew, so there must be two")
    with tempfile.TemporaryDirectory(prefix="fleet-drill-") as directory:
        try:
            report = asyncio.run(_run(chosen.gpus, chosen.clients, Path(directory)))
        except DrillFailed as error:
            print(error, file=sys.stderr)  # noqa: T201
            return 1
    shown = asdict(report) | {"ok": report.ok}
    lines = json.dumps(shown, indent=1) if chosen.json else "\n".join(f"{k:28} {v}" for k, v in shown.items())
    print(lines)  # noqa: T201
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
