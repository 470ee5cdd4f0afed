"""Every figure of docs/performance.md in one run: what the gateway adds, what it holds, what it costs beside others, and who disturbs whom."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.bench import BenchError
from gateway.overhead import Part, neighbours
from gateway.overhead.aggressor import LIMIT_PER_MINUTE
from gateway.overhead.cost import compared, take_turns
from gateway.overhead.gateways import FEATURES, HOW_TO_INSTALL, LIMITS, OURS, Running, makers, started, with_tenants
from gateway.overhead.gateways import ours as our_start
from gateway.overhead.pairs import Run, arrivals, summarize
from gateway.overhead.tools import Tools, free_port, request

REQUESTS_PER_SECOND = 500.0  # through the gateway, and as many past it
EVENT_STREAMS_PER_SECOND = 100.0  # of a second each, with an event every 10 ms: 10,000 events/s through the gateway
EVENT_STREAM_TOKENS = 100
HELD_STREAMS = 2000
HELD_TOKENS, HELD_EVENT_SECONDS = 40, 0.2
BASE_BYTES, STREAM_BYTES = 120e6, 40e3

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure. The defaults take some twenty minutes with all peers, without them thirteen."""

    pair_seconds: float = 10.0
    cost_rounds: int = 6
    cost_seconds: float = 2.5
    neighbour_rounds: int = 6
    neighbour_seconds: float = 3.0


def measure_everything(
    peers: Path | None, effort: Effort, told: Told, only: Collection[Part] = tuple(Part)
) -> dict[str, Any]:
    """The report: `added`, `held`, `cost`, `neighbours`, as far as they are among `only`, and what they were measured with.

    Raises BenchError where this gateway does not answer.
    """
    load_before = os.getloadavg()[0]
    host = {"cores": os.cpu_count(), "load_average_before": round(load_before, 2)}
    report: dict[str, Any] = {"host": host, "features": list(FEATURES)}
    with tempfile.TemporaryDirectory(prefix="sliceway-bench-") as name:
        tools = Tools.compiled(Path(name))
        if Part.LATENCY in only:
            told("what the gateway adds")
            report["added"] = _added(tools, effort)
        if Part.STREAMS in only:
            told(f"{HELD_STREAMS} streams held")
            report["held"] = _held(tools)
        if Part.CPU in only:
            told("CPU per request and per event")
            report["cost"] = _cost(tools, peers, effort, told)
        if Part.NEIGHBOURS in only:
            told("neighbours")
            report["neighbours"] = _neighbours(tools, effort, told)
    return report


@contextlib.contextmanager
def _ours(tools: Tools, engine: int) -> Any:
    port = free_port()
    with started(OURS, our_start(tools.directory, port, engine), port, tools.directory) as running:
        if running is None:
            raise BenchError("this gateway does not answer")
        yield running


def _added(tools: Tools, effort: Effort) -> dict[str, Any]:
    """Plain answers and first events at 500 requests/s, and gaps at 10,000 events/s: through the gateway and past it, in pairs."""
    kinds = (
        ("plain", REQUESTS_PER_SECOND, 16, False),
        ("stream", REQUESTS_PER_SECOND, 16, True),
        ("events", EVENT_STREAMS_PER_SECOND, EVENT_STREAM_TOKENS, True),
    )
    generator = random.Random(1)
    report: dict[str, Any] = {}
    with tools.engine() as engine, _ours(tools, engine) as gateway:
        for name, rate, tokens, stream in kinds:
            asked = tuple(
                request(port, stream=stream, tokens=tokens, key=key, ask_overhead=True)
                for port, key in ((engine, None), (gateway.port, gateway.key))
            )
            for seconds in (1.0, effort.pair_seconds):
                plan = arrivals(int(seconds * rate), 2 * rate, generator)
                run = tools.opened((engine, gateway.port), (asked[0], asked[1]), plan)
            report[name] = _summary(run, stream=stream, generator=generator) | {
                "requests_per_second": rate,
                "output_tokens": tokens,
            }
    return report


def _summary(run: Run, *, stream: bool, generator: random.Random) -> dict[str, Any]:
    if not run.pairs:
        raise BenchError(f"no pair was answered: {dict(run.errors)}")
    late = sorted(run.lag_seconds)
    return summarize(run.pairs, stream=stream, generator=generator) | {
        "errors": dict(run.errors),
        "client_lag_p99_ms": round(late[int(len(late) * 0.99)] * 1000, 3),
    }


def _held(tools: Tools) -> dict[str, Any]:
    """As many streams at once, slow ones, and the resident memory meanwhile, the engine's connections included."""
    with tools.engine(event_seconds=HELD_EVENT_SECONDS) as engine, _ours(tools, engine) as gateway:
        asked = request(gateway.port, stream=True, tokens=HELD_TOKENS, key=gateway.key)
        tools.closed(gateway.port, asked, connections=20, seconds=HELD_EVENT_SECONDS * 4)
        idle_bytes = gateway.resident_bytes()
        sampled, over = [idle_bytes], threading.Event()
        watcher = threading.Thread(target=_watch_memory, args=(gateway, sampled, over))
        watcher.start()
        try:
            seconds = 2.5 * HELD_TOKENS * HELD_EVENT_SECONDS
            done = tools.closed(gateway.port, asked, connections=HELD_STREAMS, seconds=seconds)
        finally:
            over.set()
            watcher.join()
    return {
        "streams": HELD_STREAMS,
        "completed": done.requests,
        "errors": done.errors,
        "events_per_second": round(done.events / done.seconds),
        "idle_bytes": idle_bytes,
        "most_bytes": max(sampled),
        "bytes_per_stream": round((max(sampled) - idle_bytes) / HELD_STREAMS),
        "bound_bytes": round(BASE_BYTES + STREAM_BYTES * HELD_STREAMS),
    }


def _watch_memory(gateway: Running, sampled: list[int], over: threading.Event) -> None:
    while not over.wait(0.25):
        sampled.append(gateway.resident_bytes())


def _cost(tools: Tools, peers: Path | None, effort: Effort, told: Told) -> dict[str, Any]:
    missing: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(tools.engine())
        contestants: list[Running] = []
        for name, maker in makers(peers).items():
            port = free_port()
            if maker is None:
                missing[name] = f"not installed: {HOW_TO_INSTALL[name.split(',')[0]]}"
                continue
            start = maker(tools.directory, port, engine)
            running = stack.enter_context(started(name, start, port, tools.directory))
            if running is None:
                last = (
                    (tools.directory / f"{name}-{port}.log")
                    .read_text(errors="replace", encoding="utf-8")
                    .strip()[-200:]
                )
                missing[name] = f"did not answer: {last}"
                continue
            contestants.append(running)
        for name, why in missing.items():
            told(f"{name} is left out, {why}")
        for one in contestants:
            missing[one.name] = "it answered no request in time"
        samples = take_turns(tools, contestants, rounds=effort.cost_rounds, seconds=effort.cost_seconds, told=told)
        for sample in samples:
            del missing[sample.name]
    return {
        "rows": compared(samples),
        "left_out": missing,
        "rounds": effort.cost_rounds,
        "seconds": effort.cost_seconds,
    }


def _neighbours(tools: Tools, effort: Effort, told: Told, only: Sequence[str] = ()) -> list[dict[str, Any]]:
    tenants = {"victim": LIMITS, "limited": LIMITS | {"requests_per_minute": LIMIT_PER_MINUTE}, "free": LIMITS}
    with tools.engine(first_seconds=0.02) as engine, tools.engine(first_seconds=0.02) as other_engine:
        port = free_port()
        start, keys = with_tenants(tools.directory, port, engine, tenants)
        with started(OURS, start, port, tools.directory) as gateway:
            if gateway is None:
                raise BenchError("this gateway does not answer")
            return neighbours.beside_each(
                tools,
                neighbours.Ports(gateway.port, engine, other_engine),
                neighbours.Keys(**keys),
                rounds=effort.neighbour_rounds,
                seconds=effort.neighbour_seconds,
                only=only,
                told=told,
            )
