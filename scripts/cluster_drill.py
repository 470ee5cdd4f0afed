"""Four Ray nodes of eight simulated GPUs on one machine, under load, while things are lost: `python scripts/cluster_drill.py`.

Every node has a gateway, and clients ask all of them all the time while the engines are upgraded one by one, the head is killed,
a GPU is cut anew, and a node is lost with everything on it. Three quarters of the slices have a replica, so that the lost node's
find room on what is left. `--slices-per-gpu 7` are 224 slices and 167 replicas, each with two processes (engine and shim; 32 MB) and
minutes of a small machine's processor for starting them. Fewer slices are the same drill with fewer of them.

Engines belong to one Ray actor of each node: with one of each replica, as is the default, 167 more processes would take 9 GB, two minutes
of a core to start and one and a half cores while nothing happens, and this is one small machine that stands for four. With
`--actors replica` they are there all the same.

What is told is counted by the clients and read from the gateways' own `/readyz`. Exits 1 if a request failed that was not in the
hands of the lost node.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import sentinel
from drilling import Answer, Clients, DrillFailed, Wish, add_steps, guarded, workplace
from ray_site import FIRST, RaySite

from placement.replicas.procfs import proportional_bytes

MODEL = "chat"
SIMULATE = "h100-sxm:8"
GPUS = 8
NODES = ("n1", "n2", "n3")  # beside the first one, which is named after the host
ENGINE = "{python} -m placement.fake_engine --host {host} --port {port} --model {served_name}"
TIMING = "--output-tokens 8 --ttft-seconds 0.05 --itl-seconds 0.01 --shutdown-timeout 30"


@dataclass
class Cost:
    """What the processes of one kind take: memory with each shared page divided among those who have it, and time so far."""

    processes: int = 0
    megabytes: float = 0.0
    cpu_seconds: float = 0.0


@dataclass
class Report:
    """What was counted. Times in seconds."""

    slices: int = 0
    replicas: int = 0
    seconds_to_ready: float = 0.0
    seconds_to_every_gateway: float = 0.0
    seconds_to_upgrade: float = 0.0
    failed_in_upgrade: int = 0
    seconds_to_another_head: float = 0.0
    failed_without_head: int = 0
    seconds_to_cut_anew: float = 0.0
    failed_in_cutting: int = 0
    seconds_to_notice_lost_node: float = 0.0
    seconds_to_replace_lost_node: float = 0.0
    failed_with_lost_node: int = 0
    streams_cut_by_lost_node: int = 0
    changes: int = 0
    seconds_between_gateways_p50: float = 0.0
    seconds_between_gateways_p99: float = 0.0
    requests: int = 0
    failures: list[str] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether only streams that the lost node had begun were lost."""
        return not (
            self.failed_in_upgrade + self.failed_without_head + self.failed_in_cutting + self.failed_with_lost_node
        )


class Cluster(RaySite):
    """Four nodes of eight simulated GPUs."""

    def __init__(self, directory: Path, slices_per_gpu: int, actors: str) -> None:
        super().__init__(directory, (FIRST, *NODES))
        self.actors = actors
        self.per_gpu = slices_per_gpu
        self.slices = len(self.names) * GPUS * slices_per_gpu
        # As many as find room when a node is lost, and a GPU cut anew has one slice less.
        self.replicas = self.slices * 3 // 4 - (slices_per_gpu > 1)
        self.patience_seconds = 240.0 + 10.0 * self.replicas

    def serving(self, gateway: int) -> dict[str, str]:
        """Slices of the replicas that take requests, by replica."""
        return self.ready(gateway, MODEL)

    def write(self, *more: str) -> None:
        """The configuration; engines get these arguments as well. JSON is YAML."""
        content = {
            "version": "v1",
            "state_dir": str(self.directory / "up"),
            "fleet": {"discover": {"simulate": {"h100-sxm": GPUS}}},
            "engine": {"command": [*ENGINE.split(), *TIMING.split(), *more], "transport": "tcp"},
            "cluster": {"actors": self.actors},
            "models": [{"name": MODEL, "source": "simulated", "max_model_len": 4096, "replicas": self.replicas}],
            "gateway": {"authentication": "none", "listen": f"127.0.0.1:{self.ports[0]}"},
        }
        self.config.write_text(json.dumps(content, indent=1), encoding="utf-8")

    async def cut(self, name: str, first: list[str] | None = None) -> None:
        """Have a node's GPUs cut, the first of them as `first` says."""
        root = self.root(name) / "engines"
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        layouts: list[dict[str, Any]] = [{"layout": [f"1g.10gb@{i}" for i in range(self.per_gpu)]}]
        if first is not None:
            layouts.append({"gpus": [0], "layout": first})
        path = self.directory / f"cut-{name}.yaml"
        fleet = {"discover": {"simulate": {"h100-sxm": GPUS}}, "layouts": layouts}
        path.write_text(json.dumps({"version": "v1", "state_dir": str(root), "fleet": fleet}), encoding="utf-8")
        code = await asyncio.to_thread(self.sliceway(f"cut-{name}", "apply", str(path), "--drain").wait, 300)
        if code:
            raise DrillFailed(f"apply exited with {code}: {self.said(f'cut-{name}')[-2000:]}")

    def head(self) -> int | None:
        """The process of this cluster's head."""
        for pid in sentinel.marked(self.mark):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::HeadActor"):
                    return pid
        return None

    def costs(self) -> dict[str, Cost]:
        """What everything here takes, by kind of process."""
        found = {kind: Cost() for kind in (HOLDER, REPLICAS_ACTOR)}  # none of one of them is worth telling, too
        for pid in sentinel.marked(self.mark):
            with contextlib.suppress(OSError, ValueError, IndexError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                times = (
                    Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
                )
                mine = found.setdefault(_kind(words), Cost())
                mine.processes += 1
                mine.megabytes += proportional_bytes([pid]) / 1e6
                mine.cpu_seconds += (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
        return found


HOLDER, REPLICAS_ACTOR = "a node's holder", "a replica's actor"
KINDS = {
    "ray::SliceHolder": HOLDER,
    "ray::ReplicaActor": REPLICAS_ACTOR,
    "ray::": "head, agents, idle workers",
    "shim.py": "shim",
    "placement.fake_engine": "engine",
    "\0controller\0": "controller",
    "\0gateway\0": "gateway",
}


def _kind(command: str) -> str:
    return next((kind for part, kind in KINDS.items() if part in command), "Ray's servers and the commands")


@contextlib.asynccontextmanager
async def asking(cluster: Cluster, each: int) -> AsyncIterator[list[Clients]]:
    """Clients of every gateway."""
    everyone = [Clients(f"http://127.0.0.1:{port}", each, lambda _: Wish(MODEL)) for port in cluster.ports]
    async with contextlib.AsyncExitStack() as stack:
        for clients in everyone:
            await stack.enter_async_context(clients.sending())
        yield everyone


def failed(everyone: list[Clients], since: float) -> list[Answer]:
    """What went wrong after `since`, at gateways that are there."""
    return [a for clients in everyone for a in clients.since(since) if a.problem is not None]


async def drill(cluster: Cluster, report: Report, each: int, steps: Sequence[str]) -> None:
    """Everything that happens: the losses and changes in the order of `steps`."""
    report.slices, report.replicas = cluster.slices, cluster.replicas
    cluster.write()
    for name in ("up", *NODES):
        await cluster.cut(name)
    await bring_up(cluster, report)
    async with watching(cluster.ports) as seen, asking(cluster, each) as everyone:
        await cluster.until(lambda: all(len(c.answers) > 3 * each for c in everyone), "answers of every gateway")
        for name in steps:
            await STEPS[name](cluster, report, everyone)
            sys.stderr.write(f"after {name}: {json.dumps(asdict(report))}\n")
    report.requests = sum(len(clients.answers) for clients in everyone)
    lags = lags_of(seen)
    report.changes = len(lags)
    if len(lags) > 1:
        shares = statistics.quantiles(lags, n=100)
        report.seconds_between_gateways_p50, report.seconds_between_gateways_p99 = shares[49], shares[98]


@contextlib.asynccontextmanager
async def watching(ports: Sequence[int]) -> AsyncIterator[list[dict[int, float]]]:
    """When each gateway had which table for the first time, by its generation; looked at ten times in a second."""
    seen: list[dict[int, float]] = [{} for _ in ports]
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        tasks = [asyncio.create_task(_watch(session, port, known)) for port, known in zip(ports, seen, strict=True)]
        try:
            yield seen
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _watch(session: aiohttp.ClientSession, port: int, known: dict[int, float]) -> None:
    while True:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
            async with session.get(f"http://127.0.0.1:{port}/readyz") as answer:
                known.setdefault((await answer.json())["generation"], time.monotonic())
        await asyncio.sleep(0.1)


def lags_of(seen: Sequence[dict[int, float]]) -> list[float]:
    """For each change of the table, the seconds from the first gateway that had it to the last one. One that was lost counts until then."""
    lags = []
    for generation in sorted({g for known in seen for g in known}):
        times = [min((at for g, at in known.items() if g >= generation), default=None) for known in seen]
        there = [at for at in times if at is not None]
        if len(there) > 1:
            lags.append(max(there) - min(there))
    return lags


async def bring_up(cluster: Cluster, report: Report) -> None:
    """The first node, and then the others, all at once."""
    began = time.monotonic()
    await cluster.start()
    for name in NODES:
        cluster.join(name, "--simulate", SIMULATE)
    await cluster.until(
        lambda: len(cluster.serving(0)) == cluster.replicas,
        f"{cluster.replicas} replicas",
        seconds=cluster.patience_seconds,
    )
    report.seconds_to_ready = time.monotonic() - began
    for gateway in range(len(cluster.ports)):
        await cluster.until(lambda g=gateway: len(cluster.serving(g)) == cluster.replicas, "the same in every gateway")
    report.seconds_to_every_gateway = time.monotonic() - began
    report.costs = cluster.costs()
    sys.stderr.write(f"ready: {json.dumps(asdict(report))}\n")


async def upgrade(cluster: Cluster, report: Report, everyone: list[Clients]) -> None:
    """Another way to start the engines: every one is replaced."""
    before, began = cluster.engines(), time.monotonic()
    cluster.write("--max-model-len", "4096")
    cluster.processes["up"].send_signal(signal.SIGHUP)
    report.seconds_to_upgrade = await cluster.until(
        lambda: len(now := cluster.engines()) == len(before) and not now.items() & before.items(),
        "new engines",
        seconds=cluster.patience_seconds,
    )
    await cluster.until(lambda: len(cluster.serving(0)) == cluster.replicas, "all of them ready")
    note(report, failed(everyone, began), "failed_in_upgrade")


async def lose_head(cluster: Cluster, report: Report, everyone: list[Clients]) -> None:
    """The head's process is killed."""
    before, began = cluster.head(), time.monotonic()
    if before is None:
        raise DrillFailed("there is no head")
    os.kill(before, signal.SIGKILL)
    report.seconds_to_another_head = await cluster.until(lambda: cluster.head() not in (None, before), "another head")
    answered = [len(clients.answers) for clients in everyone]
    await cluster.until(
        lambda: all(len(c.answers) > n + 10 for c, n in zip(everyone, answered, strict=True)), "answers after that"
    )
    note(report, failed(everyone, began), "failed_without_head")


async def cut_anew(cluster: Cluster, report: Report, everyone: list[Clients]) -> None:
    """The first GPU of a node gets a larger slice in the place of what it has."""
    began = time.monotonic()
    await cluster.cut(NODES[1], ["2g.20gb@0", *(f"1g.10gb@{i}" for i in range(2, cluster.per_gpu))])
    await cluster.until(
        lambda: (
            len(cluster.serving(0)) == cluster.replicas
            and any(s.endswith("2g.20gb@0") for s in _known_slices(cluster, NODES[1]))
        ),
        "every replica on the new slices",
    )
    report.seconds_to_cut_anew = time.monotonic() - began
    note(report, failed(everyone, began), "failed_in_cutting")


def _known_slices(cluster: Cluster, node: str) -> list[str]:
    """The node's slices in the first gateway's table, with and without a replica."""
    path = cluster.root("up") / "gateway" / "routing.json"
    with contextlib.suppress(OSError, ValueError):
        table = json.loads(path.read_text(encoding="utf-8"))
        rows = [r["slice"] for r in table["replicas"]] + table["idle"]
        return [row["id"] for row in rows if row["id"].startswith(f"{node}/")]
    return []


async def lose_node(cluster: Cluster, report: Report, everyone: list[Clients]) -> None:
    """A node goes without a word; its clients go elsewhere, as a load balancer sees to."""
    lost = NODES[0]
    gone = {name for name, where in cluster.serving(0).items() if where.startswith(f"{lost}/")}
    if not gone:
        raise DrillFailed(f"no replica was on {lost}")
    everyone[1 + NODES.index(lost)]._stop.set()
    began = time.monotonic()
    cluster.kill(lost)
    report.seconds_to_notice_lost_node = await cluster.until(
        lambda: not any(where.startswith(f"{lost}/") for where in cluster.serving(0).values()), "that it is lost"
    )
    await cluster.until(
        lambda: len(cluster.serving(0)) == cluster.replicas, "its replicas elsewhere", seconds=cluster.patience_seconds
    )
    report.seconds_to_replace_lost_node = time.monotonic() - began
    others = [clients for i, clients in enumerate(everyone) if i != 1 + NODES.index(lost)]
    bad = failed(others, began)
    cut_off = [a for a in bad if a.status == 200 and a.replica in gone]
    report.streams_cut_by_lost_node = len(cut_off)
    note(report, [a for a in bad if a not in cut_off], "failed_with_lost_node")


Step = Callable[[Cluster, Report, list[Clients]], Awaitable[None]]
STEPS: dict[str, Step] = {"upgrade": upgrade, "head": lose_head, "cut": cut_anew, "node": lose_node}


def note(report: Report, bad: list[Answer], name: str) -> None:
    """Count, and keep some words of each."""
    setattr(report, name, len(bad))
    report.failures += [f"{name}: {a.replica}: {a.problem}" for a in bad[:5]]


async def _run(chosen: argparse.Namespace, directory: Path) -> Report:
    cluster, report = Cluster(directory, chosen.slices_per_gpu, chosen.actors), Report()
    with guarded(cluster.mark):
        try:
            await drill(cluster, report, chosen.clients, chosen.steps)
        except DrillFailed:
            report.costs = cluster.costs()
            sys.stderr.write(f"until then: {json.dumps(asdict(report))}\n")
            raise
        finally:
            left = await asyncio.to_thread(cluster.end)
    if left:
        raise DrillFailed(f"these had to be killed: {left}")
    return report


def main() -> int:
    """Run the drill; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slices-per-gpu", type=int, default=7, choices=range(1, 8), help="of 32 GPUs in all")
    parser.add_argument("--clients", type=int, default=4, help="clients of each gateway, one request after another")
    parser.add_argument("--actors", choices=("node", "replica"), default="node", help="what engines belong to")
    add_steps(parser, STEPS, "what is to happen, in this order; all of it")
    chosen = parser.parse_args()
    with workplace(chosen.keep, "cluster-drill-") as directory:
        try:
            report = asyncio.run(_run(chosen, directory))
        except DrillFailed as error:
            sys.stderr.write(f"{error}\n")
            return 1
    shown = asdict(report) | {"ok": report.ok}
    costs = shown.pop("costs")
    lines = [f"{k:30} {v:.1f}" if isinstance(v, float) else f"{k:30} {v}" for k, v in shown.items()]
    lines += [
        f"{kind:30} {c['processes']} processes, {c['megabytes']:.0f} MB, {c['cpu_seconds']:.0f} s of a core until ready"
        for kind, c in costs.items()
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
