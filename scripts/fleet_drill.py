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
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drilling import ENGINE, Clients, DrillFailed, Site, Wish, until

from placement.replicas.procfs import proportional_bytes, resident_bytes
from placement.status import ReplicaStatus

SLICES = 7
MODEL = "chat"
TIMING = "--output-tokens 8 --ttft-seconds 0.05 --itl-seconds 0.01"
CUT = [f"1g.10gb@{i}" for i in range(SLICES)]
CUT_ANEW = ["1g.10gb@0", "1g.10gb@1", "1g.10gb@2", "1g.10gb@3", "3g.40gb@4"]


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


class Fleet(Site):
    """GPUs that the configuration cuts into seven slices each, and some of them otherwise later."""

    def __init__(self, directory: Path, gpus: int) -> None:
        super().__init__(directory, simulate=f"h100-sxm:{gpus}")
        self.gpus = gpus

    def cut(self, *anew: int) -> int:
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
        self.write(content)
        return replicas


async def drill(fleet: Fleet, clients: Clients, report: Report) -> None:
    """Everything that happens, in order, with the clients sending all along."""
    wanted = fleet.cut()
    with fleet.guarded():
        await fleet.start()
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
        await fleet.stop()


async def _look(fleet: Fleet, report: Report) -> None:
    """Is every replica on a slice of its own, by the driver's word and by the proof?"""
    ready = fleet.ready()
    report.replicas = len(ready)
    users = Counter({one["id"]: len(one["users"]) for one in await fleet.slices()})
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
    wanted = fleet.cut(*anew)
    began = time.monotonic()
    await fleet.run("apply", str(fleet.config), "--drain", *fleet.simulated)
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


async def _run(gpus: int, clients: int, directory: Path) -> Report:
    fleet, report = Fleet(directory, gpus), Report(gpus)
    await drill(fleet, Clients(fleet.url, clients, lambda _: Wish(MODEL)), report)
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
