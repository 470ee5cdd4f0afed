"""The same gateway as a process and behind Ray Serve's proxy, under the same load: `python scripts/serve_ingress.py`.

Both stand before the same compiled engine, which streams an event every 10 ms. The compiled client keeps so many requests running
and tells the time to the first event and to the last. What Serve adds is the difference.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gateway.overhead.tools import Closed, Tools, free_port, request
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow, publish


def configuration(directory: Path, name: str, port: int) -> Path:
    """One gateway's, with a state directory of its own."""
    path = directory / f"{name}.yaml"
    content = {
        "version": "v1",
        "state_dir": str(directory / name),
        "models": [{"name": "bench", "source": "simulated"}],
        "gateway": {"authentication": "none", "listen": f"127.0.0.1:{port}"},
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def table(engine: int) -> RoutingTable:
    """One engine, on this port."""
    row = ReplicaRow(
        replica="bench-0",
        model="bench",
        engine_model="bench",
        endpoint=f"http://127.0.0.1:{engine}",
        slice=SliceRow(id="cpu-0", kind="cpu"),
        state=ReplicaState.READY,
    )
    return RoutingTable(generation=1, models=(ModelRow(name="bench", task="generate"),), replicas=(row,))


@contextlib.contextmanager
def as_process(config: Path, port: int) -> Iterator[int]:
    """`sliceway gateway`."""
    command = [sys.executable, "-m", "gateway.cli", "gateway", str(config)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until_ready(port)
            yield port
        finally:
            process.terminate()


@contextlib.contextmanager
def behind_serve(config: Path, port: int) -> Iterator[int]:
    """Ray and Serve on this machine, with the gateway as a deployment."""
    import ray
    from ray import serve

    from gateway.serve_ingress import application

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        options: dict[str, Any] = {"host": "127.0.0.1", "port": port}
        serve.start(http_options=options)
        serve.run(application({"config": str(config)}))
        until_ready(port)
        yield port
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()


def until_ready(port: int, seconds: float = 180.0) -> None:
    """Return when `/readyz` is 200. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing is ready on port {port}")


def say(name: str, connections: int, found: Closed) -> None:
    """One row."""
    sys.stdout.write(
        f"{name:22} {connections:>5} {found.requests / found.seconds:>9.1f} {found.events / found.seconds:>9.0f} "
        f"{found.first_p50_us / 1e3:>9.1f} {found.first_p99_us / 1e3:>9.1f} {found.whole_p50_us / 1e3:>9.1f} {found.errors:>7}\n"
    )
    sys.stdout.flush()


def main() -> int:
    """Measure both; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tokens", type=int, default=32)
    chosen = parser.parse_args()
    sys.stdout.write(
        f"{'':22} {'conns':>5} {'req/s':>9} {'events/s':>9} {'ttft p50':>9} {'ttft p99':>9} {'whole p50':>9} {'errors':>7}\n"
    )
    with tempfile.TemporaryDirectory(prefix="serve-ingress-") as name:
        directory = Path(name)
        tools = Tools.compiled(directory)
        with tools.engine(event_seconds=0.01) as engine:
            for what, start in (("a process", as_process), ("behind Ray Serve", behind_serve)):
                port = free_port()
                config = configuration(directory, what.replace(" ", "-"), port)
                state = directory / what.replace(" ", "-")
                state.mkdir(mode=0o700)
                publish(table(engine), state / "routing.json")
                with start(config, port):
                    asked = request(port, stream=True, tokens=chosen.tokens)
                    tools.closed(port, asked, connections=4, seconds=2.0)
                    for connections in chosen.connections:
                        say(
                            what,
                            connections,
                            tools.closed(port, asked, connections=connections, seconds=chosen.seconds),
                        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
