"""Four Ray nodes of eight simulated GPUs on one machine, under load, while things are lost: `python scripts/cluster_drill.py`.

Every node has a gateway, and clients ask all of them all the time while the engines are upgraded one by one, the head is killed,
a GPU is cut anew, and a node is lost with everything on it. Three quarters of the slices have a replica, so that the lost node's
find room on what is left. `--slices-per-gpu 7` are 224 slices and 168 replicas, each with three processes (engine, shim, holder; about
110 MB): 20 GB, and minutes of a small machine's processor for starting them. Fewer slices are the same drill with fewer of them.

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
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sentinel
from drilling import Answer, Clients, DrillFailed, Wish, free_port

MODEL = "chat"
SIMULATE = "h100-sxm:8"
GPUS = 8
NODES = ("n1", "n2", "n3")  # beside the first one, which is named after the host
ENGINE = "{python} -m placement.fake_engine --host {host} --port {port} --model {served_name}"
TIMING = "--output-tokens 8 --ttft-seconds 0.05 --itl-seconds 0.01 --shutdown-timeout 30"


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
    requests: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether only streams that the lost node had begun were lost."""
        return not (
            self.failed_in_upgrade + self.failed_without_head + self.failed_in_cutting + self.failed_with_lost_node
        )


class Cluster:
    """The processes of one cluster on this machine, and what they tell."""

    def __init__(self, directory: Path, slices_per_gpu: int) -> None:
        self.directory = directory
        self.per_gpu = slices_per_gpu
        self.slices = (len(NODES) + 1) * GPUS * slices_per_gpu
        self.replicas = self.slices * 3 // 4
        self.ports = [free_port() for _ in range(len(NODES) + 1)]
        self.mark = uuid.uuid4().hex
        self.config = directory / "cluster.yaml"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def root(self, name: str) -> Path:
        """A node's directory."""
        return self.directory / name / "nodes" / (os.uname().nodename if name == "up" else name)

    def write(self, *more: str) -> None:
        """The configuration; engines get these arguments as well. JSON is YAML."""
        content = {
            "version": "v1",
            "state_dir": str(self.directory / "up"),
            "fleet": {"discover": {"simulate": {"h100-sxm": GPUS}}},
            "engine": {"command": [*ENGINE.split(), *TIMING.split(), *more], "transport": "tcp"},
            "models": [{"name": MODEL, "source": "simulated", "max_model_len": 4096, "replicas": self.replicas}],
            "gateway": {"authentication": "none", "listen": f"127.0.0.1:{self.ports[0]}"},
        }
        self.config.write_text(json.dumps(content, indent=1))

    def sliceway(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """`sliceway ...` in a session of its own, its words in `name`.log."""
        plain = {k: v for k, v in os.environ.items() if not k.startswith("SLICEWAY_NVML")}
        with (self.directory / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gateway.cli", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=plain | {sentinel.VARIABLE: self.mark},
                start_new_session=True,
            )

    def said(self, name: str) -> str:
        """What a process has written."""
        path = self.directory / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def cut(self, name: str, first: list[str] | None = None) -> None:
        """Have a node's GPUs cut, the first of them as `first` says."""
        root = self.root(name) / "engines"
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        layouts: list[dict[str, Any]] = [{"layout": [f"1g.10gb@{i}" for i in range(self.per_gpu)]}]
        if first is not None:
            layouts.append({"gpus": [0], "layout": first})
        path = self.directory / f"cut-{name}.yaml"
        fleet = {"discover": {"simulate": {"h100-sxm": GPUS}}, "layouts": layouts}
        path.write_text(json.dumps({"version": "v1", "state_dir": str(root), "fleet": fleet}))
        code = await asyncio.to_thread(self.sliceway(f"cut-{name}", "apply", str(path), "--drain").wait, 300)
        if code:
            raise DrillFailed(f"apply exited with {code}: {self.said(f'cut-{name}')[-2000:]}")

    def readyz(self, gateway: int) -> dict[str, dict[str, str]]:
        """Rows of a gateway's replicas, by name."""
        url = f"http://127.0.0.1:{self.ports[gateway]}/readyz"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                found = json.load(error)
        except OSError:
            return {}
        rows = found.get("models", {}).get(MODEL, {}).get("replicas", [])
        return {row["replica"]: row for row in rows}

    def ready(self, gateway: int) -> dict[str, str]:
        """Slices of the replicas that take requests, by replica."""
        return {name: row["slice"] for name, row in self.readyz(gateway).items() if row["state"] == "ready"}

    def engines(self) -> dict[str, int]:
        """The engines' processes, by replica."""
        found = {}
        for path in self.directory.glob("*/nodes/*/engines/replicas/*/journal.json"):
            with contextlib.suppress(OSError, ValueError):
                entry = json.loads(path.read_text())
                if entry.get("ready_at") and psutil.pid_exists(entry["engine_pid"]):
                    found[entry["replica"]] = entry["engine_pid"]
        return found

    def head(self) -> int | None:
        """The process of this cluster's head."""
        for pid in sentinel.marked(self.mark):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::HeadActor"):
                    return pid
        return None

    async def until(self, condition: Callable[[], Any], what: str, *, seconds: float = 540.0) -> float:
        """How long it took until `condition`. Raises DrillFailed if that was too long, or a process has ended."""
        began = time.monotonic()
        while not await asyncio.to_thread(condition):
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise DrillFailed(f"{name} ended with {process.returncode}: {self.said(name)[-3000:]}")
            if time.monotonic() - began > seconds:
                raise DrillFailed(f"not within {seconds:g} s: {what}: {self.said('up')[-3000:]}")
            await asyncio.sleep(0.1)
        return time.monotonic() - began

    def kill(self, name: str) -> None:
        """As if the machine had lost power: everything of that node at once."""
        process = self.processes.pop(name)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        pids = {p.pid for p in family}
        for path in [*self.root(name).glob("*.pid.json"), *self.root(name).glob("engines/replicas/*/journal.json")]:
            entry = json.loads(path.read_text())
            pids |= {int(entry[key]) for key in ("pid", "shim_pid", "engine_pid") if entry.get(key)}
        for pid in pids & set(sentinel.marked(self.mark)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def end(self) -> None:
        """Stop in order, the members first; then whatever is left."""
        for process in reversed(list(self.processes.values())):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(180)
        for pid in sentinel.marked(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.processes.values():
            process.wait()


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


async def drill(cluster: Cluster, report: Report, each: int) -> None:
    """Everything that happens, in order."""
    report.slices, report.replicas = cluster.slices, cluster.replicas
    cluster.write()
    for name in ("up", *NODES):
        await cluster.cut(name)
    await bring_up(cluster, report)
    async with asking(cluster, each) as everyone:
        await cluster.until(lambda: all(len(c.answers) > 3 * each for c in everyone), "answers of every gateway")
        await upgrade(cluster, report, everyone)
        await lose_head(cluster, report, everyone)
        await cut_anew(cluster, report, everyone)
        await lose_node(cluster, report, everyone)
    report.requests = sum(len(clients.answers) for clients in everyone)


async def bring_up(cluster: Cluster, report: Report) -> None:
    """The first node, and then the others, all at once."""
    began = time.monotonic()
    cluster.processes["up"] = cluster.sliceway("up", "up", str(cluster.config), "--ray")
    await cluster.until(lambda: "cluster at " in cluster.said("up"), "a cluster")
    address = cluster.said("up").partition("cluster at ")[2].partition(";")[0]
    token = str(cluster.directory / "up" / "cluster.token")
    for name, port in zip(NODES, cluster.ports[1:], strict=True):
        where = ("--state-dir", str(cluster.directory / name), "--listen", f"127.0.0.1:{port}")
        words = ("node", "join", address, "--token-file", token, "--name", name, "--simulate", SIMULATE, *where)
        cluster.processes[name] = cluster.sliceway(name, *words)
    await cluster.until(lambda: len(cluster.ready(0)) == cluster.replicas, f"{cluster.replicas} replicas")
    report.seconds_to_ready = time.monotonic() - began
    for gateway in range(len(cluster.ports)):
        await cluster.until(lambda g=gateway: len(cluster.ready(g)) == cluster.replicas, "the same in every gateway")
    report.seconds_to_every_gateway = time.monotonic() - began


async def upgrade(cluster: Cluster, report: Report, everyone: list[Clients]) -> None:
    """Another way to start the engines: every one is replaced."""
    before, began = cluster.engines(), time.monotonic()
    cluster.write("--max-model-len", "4096")
    cluster.processes["up"].send_signal(signal.SIGHUP)
    report.seconds_to_upgrade = await cluster.until(
        lambda: len(now := cluster.engines()) == len(before) and not now.items() & before.items(), "new engines"
    )
    await cluster.until(lambda: len(cluster.ready(0)) == cluster.replicas, "all of them ready")
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
            len(cluster.ready(0)) == cluster.replicas
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
        table = json.loads(path.read_text())
        rows = [r["slice"] for r in table["replicas"]] + table["idle"]
        return [row["id"] for row in rows if row["id"].startswith(f"{node}/")]
    return []


async def lose_node(cluster: Cluster, report: Report, everyone: list[Clients]) -> None:
    """A node goes without a word; its clients go elsewhere, as a load balancer sees to."""
    lost = NODES[0]
    gone = {name for name, where in cluster.ready(0).items() if where.startswith(f"{lost}/")}
    if not gone:
        raise DrillFailed(f"no replica was on {lost}")
    everyone[1 + NODES.index(lost)]._stop.set()
    began = time.monotonic()
    cluster.kill(lost)
    report.seconds_to_notice_lost_node = await cluster.until(
        lambda: not any(where.startswith(f"{lost}/") for where in cluster.ready(0).values()), "that it is lost"
    )
    await cluster.until(lambda: len(cluster.ready(0)) == cluster.replicas, "its replicas elsewhere")
    report.seconds_to_replace_lost_node = time.monotonic() - began
    others = [clients for i, clients in enumerate(everyone) if i != 1 + NODES.index(lost)]
    bad = failed(others, began)
    cut_off = [a for a in bad if a.status == 200 and a.replica in gone]
    report.streams_cut_by_lost_node = len(cut_off)
    note(report, [a for a in bad if a not in cut_off], "failed_with_lost_node")


def note(report: Report, bad: list[Answer], name: str) -> None:
    """Count, and keep some words of each."""
    setattr(report, name, len(bad))
    report.failures += [f"{name}: {a.replica}: {a.problem}" for a in bad[:5]]


async def _run(chosen: argparse.Namespace, directory: Path) -> Report:
    cluster, report = Cluster(directory, chosen.slices_per_gpu), Report()
    try:
        await drill(cluster, report, chosen.clients)
    except DrillFailed:
        sys.stderr.write(f"until then: {json.dumps(asdict(report))}\n")
        raise
    finally:
        await asyncio.to_thread(cluster.end)
    return report


def main() -> int:
    """Run the drill; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slices-per-gpu", type=int, default=7, choices=range(1, 8), help="of 32 GPUs in all")
    parser.add_argument("--clients", type=int, default=4, help="clients of each gateway, one request after another")
    parser.add_argument("--keep", type=Path, help="a directory for logs and state, which stays")
    chosen = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if chosen.keep:
            chosen.keep.mkdir(parents=True)
        directory = chosen.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cluster-drill-")))
        try:
            report = asyncio.run(_run(chosen, directory.absolute()))
        except DrillFailed as error:
            sys.stderr.write(f"{error}\n")
            return 1
    shown = asdict(report) | {"ok": report.ok}
    sys.stdout.write("\n".join(f"{k:30} {v:.1f}" if isinstance(v, float) else f"{k:30} {v}" for k, v in shown.items()))
    sys.stdout.write("\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
