"""A fleet of simulated GPUs, planned and served by `sliceway up`, for tests that need every kind of place at once."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SLICEWAY = [sys.executable, "-m", "gateway.cli"]
ENGINE = ["{python}", "-m", "placement.fake_engine", "--uds", "{uds}", "--model", "{served_name}"]
BEHAVIOUR = ["--ttft-seconds", "0.02", "--itl-seconds", "0.002", "--max-concurrency", "4", "--output-tokens", "100000"]
# Both small slices are on one card, because the whole of the other one belongs to `far`.
PROFILES = {"chat": "1g.10gb", "near": "1g.10gb", "far": "7g.80gb"}
READY_SECONDS = 150.0
STOP_SECONDS = 100.0


@dataclass(frozen=True)
class Fleet:
    """A fleet that serves at `url`; `held` is a tenant with one request a minute."""

    directory: Path
    config: Path
    url: str

    def get(self, path: str) -> str:
        """A page of the gateway."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def key(self, tenant: str) -> str:
        """A new key of that tenant."""
        made = subprocess.run(
            [*SLICEWAY, "keys", "create", tenant, str(self.config), "--json"],
            capture_output=True,
            encoding="utf-8",
            check=True,
        )
        return str(json.loads(made.stdout)["key"])

    def ask(self, key: str) -> int:
        """One short streamed answer of `chat`; its status."""
        body = {"model": "chat", "messages": [{"role": "user", "content": "?"}], "max_tokens": 3, "stream": True}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"authorization": f"Bearer {key}", "content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as refused:
            with refused:
                return int(refused.code)

    def ready(self) -> set[str]:
        """The models that have a ready replica; none while nobody answers."""
        try:
            rows = json.loads(self.get("/slices"))
        except OSError:
            return set()
        return {row["model"] for row in rows if row["state"] == "ready"}


def until_seen(key: str, fleet: Fleet, status: int, seconds: float = 60.0) -> None:
    """Ask until the answer is `status`: the gateway takes up a new key within a second."""
    deadline = time.monotonic() + seconds
    while (found := fleet.ask(key)) != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def _configured(directory: Path) -> Fleet:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": "v1",
        "state_dir": str(directory / "state"),
        "fleet": {"discover": {"simulate": {"h100-sxm": 2}}, "partition": "planned"},
        "engine": {"command": ENGINE + BEHAVIOUR, "stop_timeout_seconds": 5, "drain_timeout_seconds": 1},
        "models": [
            {"name": name, "source": "simulated", "replicas": 1, "profile": profile}
            for name, profile in PROFILES.items()
        ],
        "tenants": [
            {"name": "quiet"},
            {"name": "noisy"},
            {"name": "held", "limits": {"requests_per_minute": 1}},
        ],
        "gateway": {"listen": listen, "drain_timeout_seconds": 1},
    }
    path = directory / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return Fleet(directory, path, f"http://{listen}")


@contextmanager
def simulated_fleet(directory: Path) -> Iterator[Fleet]:
    """Two H100s: `chat` and `near` on slices of one, `far` on all of the other. Ready when the block begins."""
    fleet, log = _configured(directory), directory / "up.log"
    with log.open("wb") as file:
        up = subprocess.Popen([*SLICEWAY, "up", str(fleet.config)], stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + READY_SECONDS
        while fleet.ready() != set(PROFILES):
            assert up.poll() is None, log.read_text(encoding="utf-8")
            assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.1)
        yield fleet
    finally:
        up.send_signal(signal.SIGINT)
        up.wait(STOP_SECONDS)
