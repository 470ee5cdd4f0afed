"""What one tenant can do to another inside the gateway alone: TTFT and ITL of a victim, alone and beside an aggressor, in turns.

    .venv/bin/python scripts/gateway_isolation.py --tools DIR [--rounds 4] [--seconds 8] [--rate 20] [--only KIND]

DIR holds `upstream.c`, an engine that costs next to nothing and is never full, so that only the gateway is measured. The
aggressor is a process of its own at the lowest priority, since client and gateway would be on different machines; it still shares
this one's caches and network stack. Kinds: `flood` asks 20 times as often as its limit lets it, `idle` opens 1,000
connections and says nothing, `bodies` sends 50 MB bodies, `slow` reads 64 streams a byte per second each, `cancel` leaves as
soon as its stream has begun.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import uvloop

from gateway.config import load_config
from gateway.keys import Keystore
from gateway.overhead import Target, Timing, arrivals, run_pairs
from gateway.overhead.pairs import quantile
from gateway.testing import wait_until
from gateway.wiring import serve_gateway, wall_clock

KINDS = ("flood", "idle", "bodies", "slow", "cancel")
PATH = "/v1/chat/completions"
EVENTS, EVENT_MICROSECONDS = 20, 10_000
LIMIT_PER_MINUTE = 600
RESAMPLES = 400


def stream_body(events: int = EVENTS) -> bytes:
    """A streamed request."""
    message = {"role": "user", "content": "word " * 40}
    return (
        json.dumps({"model": "bench", "messages": [message], "max_tokens": events, "stream": True})
        .encode()
        .replace(b'"stream": true', b'"stream":true')
    )


# ---- the aggressor's process


def head(key: str, length: int) -> bytes:
    """A request's head."""
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


async def flooder(port: int, key: str, number: int) -> None:
    """Ask 20 times as often as the limit allows, over ten connections."""
    body = stream_body()
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            while True:
                writer.write(head(key, len(body)) + body)
                answer = await reader.readuntil(b"\r\n\r\n")
                if b"chunked" in answer:
                    while (size := int(await reader.readline(), 16)) > 0:
                        await reader.readexactly(size + 2)
                    await reader.readexactly(2)
                else:
                    await reader.readexactly(int(answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]))
                await asyncio.sleep(10 * 60 / (20 * LIMIT_PER_MINUTE))
        writer.close()


async def idler(port: int, key: str, number: int) -> None:
    """A connection that says nothing; opened again when it is closed."""
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.read()
        writer.close()


async def heavy(port: int, key: str, number: int) -> None:
    """50 MB bodies, one after another."""
    part = b"x" * 2**16
    while True:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(OSError):
            writer.write(head(key, 50_000_000))
            for _ in range(50_000_000 // len(part)):
                writer.write(part)
                await writer.drain()
        writer.close()


async def slow(port: int, key: str, number: int) -> None:
    """A stream that is read a byte per second."""
    body = stream_body()
    while True:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", port))
        await loop.sock_sendall(sock, head(key, len(body)) + body)
        with contextlib.suppress(OSError):
            while await loop.sock_recv(sock, 1):  # noqa: ASYNC110  # a pace, no condition
                await asyncio.sleep(1)
        sock.close()


async def canceller(port: int, key: str, number: int) -> None:
    """A stream that is left when it has begun."""
    body = stream_body()
    while True:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head(key, len(body)) + body)
        with contextlib.suppress(OSError):
            await reader.read(1)
        writer.transport.abort()
        await asyncio.sleep(0.05)


AGGRESSORS = {
    "flood": (flooder, 10),
    "idle": (idler, 1000),
    "bodies": (heavy, 4),
    "slow": (slow, 64),
    "cancel": (canceller, 32),
}


def aggress(kind: str, port: int, key: str) -> None:
    """Run until killed."""
    os.nice(19)
    one, count = AGGRESSORS[kind]

    async def all_of_them() -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(count):
                tasks.create_task(one(port, key, number))

    uvloop.run(all_of_them())


# ---- the measurement


@contextlib.contextmanager
def running(log: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this run, ended with it."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
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


def configured(directory: Path, engine: int, port: int, relay: str) -> tuple[Path, dict[str, str]]:
    """A configuration with two tenants, and their keys."""
    path = directory / "sliceway.yaml"
    neighbour = {"name": "neighbour", "limits": {"requests_per_minute": LIMIT_PER_MINUTE}}
    path.write_text(
        json.dumps(
            {
                "version": "v1",
                "state_dir": str(directory),
                "models": [{"name": "bench", "endpoints": [f"http://127.0.0.1:{engine}"]}],
                "tenants": [{"name": "victim"}, neighbour, {"name": "free"}],
                "gateway": {"listen": f"127.0.0.1:{port}", "relay": relay, "admin_listen": "none"},
            }
        )
    )
    store = Keystore(directory)
    return path, {name: store.create(name, now=wall_clock())[0] for name in ("victim", "neighbour", "free")}


def measured(port: int, key: str, a: argparse.Namespace, generator: random.Random) -> list[Timing]:
    """The victim's streams for a while, in an open loop. Raises SystemExit where one failed."""

    def target() -> Target:
        return Target(f"http://127.0.0.1:{port}", PATH, stream_body(), {"authorization": f"Bearer {key}"})

    plan = arrivals(max(1, int(a.seconds * a.rate / 2)), a.rate, generator)
    run = uvloop.run(run_pairs(target(), target(), plan, stream=True))
    if run.errors:
        sys.exit(f"the victim got wrong answers: {dict(run.errors)}")
    return [timing for pair in run.pairs for timing in (pair.direct, pair.through)]


def figures(timings: list[Timing]) -> tuple[float, float]:
    """p99 of TTFT and of ITL, in milliseconds."""
    gaps = sorted(gap for timing in timings for gap in timing.gaps)
    return quantile(sorted(t.first for t in timings), 0.99) * 1000, quantile(gaps, 0.99) * 1000


def ratios(alone: list[Timing], beside: list[Timing], generator: random.Random) -> list[tuple[float, float, float]]:
    """For TTFT and ITL the ratio of p99s, with its 95% interval by bootstrap over requests."""
    found = []
    drawn = [
        (figures(generator.choices(alone, k=len(alone))), figures(generator.choices(beside, k=len(beside))))
        for _ in range(RESAMPLES)
    ]
    for index in (0, 1):
        spread = sorted(b[index] / a[index] for a, b in drawn)
        found.append((figures(beside)[index] / figures(alone)[index], quantile(spread, 0.025), quantile(spread, 0.975)))
    return found


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", type=Path)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rate", type=float, default=20.0)
    parser.add_argument("--relay", choices=("fast", "asgi"), default="fast")
    parser.add_argument("--only", choices=KINDS, action="append")
    parser.add_argument("--serve-gateway", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--aggress", nargs=3, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve_gateway:
        serve_gateway(load_config(a.serve_gateway), config_path=a.serve_gateway)
    elif a.aggress:
        aggress(a.aggress[0], int(a.aggress[1]), a.aggress[2])
    elif a.tools is None:
        parser.error("--tools DIR is needed: the directory with upstream.c")
    else:
        measure(a)


def measure(a: argparse.Namespace) -> None:
    """Alone and beside, round by round, for every kind; a table on standard output."""
    generator = random.Random(1)
    me = (sys.executable, __file__)
    with tempfile.TemporaryDirectory(prefix="sliceway-") as name:
        directory = Path(name)
        engine, port = free_port(), free_port()
        subprocess.run(["gcc", "-O2", "-w", "-o", directory / "upstream", a.tools / "upstream.c"], check=True)
        path, keys = configured(directory, engine, port, a.relay)
        upstream = (str(directory / "upstream"), str(engine), str(EVENTS), str(EVENT_MICROSECONDS), "20000")
        with running(directory / "e.log", *upstream), running(directory / "g.log", *me, "--serve-gateway", str(path)):
            wait_until(lambda: answers(port), what="the gateway is ready", seconds=60)
            measured(port, keys["victim"], argparse.Namespace(seconds=2.0, rate=a.rate), generator)
            sys.stdout.write(
                "| aggressor | TTFT p99 ms alone / beside | ratio [95%] | ITL p99 ms alone / beside | ratio [95%] |\n|---|---|---|---|---|\n"
            )
            for kind in a.only or KINDS:
                key = keys["neighbour" if kind == "flood" else "free"]
                alone: list[Timing] = []
                beside: list[Timing] = []
                for _ in range(a.rounds):
                    alone += measured(port, keys["victim"], a, generator)
                    with running(directory / "a.log", *me, "--aggress", kind, str(port), key):
                        measured(port, keys["victim"], argparse.Namespace(seconds=2.0, rate=a.rate), generator)
                        beside += measured(port, keys["victim"], a, generator)
                row(kind, alone, beside, generator)
    load = os.getloadavg()[0]
    sys.stdout.write(
        f"\n{a.rounds} rounds of {a.seconds:g} s alone and beside, in turns; {a.rate:g} streams/s of {EVENTS} events; relay {a.relay}; load average {load:.1f} on {os.cpu_count()} cores.\n"
    )


def row(kind: str, alone: list[Timing], beside: list[Timing], generator: random.Random) -> None:
    """One line of the table."""
    (ttft, itl), (ttft_beside, itl_beside) = figures(alone), figures(beside)
    (r1, l1, h1), (r2, l2, h2) = ratios(alone, beside, generator)
    sys.stdout.write(
        f"| {kind} | {ttft:.2f} / {ttft_beside:.2f} | {r1:.2f} [{l1:.2f}, {h1:.2f}] "
        f"| {itl:.2f} / {itl_beside:.2f} | {r2:.2f} [{l2:.2f}, {h2:.2f}] |\n"
    )
    sys.stdout.flush()


def answers(port: int) -> bool:
    """Whether the gateway is ready."""
    with socket.socket() as sock:
        if sock.connect_ex(("127.0.0.1", port)):
            return False
        sock.sendall(b"GET /readyz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        return sock.recv(100).startswith(b"HTTP/1.1 200")


if __name__ == "__main__":
    main()
