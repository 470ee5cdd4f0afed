"""The account of one request, without a network: stages, deadlines, and what is left when it is over."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from gateway.admission import Admission, CacheSalts, Loads
from gateway.config import Config
from gateway.digests import METRICS, LatencyBook
from gateway.errors import (
    BodyReaderGone,
    Draining,
    EngineDied,
    EngineTimeout,
    EngineUnreachable,
    GatewayError,
    RequestTimeout,
    UnknownModel,
    WrongTask,
)
from gateway.exchange import ClientLeft, Exchange, Exchanges, Policy
from gateway.keys import Keyring
from gateway.large_bodies import LargeBodies
from gateway.large_bodies.testing import InlineReader
from gateway.request import ROUTES
from gateway.router import Router
from gateway.routes import build_routes
from gateway.stats import Stats
from gateway.tenants import Directory
from gateway.testing import FakeClock, replica_row
from placement.table import ModelRow, ReplicaRow, RoutingTable

CONFIG = Config.model_validate(
    {
        "version": "v1",
        "gateway": {
            "authentication": "none",
            "first_byte_timeout_seconds": 20,
            "idle_timeout_seconds": 30,
            "body_timeout_seconds": 10,
        },
    }
)
BODY = b'{"model": "m", "stream": true}'


def never() -> None:
    raise AssertionError("nothing had to wait")


def placed_at_once(exchange: Exchange) -> ReplicaRow:
    replica = exchange.place(never)
    assert replica is not None
    return replica


class Desk:
    def __init__(self) -> None:
        rows = (replica_row("m-0", "m", "unix:/0"), replica_row("m-1", "m", "unix:/1"))
        table = RoutingTable(
            generation=1, models=(ModelRow(name="m", task="generate"), ModelRow(name="e", task="embed")), replicas=rows
        )
        routes = build_routes(table, (), {})
        self.clock, self.loads, self.book, self.stats = FakeClock(), Loads(bound=10), LatencyBook(), Stats()
        self.unreachable: list[str] = []
        self.served: list[str] = []
        self.exchanges = Exchanges(
            policy=Policy(Directory.of(CONFIG), CONFIG.gateway),
            keyring=lambda: Keyring({}, b""),
            router=Router(lambda: routes, self.loads),
            admission=Admission(lambda: routes, self.loads, self.clock),
            book=self.book,
            stats=self.stats,
            clock=self.clock,
            wall=self.clock,
            on_unreachable=lambda row, _: self.unreachable.append(row.replica),
            on_served=self.served.append,
        )

    def open(self) -> Exchange:
        return self.exchanges.open(ROUTES["/v1/chat/completions"], b"req_1")


@pytest.fixture
def desk() -> Desk:
    return Desk()


async def test_an_answer_that_is_no_stream_is_all_the_engines(desk: Desk) -> None:
    with desk.open() as exchange:
        exchange.admit({})
        exchange.take_body(BODY)
        replica = placed_at_once(exchange)
        exchange.dispatched(desk.clock())
        desk.clock.turn(2)
        exchange.begun(200)
        exchange.finished()
    series = desk.book.series(replica.slice.id, "anonymous", desk.clock())
    counts = {metric: series.digest(metric).quantiles("1m", desk.clock()).count for metric in METRICS}
    assert counts == dict.fromkeys(METRICS, 1) | {"ttft_seconds": 0, "itl_seconds": 0, "streaming_seconds": 0}
    assert series.digest("engine_seconds").quantiles("1m", desk.clock()).p50 == pytest.approx(2, rel=0.01)


async def test_a_stream_is_measured_from_its_whole_body(desk: Desk) -> None:
    with desk.open() as exchange:
        exchange.admit({})
        desk.clock.turn(5)  # a client that sends slowly is no slowness of a slice
        exchange.take_body(BODY)
        desk.clock.turn(0.25)
        sent_at = desk.clock()
        replica = placed_at_once(exchange)
        exchange.dispatched(sent_at)
        meter = exchange.stream_meter()
        desk.clock.turn(1)
        meter.feed(b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":null}]}\n\n', desk.clock())
        desk.clock.turn(0.5)
        meter.feed(
            b'data: {"choices":[{"delta":{"content":"b"},"finish_reason":"stop"}]}\n\ndata: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":2}}\n\n',
            desk.clock(),
        )
        exchange.begun(200)
        exchange.finished()
        assert desk.loads.total() == 1
    series = desk.book.series(replica.slice.id, "anonymous", desk.clock())
    got = {metric: series.digest(metric).quantiles("1m", desk.clock()) for metric in METRICS}
    for metric, seconds in (
        ("queue_seconds", 0.25),
        ("gateway_seconds", 0.25),
        ("engine_seconds", 1.0),
        ("streaming_seconds", 0.5),
        ("ttft_seconds", 1.25),
        ("itl_seconds", 0.5),
        ("e2e_seconds", 1.75),
    ):
        assert (got[metric].count, got[metric].p50) == (1, pytest.approx(seconds, rel=0.01))
    assert desk.stats.tokens == {("m", "anonymous", "prompt"): 4, ("m", "anonymous", "completion"): 2}
    assert desk.stats.requests == {("m", "anonymous", 200): 1}
    assert desk.loads.total() == 0
    assert desk.exchanges.active == set()
    assert desk.served == [replica.replica]


@pytest.mark.parametrize(("body", "error"), [(b'{"model": "never"}', UnknownModel), (b'{"model": "e"}', WrongTask)])
async def test_models_that_clients_invent_make_no_labels(desk: Desk, body: bytes, error: type[GatewayError]) -> None:
    with desk.open() as exchange:
        exchange.admit({})
        with pytest.raises(error) as caught:
            exchange.take_body(body)
        exchange.failed(caught.value)
    assert list(desk.stats.requests) == [("unknown", "anonymous", exchange.status)]


async def test_unreachable_replicas_are_tried_once_each_and_given_back(desk: Desk) -> None:
    with desk.open() as exchange:
        exchange.admit({})
        exchange.take_body(BODY)
        tried = []
        for _ in range(2):
            tried.append(placed_at_once(exchange).replica)
            assert desk.loads.total() == 1
            exchange.unreachable(EngineUnreachable("refused"))
        with pytest.raises(EngineUnreachable):
            exchange.place(never)
        assert desk.loads.total() == 0
    assert sorted(tried) == sorted(desk.unreachable) == ["m-0", "m-1"]
    assert desk.stats.connect_failures == {"m-0": 1, "m-1": 1}


async def test_a_draining_gateway_admits_nobody(desk: Desk) -> None:
    desk.exchanges.draining = True
    with desk.open() as exchange, pytest.raises(Draining):
        exchange.admit({})


Step = Callable[[Exchange], Any]


@pytest.mark.parametrize(
    ("steps", "seconds", "error"),
    [
        ([], 10, RequestTimeout),
        ([lambda e: e.take_body(BODY), lambda e: e.place(never)], 20, EngineTimeout),
        ([lambda e: e.take_body(BODY), lambda e: e.place(never), lambda e: e.begun(200)], 30, EngineTimeout),
    ],
    ids=["body", "first byte", "stream"],
)
async def test_each_stage_has_its_own_timeout(
    desk: Desk, steps: list[Step], seconds: float, error: type[GatewayError]
) -> None:
    reached: list[Any] = []

    async def serve() -> None:
        with desk.open() as exchange:
            exchange.admit({})
            for step in steps:
                step(exchange)
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                reached.append(exchange.interruption())

    task = asyncio.create_task(serve())
    await asyncio.sleep(0)
    desk.clock.turn(seconds - 0.1)
    desk.exchanges.expire()
    await asyncio.sleep(0)
    assert not reached
    desk.clock.turn(0.2)
    desk.exchanges.expire()
    await task
    assert type(reached[0]) is error
    assert not task.cancelled()
    assert desk.loads.total() == 0


async def test_the_first_reason_for_an_interruption_stands(desk: Desk) -> None:
    async def serve() -> Any:
        with desk.open() as exchange:
            exchange.client_left()
            exchange.interrupt(EngineDied("later"))
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                return exchange.interruption()

    assert isinstance(await asyncio.create_task(serve()), ClientLeft)


async def test_a_client_that_leaves_after_its_answer_interrupts_nothing(desk: Desk) -> None:
    with desk.open() as exchange:
        exchange.finished()
        exchange.client_left()
        await asyncio.sleep(0)
        assert exchange.interruption() is None


async def test_what_others_cancel_stays_cancelled(desk: Desk) -> None:
    with desk.open() as exchange:
        assert exchange.interruption() is None


async def test_the_overhead_is_what_neither_the_client_nor_the_engine_took(desk: Desk) -> None:
    with desk.open() as exchange:
        exchange.admit({b"x-sliceway-overhead": b"1"})
        desk.clock.turn(5)  # the body
        exchange.take_body(BODY)
        desk.clock.turn(0.002)
        replica = exchange.place(lambda: None)
        assert replica is not None
        exchange.dispatched(desk.clock())
        desk.clock.turn(3)  # the engine
        exchange.answer_came()
        desk.clock.turn(0.001)
        assert exchange.overhead_headers() == [(b"x-sliceway-overhead-ms", b"3.000")]
        exchange.begun(200)
        exchange.finished()


async def test_the_overhead_begins_with_the_head_and_not_with_a_handler(desk: Desk) -> None:
    """Whose key it is takes time before the body is looked at: that counts, and the body's own way here does not."""

    def slow_keys() -> Keyring:
        desk.clock.turn(0.004)
        return Keyring({}, b"")

    desk.exchanges.keyring = slow_keys
    with desk.open() as exchange:
        exchange.admit({b"x-sliceway-overhead": b"1"})
        desk.clock.turn(5)
        exchange.take_body(BODY)
        for seconds in (0.002, 0.001):  # the first engine ends before it answers
            exchange.place(never)
            desk.clock.turn(seconds)
            exchange.dispatched(desk.clock())
        exchange.answer_came()
        assert exchange.overhead_headers() == [(b"x-sliceway-overhead-ms", b"7.000")]


# ---- long prompts: nothing that is done for each token, on the thread that all streams share


def executed(work: Callable[[], object]) -> int:
    """Calls of Python and C functions while `work` runs."""
    count = 0

    def seen(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # what happens to be collected meanwhile is not its work
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def prompt_of(tokens: int, kind: str) -> bytes:
    """The body of a request with about so many tokens."""
    said: dict[str, Any] = {"model": "m", "stream": True, "max_tokens": 8}
    match kind:
        case "text":
            said["messages"] = [{"role": "user", "content": "word " * tokens}]
        case "turns":
            said["messages"] = [{"role": "user", "content": "word " * 50}] * (tokens // 50)
        case "image":
            image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "AAAA" * tokens}}
            said["messages"] = [{"role": "user", "content": [image]}]
        case _:
            said["prompt"] = list(range(1000, 1000 + tokens))
    return json.dumps(said).encode()


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("text", "/v1/chat/completions"),
        ("turns", "/v1/chat/completions"),
        ("image", "/v1/chat/completions"),
        ("token ids", "/v1/completions"),
    ],
)
async def test_a_prompt_of_sixty_thousand_tokens_is_no_more_work_than_a_short_one(
    desk: Desk, kind: str, path: str
) -> None:
    """No call and no object for a token: the body is scanned and copied by C code, whatever its length."""
    desk.exchanges.salts = CacheSalts(lambda: bytes(32))
    short, long = prompt_of(1000, kind), prompt_of(60_000, kind)

    def serve(body: bytes) -> tuple[int, int]:
        with desk.exchanges.open(ROUTES[path], b"req_1") as exchange:
            exchange.admit({})
            before = sys.getallocatedblocks()

            def whole() -> None:
                exchange.take_body(body)
                replica = placed_at_once(exchange)
                assert len(exchange.outgoing(replica)) > len(body)

            calls = executed(whole)
            made = sys.getallocatedblocks() - before
            exchange.dispatched(desk.clock())
            exchange.begun(200)
            exchange.finished()
        return calls, made

    serve(short)  # what is made once is made
    (calls, made), (more_calls, more_made) = serve(short), serve(long)
    assert len(long) > 50 * len(short) > 50_000
    assert abs(more_calls - calls) < 10, "but for what only large bodies are looked at for"
    assert more_made - made < 1000


LONG = b'{"model": "m", "stream": true, "stream_options": {"more": 1}, "max_tokens": 1}'


def read_long(desk: Desk, exchange: Exchange, raw: bytes = LONG) -> InlineReader:
    """A long body as far as the gateway has decided on it; what the reader is asked next waits for `work`."""
    reader = InlineReader(at_once=False)
    desk.exchanges.large_bodies = LargeBodies(reader)
    exchange.admit({})
    exchange.large_body().append(raw)
    exchange.read_large_body(lambda: None)
    reader.work()
    exchange.take_large_body()
    return reader


async def test_a_long_body_that_waits_to_be_written_anew_is_not_told_as_the_engines_silence(desk: Desk) -> None:
    with desk.open() as exchange:
        reader = read_long(desk, exchange)
        assert not exchange.make_way(lambda: None)
        assert isinstance(exchange.timeout_error(), BodyReaderGone)
        assert exchange.deadline == desk.clock() + 10
        reader.work()
        exchange.way_made()
        exchange.outgoing_pieces(placed_at_once(exchange))
        assert isinstance(exchange.timeout_error(), EngineTimeout)
        assert exchange.deadline == desk.clock() + 20


async def test_a_long_body_has_no_place_at_an_engine_while_it_is_written_anew(desk: Desk) -> None:
    loads = desk.exchanges.admission.loads
    with desk.open() as exchange:
        reader = read_long(desk, exchange)
        assert not exchange.make_way(lambda: None)
        assert not loads.total()
        reader.work()
        exchange.way_made()
        replica = placed_at_once(exchange)
        assert exchange.fits(replica)
        assert loads.total()
    assert not loads.total()


async def test_a_place_at_an_engine_of_another_name_is_given_back_while_the_body_is_written_for_it(desk: Desk) -> None:
    loads = desk.exchanges.admission.loads
    with desk.open() as exchange:
        reader = read_long(desk, exchange, b'{"model": "m", "max_tokens": 1}')
        assert exchange.make_way(never)
        other = placed_at_once(exchange).model_copy(update={"engine_model": "another"})
        assert not exchange.fits(other)
        assert not exchange.make_way(lambda: None, other)
        assert not loads.total()
        reader.work()
        exchange.way_made()
        placed_at_once(exchange)
        assert exchange.fits(other)
        assert exchange.outgoing_pieces(other).take() == b'{"model":"another","max_tokens":1}'
