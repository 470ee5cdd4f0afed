"""What a request and a relayed event cost the gateway in CPU time, beside a bare relay of the same make.

    .venv/bin/python scripts/relay_cost.py [--rounds 5] [--seconds 4] [--connections 64] [--streams 100]

One simulated engine answers; a client in this process asks it through the gateway (keys, metering, digests and metrics on) and
through a bare relay (an ASGI callable with aiohttp on uvicorn: no keys, no metering, no errors), in turns. Only the CPU time of the
relaying process counts, so that the costs of engine and client do not matter. Compare figures of one run with each
other, and with nothing else: machines differ, and so do their neighbours.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import uvicorn

from gateway.config import load_config
from gateway.keys import Keystore
from gateway.testing import wait_until
from gateway.wiring import serve_gateway, wall_clock

TOKENS = 100
ITL_SECONDS = 0.02


class BareRelay:
    """The least that passes a request on."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI 3."""
        if scope["type"] == "lifespan":
            await receive()
            connector = aiohttp.UnixConnector(self.engine, limit=0)
            self.session = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=None), cookie_jar=aiohttp.DummyCookieJar()
            )
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self.session.close()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        assert self.session is not None
        async with self.session.post(
            f"http://engine{scope['path']}", data=body, headers={"content-type": "application/json"}
        ) as response:
            head = [(b"content-type", response.headers["content-type"].encode())]
            await send({"type": "http.response.start", "status": response.status, "headers": head})
            while data := await response.content.readany():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def serve_bare(engine: str, port: int) -> None:
    """Run the bare relay."""
    uvicorn.run(
        BareRelay(engine),
        host="127.0.0.1",
        port=port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


@dataclass
class Target:
    """A relaying process."""

    name: str
    pid: int
    port: int
    key: str = "none"

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def one_client(target: Target, *, stream: bool, until: float, done: list[int]) -> None:
    """Ask again and again; counts requests and events into `done`. Raises AssertionError on a wrong answer."""
    body = json.dumps(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "a" * 200}],
            "max_tokens": TOKENS if stream else 1,
            "stream": stream,
        }
    ).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {target.key}\r\ncontent-length: {len(body)}\r\n\r\n"
    clock = asyncio.get_running_loop().time
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    while clock() < until:
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        if b"transfer-encoding: chunked" in answer:
            while (size := int(await reader.readline(), 16)) > 0:
                done[1] += (await reader.readexactly(size + 2)).count(b"data: ")
            await reader.readexactly(2)
        else:
            length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)
        done[0] += 1
    writer.close()


async def cost(target: Target, *, stream: bool, clients: int, seconds: float) -> float:
    """CPU microseconds per request, or per event of streams."""
    done = [0, 0]
    until = asyncio.get_running_loop().time() + seconds
    before = target.cpu_seconds()
    await asyncio.gather(*(one_client(target, stream=stream, until=until, done=done) for _ in range(clients)))
    return (target.cpu_seconds() - before) * 1e6 / done[stream]


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this run, ended with it."""
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def answers(port: int) -> bool:
    """Whether somebody listens on `port`."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def targets(directory: Path) -> Iterator[tuple[Target, Target]]:
    """The bare relay and the gateway, in front of one simulated engine."""
    engine, config = directory / "engine.sock", directory / "sliceway.yaml"
    bare, gateway = free_port(), free_port()
    models = [{"name": "m", "endpoints": [f"unix:{engine}"]}]
    config.write_text(
        json.dumps(
            {
                "version": "v1",
                "state_dir": str(directory),
                "models": models,
                "tenants": [{"name": "t"}],
                "gateway": {"listen": f"127.0.0.1:{gateway}"},
            }
        )
    )
    key, _ = Keystore(directory).create("t", now=wall_clock())
    simulated = (
        "-m",
        "placement.fake_engine",
        "--uds",
        str(engine),
        "--model",
        "m",
        "--output-tokens",
        str(TOKENS),
        "--itl-seconds",
        str(ITL_SECONDS),
    )
    me = (sys.executable, __file__)
    with (
        running(sys.executable, *simulated),
        running(*me, "--serve-bare", str(engine), str(bare)) as a,
        running(*me, "--serve-gateway", str(config)) as b,
    ):
        wait_until(lambda: engine.exists() and answers(bare) and answers(gateway), what="engine and relays listen")
        yield Target("bare relay", a.pid, bare), Target("gateway", b.pid, gateway, key)


async def measure(pair: tuple[Target, Target], a: argparse.Namespace) -> None:
    """Take turns, then print medians and their ratio."""
    for title, stream, clients in (
        (f"us CPU per request ({a.connections} connections)", False, a.connections),
        (f"us CPU per event ({a.streams} streams, {ITL_SECONDS * 1000:g} ms apart)", True, a.streams),
    ):
        got: dict[str, list[float]] = {target.name: [] for target in pair}
        for target in pair:  # connections and caches
            await cost(target, stream=stream, clients=clients, seconds=0.5)
        for _ in range(a.rounds):
            for target in pair:
                got[target.name].append(await cost(target, stream=stream, clients=clients, seconds=a.seconds))
        sys.stdout.write(f"{title}\n")
        for name, values in got.items():
            sys.stdout.write(
                f"  {name:12} median {statistics.median(values):7.1f}   lowest {min(values):7.1f}   highest {max(values):7.1f}\n"
            )
        ratio = statistics.median(g / b for b, g in zip(*got.values(), strict=True))
        sys.stdout.write(f"  gateway / bare relay, median of pairs: {ratio:.2f}\n")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--serve-bare", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--serve-gateway", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve_bare:
        serve_bare(a.serve_bare[0], int(a.serve_bare[1]))
    elif a.serve_gateway:
        path = Path(a.serve_gateway)
        serve_gateway(load_config(path), config_path=path)
    else:
        with tempfile.TemporaryDirectory(prefix="sliceway-") as directory, targets(Path(directory)) as pair:
            asyncio.run(measure(pair, a))


if __name__ == "__main__":
    main()
