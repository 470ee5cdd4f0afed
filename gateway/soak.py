"""A storm through the whole request path without a network: are all counters zero afterwards, and does memory stay flat?

Requests go through both relays, admission and metering to engines that are a few lines of Python (`gateway.soak_wires`). Some
are streamed; some engines refuse connections, die in the middle, hang until a timeout, or crash with all they had; some
requests are refused by limits; some clients leave in the middle, alone or all at once, send half a body, or stop reading. Everything random comes
from one seed. `python -m gateway.soak --requests 1000000` prints one JSON object, and its exit status says whether all held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import uvicorn
import uvloop
from uvicorn.server import ServerState

from gateway.config import Config
from gateway.errors import EngineDied, EngineUnreachable
from gateway.hotpath import HotPath, hot_protocol
from gateway.ingress.protocol import HeadLimits
from gateway.large_bodies import LARGE_BYTES, Pieces
from gateway.service import Gateway
from gateway.soak_wires import END, EVENT, LAST, WHOLE, ClientWire, MemoryEngines
from gateway.wiring import create_gateway, server_config
from placement.state import StatePaths
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow, publish

MOST_GROWTH_RATIO = 0.05
FAST_CLIENTS = 192
ASGI_CLIENTS = 64
CONCURRENCY = FAST_CLIENTS + ASGI_CLIENTS
STORM_REQUESTS = 20_000  # so many requests from one storm to the next
PATH = "/v1/chat/completions"
LARGE_CHANCE = 0.002  # of a request with a body that the reader process gets
LARGE_TEXT = b"x" * 2 * LARGE_BYTES

_STREAM = (EVENT, EVENT + EVENT, EVENT + LAST, END)


class _Answer:
    def __init__(self, parts: tuple[bytes, ...], content_type: bytes, *, dies: bool) -> None:
        self.status = 200
        self.headers = [(b"content-type", content_type)]
        self._parts = iter(parts[:1] if dies else parts)
        self._dies = dies

    async def read_some(self) -> bytes:
        """The next piece; a turn of the loop goes by, as it does for a socket."""
        await asyncio.sleep(0)
        part = next(self._parts, b"")
        if not part and self._dies:
            raise EngineDied("it died")
        return part

    def close(self) -> None:
        """Nothing is held."""


def _joined(pieces: Pieces) -> bytes:
    return b"".join(iter(lambda: pieces.take() or b"", b""))


class _Engines:
    """`gateway.upstream.Engines` with chosen accidents."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    async def post(
        self, replica: ReplicaRow, path: str, headers: Mapping[str, str], body: bytes | Pieces, *, method: str = "POST"
    ) -> _Answer:
        """An answer, or an accident."""
        await asyncio.sleep(0)
        if isinstance(body, Pieces):
            body = _joined(body)
        fate = self._chance.random()
        if fate < 0.01:
            raise EngineUnreachable("refused", replica=replica.replica)
        dies = fate < 0.02
        if b'"stream":true' in body:
            return _Answer(_STREAM, b"text/event-stream", dies=dies)
        return _Answer((WHOLE[:40], WHOLE[40:]), b"application/json", dies=dies)

    async def get(self, replica: ReplicaRow, path: str, *, timeout_seconds: float) -> tuple[int, bytes]:
        """Always well."""
        return 200, b"{}"

    async def retain(self, endpoints: Iterable[str]) -> None:
        """Nothing is kept."""

    async def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was left when all requests had gone, and their statuses (499: the client left).

    Bytes of resident memory: after the first tenth of the requests, and at the end. `storms` are crashes of an engine and mass departures.
    """

    requests: int
    seconds: float
    cpu_seconds: float
    storms: int
    statuses: dict[int, int]
    warm_bytes: int
    end_bytes: int
    growth_ratio: float
    in_flight: int
    waiting: int
    active: int
    sequences: int
    kv_tokens: int
    concurrent: int
    client_connections: int
    engine_connections: int
    large_bytes: int
    large_jobs: int

    @property
    def left(self) -> int:
        """The sum of every counter that has to be zero."""
        counters = (self.in_flight, self.waiting, self.active, self.sequences, self.kv_tokens, self.concurrent)
        connections = self.client_connections + self.engine_connections
        return sum(counters) + connections + self.large_bytes + self.large_jobs

    @property
    def holds(self) -> bool:
        """Every counter is zero, and memory grew by at most MOST_GROWTH_RATIO."""
        return not self.left and self.growth_ratio <= MOST_GROWTH_RATIO


def soak(requests: int, seed: int = 1, storm_requests: int = STORM_REQUESTS) -> Outcome:
    """Send `requests` requests, CONCURRENCY at a time, with a storm after every `storm_requests`. Blocks until all are answered."""
    with tempfile.TemporaryDirectory(prefix="sliceway-soak-") as directory:
        config = _config(Path(directory))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_soak(config, requests, random.Random(seed), storm_requests))


def _config(state: Path) -> Config:
    rows = tuple(
        ReplicaRow(
            replica=f"m@{number}",
            model="m",
            engine_model="m",
            endpoint=f"unix:/{number}",
            slice=SliceRow(id=f"s{number}", kind="cpu"),
            state=ReplicaState.READY,
            max_num_seqs=48,
            kv_cache_tokens=48 * 512,
        )
        for number in range(4)
    )
    table = RoutingTable(generation=1, models=(ModelRow(name="m", task="generate", max_model_len=2048),), replicas=rows)
    publish(table, StatePaths(state).routing_table)
    limits = {"requests_per_minute": 10**9, "tokens_per_minute": 10**9, "max_concurrent": CONCURRENCY - 6}
    gateway = {"authentication": "none", "queue": {"max_requests": 128}}
    return Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(state),
            "models": [{"name": "m", "source": "x"}],
            "tenants": [{"name": "anonymous", "limits": limits}],
            "gateway": gateway | {"first_byte_timeout_seconds": 2.0, "idle_timeout_seconds": 2.0},
        }
    )


class _Storm:
    """The clients of one run, and what happens to all of them at once."""

    def __init__(self, gateway: Gateway, app: Any, config: Config, chance: random.Random, requests: int) -> None:
        self.gateway = gateway
        self.engines = MemoryEngines(chance)
        self.left = requests
        self.storms = 0
        self.server = ServerState()
        self._app = app
        self._chance = chance
        self._loop = asyncio.get_running_loop()
        self._uvicorn: uvicorn.Config = server_config(config, app)
        limits = HeadLimits(config.gateway.max_header, config.gateway.header_timeout_seconds)
        self._protocol = hot_protocol(limits, HotPath.of(gateway.exchanges, self.engines))
        self._wires: set[ClientWire] = set()

    async def fast_client(self) -> None:
        """Requests one after another on a kept connection."""
        wire = self._connected()
        while self.left > 0:
            self.left -= 1
            body, chance = _body(self._chance), self._chance.random()
            head = b"POST %b HTTP/1.1\r\nhost: soak\r\ncontent-length: %d\r\n\r\n" % (PATH.encode(), len(body))
            leaves_after = self._chance.randrange(4) if chance < 0.05 else -1
            status = await wire.ask(head + body, leaves_after=leaves_after, pause=0.05 < chance < 0.06)
            if wire.is_closing():
                self._wires.discard(wire)
                wire = self._connected()
            if status in (429, 503):
                await asyncio.sleep(0.01)  # clients that are refused come back later
        self._wires.discard(wire)
        wire.close()

    async def asgi_client(self) -> None:
        """Requests to the relay that knows no connections."""
        while self.left > 0:
            self.left -= 1
            if await _request(self._app, self._chance) in (429, 503):
                await asyncio.sleep(0.01)

    async def storms_every(self, requests: int) -> None:
        """In turns an engine crashes, and all clients leave at once."""
        following = self.left - requests
        while following > 0:
            await asyncio.sleep(0.01)
            if self.left <= following:
                following -= requests
                self.storms += 1
                if self.storms % 2:
                    self.engines.crash(f"unix:/{self._chance.randrange(4)}")
                else:
                    for wire in list(self._wires):
                        wire.close()

    def _connected(self) -> ClientWire:
        wire = ClientWire(lambda: self._protocol(self._uvicorn, self.server, {}, self._loop))
        self._wires.add(wire)
        return wire


async def _soak(config: Config, requests: int, chance: random.Random, storm_requests: int) -> Outcome:
    gateway, app = create_gateway(config, engines=_Engines(chance))
    await gateway.start()
    storm = _Storm(gateway, app, config, chance, requests)
    started, cpu = time.perf_counter(), time.process_time()
    warm = asyncio.create_task(_memory_when(storm, requests - requests // 10))
    async with asyncio.TaskGroup() as clients:
        clients.create_task(storm.storms_every(storm_requests))
        for _ in range(FAST_CLIENTS):
            clients.create_task(storm.fast_client())
        for _ in range(ASGI_CLIENTS):
            clients.create_task(storm.asgi_client())
    end = psutil.Process().memory_info().rss
    await storm.engines.close()
    seconds = time.perf_counter() - started, time.process_time() - cpu
    outcome = _outcome(storm, requests, seconds, await warm, end)
    await gateway.stop()
    return outcome


async def _memory_when(storm: _Storm, left: int) -> int:
    """Resident bytes when so many requests are left."""
    while storm.left > left:  # noqa: ASYNC110  # a look now and then costs less than an event with every request
        await asyncio.sleep(0.05)
    return psutil.Process().memory_info().rss


def _body(chance: random.Random) -> bytes:
    stream = b"true" if chance.random() < 0.3 else b"false"
    if chance.random() < LARGE_CHANCE:
        salted = b'"cache_salt":"x",' if chance.random() < 0.5 else b""  # which has to be rewritten
        return b'{"model":"m","max_tokens":4,"stream":%b,%b"messages":["%b"]}' % (stream, salted, LARGE_TEXT)
    return b'{"model":"m","max_tokens":%d,"stream":%b,"messages":[]}' % (chance.choice((4, 64, 400)), stream)


async def _request(app: Any, chance: random.Random) -> int:
    """One request, and its status; one client in twenty leaves, at once or in the middle. 0: it left before there was one."""
    body = _body(chance)
    gone = asyncio.Event()
    leaves_after = chance.randrange(4) if chance.random() < 0.05 else None
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    sent = status = 0

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        if leaves_after == 0:
            return {"type": "http.disconnect"}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Mapping[str, Any]) -> None:
        nonlocal sent, status
        status = message.get("status", status)
        sent += 1
        if sent == leaves_after:
            gone.set()
            await asyncio.sleep(0)

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
    await app(scope, receive, send)
    return int(status)


def _outcome(storm: _Storm, requests: int, seconds: tuple[float, float], warm: int, end: int) -> Outcome:
    gateway = storm.gateway
    admission = gateway.admission
    statuses: Counter[int] = Counter()
    for (_, _, status), count in gateway.exchanges.stats.requests.items():
        statuses[status] += count
    loads = [load for row in gateway.routes().replicas() if (load := admission.loads.get(row.replica))]
    return Outcome(
        requests=requests,
        seconds=round(seconds[0], 1),
        cpu_seconds=round(seconds[1], 1),
        storms=storm.storms,
        statuses=dict(sorted(statuses.items())),
        warm_bytes=warm,
        end_bytes=end,
        growth_ratio=round(end / warm - 1, 4),
        in_flight=admission.loads.total(),
        waiting=sum(pool.waiting for pool in admission.pools()),
        active=len(gateway.exchanges.active),
        sequences=sum(load.sequences for load in loads),
        kv_tokens=sum(load.kv_tokens for load in loads),
        concurrent=sum(gauge.window.used for gauge in admission.limits if gauge.kind == "max_concurrent"),
        client_connections=len(storm.server.connections),
        engine_connections=storm.engines.open_connections,
        large_bytes=gateway.exchanges.large_bodies.room.held,
        large_jobs=gateway.exchanges.large_bodies.reader.waiting,
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--storm-requests", type=int, default=STORM_REQUESTS)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    outcome = soak(arguments.requests, arguments.seed, arguments.storm_requests)
    sys.stdout.write(json.dumps(asdict(outcome) | {"holds": outcome.holds}, indent=1) + "\n")
    return 0 if outcome.holds else 1


if __name__ == "__main__":
    sys.exit(main())
