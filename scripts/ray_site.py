"""What the drills with Ray share: a cluster of several nodes on this machine, and what it tells.

The first node is `sliceway up CONFIG --ray` and the others `sliceway node join`, each in a session and a state directory of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import drilling
import psutil
import sentinel
from drilling import DrillFailed, free_port

FIRST = "up"
_STOP_SECONDS = 180.0
_GONE_SECONDS = 30.0
_LOOKING_SHARE = 0.2  # of a core, at most, for looking whether something has come about


class RaySite:
    """The processes of one cluster under `directory`. `names` are its nodes, the first one `up`; each has a gateway."""

    def __init__(self, directory: Path, names: Sequence[str]) -> None:
        self.directory = directory
        self.names = tuple(names)
        self.ports = [free_port() for _ in names]
        self.mark = uuid.uuid4().hex
        self.config = directory / "cluster.yaml"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def root(self, name: str) -> Path:
        """A node's directory. The first one is named after the host."""
        return self.directory / name / "nodes" / (os.uname().nodename if name == FIRST else name)

    # ---- its life

    def sliceway(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """`sliceway ...` in a session of its own, its words in `name`.log."""
        return drilling.sliceway(*words, log=self.directory / f"{name}.log", mark=self.mark)

    def environment(self) -> dict[str, str]:
        """Of what this site starts."""
        return drilling.environment(self.mark)

    async def start(self) -> None:
        """The first node, until it tells the cluster's address."""
        self.processes[FIRST] = self.sliceway(FIRST, "up", str(self.config), "--ray")
        await self.until(lambda: "cluster at " in self.said(FIRST), "a cluster")

    def join(self, name: str, *offers: str) -> None:
        """Another node, with what it offers; returns at once."""
        where = (
            "--state-dir",
            str(self.directory / name),
            "--listen",
            f"127.0.0.1:{self.ports[self.names.index(name)]}",
        )
        self.processes[name] = self.sliceway(name, "node", "join", *self.address, "--name", name, *offers, *where)

    @property
    def address(self) -> tuple[str, ...]:
        """The arguments of a command that names the cluster."""
        told = self.said(FIRST).partition("cluster at ")[2].partition(";")[0]
        return told, "--token-file", str(self.directory / FIRST / "cluster.token")

    def kill(self, name: str) -> None:
        """As if the machine had lost power: everything of that node at once."""
        process = self.processes.pop(name)
        roots = {process.pid}
        for path in [*self.root(name).glob("*.pid.json"), *self.root(name).glob("engines/replicas/*/journal.json")]:
            entry = json.loads(path.read_text(encoding="utf-8"))
            roots |= {int(entry[key]) for key in ("pid", "shim_pid", "engine_pid") if entry.get(key)}
        roots &= set(sentinel.marked(self.mark))  # a journal may name a pid that is somebody else's by now
        doomed = set(roots)
        for pid in roots:  # with their children, of which Ray's agents hide the mark behind their titles
            with contextlib.suppress(psutil.NoSuchProcess):
                doomed |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()

    def end(self) -> list[str]:
        """Stop in order, the first node last. Then kill whatever is left; the commands of those."""
        for name in sorted(self.processes, key=lambda n: n == FIRST):
            self.processes[name].send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[name].wait(_STOP_SECONDS)
        deadline = time.monotonic() + _GONE_SECONDS
        while list(sentinel.marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = [_command(pid) for pid in sentinel.marked(self.mark)]
        sentinel.end_all(self.mark)
        for process in self.processes.values():
            process.wait()
        return left

    # ---- what it tells

    def said(self, name: str) -> str:
        """What a process has written."""
        path = self.directory / f"{name}.log"
        return path.read_text(errors="replace", encoding="utf-8") if path.exists() else ""

    def readyz(self, gateway: int, model: str) -> dict[str, dict[str, str]]:
        """Rows of a model's replicas at a gateway, by name."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[gateway]}/readyz", timeout=5) as answer:
                found = json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                found = json.load(error)
        except (OSError, ValueError):
            return {}
        rows = found.get("models", {}).get(model, {}).get("replicas", [])
        return {row["replica"]: row for row in rows}

    def ready(self, gateway: int, model: str) -> dict[str, str]:
        """Slices of the model's replicas that take requests, by replica."""
        return {name: row["slice"] for name, row in self.readyz(gateway, model).items() if row["state"] == "ready"}

    def engines(self) -> dict[str, int]:
        """The engines' processes, by replica."""
        found = {}
        for path in self.directory.glob("*/nodes/*/engines/replicas/*/journal.json"):
            with contextlib.suppress(OSError, ValueError):
                entry = json.loads(path.read_text(encoding="utf-8"))
                if entry.get("ready_at") and psutil.pid_exists(entry["engine_pid"]):
                    found[entry["replica"]] = entry["engine_pid"]
        return found

    async def until(self, condition: Callable[[], Any], what: str, *, seconds: float = 540.0) -> float:
        """How long it took until `condition`. Raises DrillFailed if that was too long, or a process has ended."""
        began = time.monotonic()
        while True:
            looked = time.monotonic()
            if await asyncio.to_thread(condition):
                return time.monotonic() - began
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise DrillFailed(f"{name} ended with {process.returncode}: {self.said(name)[-3000:]}")
            if time.monotonic() - began > seconds:
                raise DrillFailed(f"not within {seconds:g} s: {what}: {self.said(FIRST)[-3000:]}")
            await asyncio.sleep(max(0.1, (time.monotonic() - looked) / _LOOKING_SHARE))


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended"
    return f"{pid}: {' '.join(words)[:200]}"
