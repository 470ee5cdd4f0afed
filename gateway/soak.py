"""A storm through the whole request path without a network: are all counters zero afterwards, and does memory stay flat?

Requests go through `AsgiRelay`, admission and metering to an engine that is a few lines of Python. Some are streamed,
some fail at connecting, some die, some are refused by limits, and some clients leave in the middle. Everything random comes from one
seed. `python -m gateway.soak --requests 1000000` prints one JSON object, and its exit status says whether all held.
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
import uvloop

from gateway.config import Config
from gateway.errors import EngineDied, EngineUnreachable
from gateway.service import Gateway
from gateway.wiring import create_gateway
from placement.state import StatePaths
from placement.table import ModelRow, ReplicaRow, ReplicaState, RoutingTable, SliceRow, publish

MOST_GROWTH_RATIO = 0.05
CONCURRENCY = 256

_USAGE = b'"usage":{"prompt_tokens":12,"completion_tokens":4,"total_tokens":16}'
_WHOLE = b'{"id":"1","choices":[{"index":0,"finish_reason":"stop"}],' + _USAGE + b"}"
_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
_LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
_STREAM = (_EVENT, _EVENT + _EVENT, _EVENT + _LAST, b'data: {"choices":[],' + _USAGE + b"}\n\ndata: [DONE]\n\n")


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


class _Engines:
    """`gateway.upstream.Engines` with chosen accidents."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    async def post(
        self, replica: ReplicaRow, path: str, headers: Mapping[str, str], body: bytes, *, method: str = "POST"
    ) -> _Answer:
        """An answer, or an accident."""
        await asyncio.sleep(0)
        fate = self._chance.random()
        if fate < 0.01:
            raise EngineUnreachable("refused", replica=replica.replica)
        dies = fate < 0.02
        if b'"stream":true' in body:
            return _Answer(_STREAM, b"text/event-stream", dies=dies)
        return _Answer((_WHOLE[:40], _WHOLE[40:]), b"application/json", dies=dies)

    async def get(self, replica: ReplicaRow, path: str, *, timeout_seconds: float) -> tuple[int, bytes]:
        """Always well."""
        return 200, b"{}"

    async def retain(self, endpoints: Iterable[str]) -> None:
        """Nothing is kept."""

    async def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was left when all requests had gone, and their statuses (499: the client left). Bytes of resident memory: after the first tenth of the requests, and at the end."""

    requests: int
    seconds: float
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

    @property
    def holds(self) -> bool:
        """Every counter is zero, and memory grew by at most MOST_GROWTH_RATIO."""
        left = (self.in_flight, self.waiting, self.active, self.sequences, self.kv_tokens, self.concurrent)
        return not any(left) and self.growth_ratio <= MOST_GROWTH_RATIO


def soak(requests: int, seed: int = 1) -> Outcome:
    """Send `requests` requests, CONCURRENCY at a time. Blocks until all are answered."""
    with tempfile.TemporaryDirectory(prefix="sliceway-soak-") as directory:
        config = _config(Path(directory))
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_soak(config, requests, random.Random(seed)))


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
    limits = {"requests_per_minute": 10**9, "tokens_per_minute": 10**9, "max_concurrent": 40}
    tenants = [{"name": "anonymous", "limits": limits | {"max_concurrent": CONCURRENCY - 6}}]
    return Config.model_validate(
        {
            "version": "v1",
            "state_dir": str(state),
            "models": [{"name": "m", "source": "x"}],
            "tenants": tenants,
            "gateway": {"authentication": "none", "queue": {"max_requests": 128}},
        }
    )


async def _soak(config: Config, requests: int, chance: random.Random) -> Outcome:
    gateway, app = create_gateway(config, engines=_Engines(chance))
    await gateway.start()
    process, warm = psutil.Process(), 0
    started, left, warm_at = time.perf_counter(), requests, requests - requests // 10

    async def client() -> None:
        nonlocal left, warm
        while left > 0:
            left -= 1
            if left == warm_at:
                warm = process.memory_info().rss
            if await _request(app, chance) in (429, 503):
                await asyncio.sleep(0.01)  # clients that are refused come back later

    async with asyncio.TaskGroup() as clients:
        for _ in range(CONCURRENCY):
            clients.create_task(client())
    outcome = _outcome(gateway, requests, time.perf_counter() - started, warm, process.memory_info().rss)
    await gateway.stop()
    return outcome


async def _request(app: Any, chance: random.Random) -> int:
    """One request, and its status; one client in twenty leaves, at once or in the middle. 0: it left before there was one."""
    stream = chance.random() < 0.3
    body = b'{"model":"m","max_tokens":%d,"stream":%s,"messages":[]}' % (
        chance.choice((4, 64, 400)),
        b"true" if stream else b"false",
    )
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

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    await app(scope, receive, send)
    return int(status)


def _outcome(gateway: Gateway, requests: int, seconds: float, warm: int, end: int) -> Outcome:
    admission = gateway.admission
    statuses: Counter[int] = Counter()
    for (_, _, status), count in gateway.exchanges.stats.requests.items():
        statuses[status] += count
    loads = [load for row in gateway.routes().replicas() if (load := admission.loads.get(row.replica))]
    return Outcome(
        requests=requests,
        seconds=round(seconds, 1),
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
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    outcome = soak(arguments.requests, arguments.seed)
    sys.stdout.write(json.dumps(asdict(outcome) | {"holds": outcome.holds}, indent=1) + "\n")
    return 0 if outcome.holds else 1


if __name__ == "__main__":
    sys.exit(main())
