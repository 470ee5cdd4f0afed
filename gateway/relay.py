"""The byte pump between a client and an engine, as a plain ASGI callable.

It knows no framework. What a request is allowed and how it is measured is `gateway.exchange`; what a stream says is
`gateway.sse`; how an engine is reached is `gateway.upstream`. What is left here is the order of reads and writes:

1. the head decides, then the body is read, bounded in size and time;
2. an engine is chosen and asked, the next one if it accepts no connection or dies before the client has a byte;
3. the first bytes of its answer are awaited before the client gets a status line, so that early failures keep their status;
4. bytes are passed on as they come. `await send` is the back-pressure: while the client does not read, nothing is read from the engine;
5. a client that leaves closes the engine's connection at once; an engine that dies ends the stream with an error event and `[DONE]`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from functools import partial
from typing import Any, Protocol

from gateway.dialects import answer_to, last_words, proper_end
from gateway.error_map import ERROR_BODY_BYTES, Headers, engine_refusal, unexpected
from gateway.errors import EngineDied, EngineUnreachable, GatewayError
from gateway.exchange import ClientLeft, Exchange, Exchanges
from gateway.large_bodies import LargeBody
from gateway.request import PASSED_ON, ROUTES, request_id
from gateway.sse import USAGE_TAIL_BYTES, StreamMeter, usage_of_body
from gateway.surface import CALL, Call
from gateway.typed_events import TypedEventMeter
from gateway.upstream import NOT_PASSED_BACK, EngineResponse, Engines
from placement.table import ReplicaRow

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

log = logging.getLogger("sliceway.relay")

WHOLE_ANSWER_BYTES = (
    4 * 2**20
)  # answers up to here are held until they are complete, so that a death in the middle is a 502
LAST_WORDS_SECONDS = 5.0  # for an error event to a client that may not be reading
AFTER_DONE_SECONDS = 5.0  # for an engine to end its answer after [DONE], so that its connection can be used again

STREAM_HEADERS: Headers = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
"""What every stream's head has besides: no proxy on the way is to hold events back."""

WATCHABLE = "sliceway.connection"  # the key in a scope under which a server may offer a Watchable


class Watchable(Protocol):
    """A client's connection that tells when it is lost. A server that has none is asked by `receive`, at the cost of a task."""

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the client closes, instead of the one before."""
        ...

    def forget(self, callback: Callable[[], None]) -> None:
        """Call it no longer, if it is still the one."""
        ...


class AsgiRelay:
    """Serves the routes of `gateway.surface`; those whose path does not tell all come with a `Call` in their scope."""

    def __init__(self, exchanges: Exchanges, engines: Engines) -> None:
        self._exchanges = exchanges
        self._engines = engines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request to one of the routes."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        call: Call | None = scope.get(CALL)
        route = call.route if call else ROUTES[scope["path"]]
        with self._exchanges.open(route, request_id(headers.get(b"x-request-id")), call=call) as exchange:
            try:
                await self._serve(exchange, headers, scope.get(WATCHABLE), receive, send)
            except ClientLeft:
                exchange.left()
            except asyncio.CancelledError:
                await _interrupted(exchange, send)
            except GatewayError as error:
                await _tell(exchange, error, send)
            except Exception as error:
                log.exception("request %s failed", exchange.request_id.decode())
                await _tell(exchange, unexpected(error), send)

    async def _serve(
        self,
        exchange: Exchange,
        headers: Mapping[bytes, bytes],
        connection: Watchable | None,
        receive: Receive,
        send: Send,
    ) -> None:
        exchange.admit(headers)
        whole = await _read_body(exchange, receive, self._exchanges.policy.held_bytes)
        unwatch = _watch(exchange, connection, receive)
        try:
            await _take_body(exchange, whole)
            passed_on = _passed_on(exchange, headers)
            while not await self._served(exchange, passed_on, send):
                pass
        finally:
            unwatch()

    async def _served(self, exchange: Exchange, passed_on: Mapping[str, str], send: Send) -> bool:
        """Whether the client has its answer. False if the engine died and another is to be asked, which the exchange decides."""
        try:
            response = await self._ask(exchange, passed_on)
            try:
                await _pass_on(exchange, response, send, self._exchanges.clock)
            finally:
                response.close()
        except EngineDied as error:
            exchange.died(error)
            return False
        return True

    async def _ask(self, exchange: Exchange, passed_on: Mapping[str, str]) -> EngineResponse:
        """Send the request to one replica after another until one accepts the connection."""
        while True:
            replica = await _place(exchange)
            if exchange.large and not exchange.fits(replica):
                await _make_way(exchange, replica)
                continue
            body = exchange.outgoing_pieces(replica) if exchange.large else exchange.outgoing(replica)
            sent_at = self._exchanges.clock()
            try:
                response = await self._engines.post(
                    replica, exchange.target, passed_on, body, method=exchange.route.method
                )
            except EngineUnreachable as error:
                exchange.unreachable(error)
                continue
            exchange.dispatched(sent_at)
            return response


async def _place(exchange: Exchange) -> ReplicaRow:
    """The replica to ask, at once or when it is this request's turn. Raises what `Exchange.place` and `placed` raise."""
    turn = asyncio.Event()
    replica = exchange.place(turn.set)
    if replica is None:
        await turn.wait()
        replica = exchange.placed()
    return replica


def _passed_on(exchange: Exchange, headers: Mapping[bytes, bytes]) -> dict[str, str]:
    """What the engine gets of the request's head."""
    passed_on = {"x-request-id": exchange.request_id.decode()}
    if (content_type := exchange.content_type) is not None:
        passed_on["content-type"] = content_type
    for name in PASSED_ON:
        if (value := headers.get(name)) is not None:
            passed_on[name.decode()] = value.decode("latin-1")
    return passed_on


async def _read_body(exchange: Exchange, receive: Receive, held_bytes: int) -> bytes | LargeBody:
    """The whole body; where it is longer than `held_bytes`, the large body that it lies in.

    Raises BodyTooLarge as soon as it is longer than it may be, whatever its head said; what `Exchange.large_body` raises; ClientLeft.
    """
    parts: list[bytes] = []
    size = 0
    large: LargeBody | None = None
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        part: bytes = message.get("body", b"")
        size += len(part)
        parts.append(part)
        if size > held_bytes:
            large = exchange.large_body()
            for held in parts:
                large.append(held)
            parts.clear()
        if not message.get("more_body", False):
            return large or (parts[0] if len(parts) == 1 else b"".join(parts))


async def _take_body(exchange: Exchange, whole: bytes | LargeBody) -> None:
    """Decide on the body, a large one as soon as it is read."""
    if isinstance(whole, bytes):
        exchange.take_body(whole)
        return
    read = asyncio.Event()
    exchange.read_large_body(read.set)
    await read.wait()
    exchange.take_large_body()
    await _make_way(exchange)


async def _make_way(exchange: Exchange, replica: ReplicaRow | None = None) -> None:
    """Have a large body ready for the engines, or for `replica`."""
    ready = asyncio.Event()
    if not exchange.make_way(ready.set, replica):
        await ready.wait()
        exchange.way_made()


def _watch(exchange: Exchange, connection: Watchable | None, receive: Receive) -> Callable[[], object]:
    """Have the exchange told when its client leaves; gives what ends that."""
    if connection is not None:
        connection.when_lost(exchange.client_left)
        return partial(connection.forget, exchange.client_left)
    return asyncio.create_task(_wait_for_the_end(exchange, receive)).cancel


async def _wait_for_the_end(exchange: Exchange, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.client_left()


async def _pass_on(exchange: Exchange, response: EngineResponse, send: Send, clock: Callable[[], float]) -> None:
    if response.status >= 400:
        raise engine_refusal(response.status, await _read_at_most(response, ERROR_BODY_BYTES))
    if dict(response.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
        await _stream(exchange, response, send, clock)
    else:
        await _whole(exchange, response, send)


async def _stream(exchange: Exchange, response: EngineResponse, send: Send, clock: Callable[[], float]) -> None:
    meter = exchange.stream_meter()
    passed = await _first_events(meter, response, clock)
    exchange.answer_came()
    await _begin_stream(exchange, response, send)
    try:
        await _pump(exchange, meter, response, passed, send, clock)
    except EngineDied:
        if not meter.ended:
            raise
    if not meter.done:
        await _close_stream(exchange, meter, send)
        return
    exchange.deadline = clock() + AFTER_DONE_SECONDS
    while await response.read_some():
        pass


async def _first_events(
    meter: StreamMeter | TypedEventMeter, response: EngineResponse, clock: Callable[[], float]
) -> bytes:
    """What the client gets first. An error event before it is still an error status: raises EngineRefused, EngineDied."""
    passed = b""
    while not passed:
        if not (data := await response.read_some()):
            raise EngineDied("The engine ended its answer before it began.")
        passed = meter.feed(data, clock())
        if meter.error is not None:
            raise meter.error
    return passed


async def _pump(
    exchange: Exchange,
    meter: StreamMeter | TypedEventMeter,
    response: EngineResponse,
    passed: bytes,
    send: Send,
    clock: Callable[[], float],
) -> None:
    """Pass events on until `[DONE]` or the end of the engine's answer."""
    idle_seconds = exchange.idle_timeout_seconds
    while True:
        if meter.done:
            exchange.finished()
            await send({"type": "http.response.body", "body": passed, "more_body": False})
            return
        if passed:
            await send({"type": "http.response.body", "body": passed, "more_body": True})
        if not (data := await response.read_some()):
            return
        now = clock()
        exchange.deadline = now + idle_seconds
        passed = meter.feed(data, now)


async def _begin_stream(exchange: Exchange, response: EngineResponse, send: Send) -> None:
    headers = _passed_back(exchange, response) + STREAM_HEADERS
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    exchange.begun(response.status)


async def _close_stream(exchange: Exchange, meter: StreamMeter | TypedEventMeter, send: Send) -> None:
    """The engine's answer is over without `[DONE]`: if it was complete, only that word is missing. Raises EngineDied if it was not."""
    if not meter.ended:
        raise EngineDied("The engine stopped before it finished this answer.")
    exchange.finished()
    await send({"type": "http.response.body", "body": proper_end(exchange.route), "more_body": False})


async def _whole(exchange: Exchange, response: EngineResponse, send: Send) -> None:
    """An answer in one piece; one that is too large to hold is passed on as it comes."""
    held = bytearray()
    while part := await response.read_some():
        held += part
        if len(held) > WHOLE_ANSWER_BYTES:
            await _large(exchange, response, held, send)
            return
    exchange.answer_came()
    whole = bytes(held)
    exchange.usage = usage_of_body(whole)
    headers = _passed_back(exchange, response)
    headers.append((b"content-length", b"%d" % len(whole)))
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    exchange.begun(response.status)
    exchange.finished()
    await send({"type": "http.response.body", "body": whole, "more_body": False})


async def _large(exchange: Exchange, response: EngineResponse, held: bytearray, send: Send) -> None:
    exchange.answer_came()
    await send({"type": "http.response.start", "status": response.status, "headers": _passed_back(exchange, response)})
    exchange.begun(response.status)
    part = tail = bytes(held)
    while part:
        await send({"type": "http.response.body", "body": part, "more_body": True})
        part = await response.read_some()
        exchange.begun(response.status)
        tail = (tail + part)[-USAGE_TAIL_BYTES:]
    exchange.usage = usage_of_body(tail)
    exchange.finished()
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _passed_back(exchange: Exchange, response: EngineResponse) -> Headers:
    return answer_headers(exchange, [header for header in response.headers if header[0] not in NOT_PASSED_BACK])


def answer_headers(exchange: Exchange, passed_back: Headers) -> Headers:
    """The head of an answer: what the engine said without NOT_PASSED_BACK, and what the gateway says."""
    headers = [*passed_back, (b"x-request-id", exchange.request_id), *exchange.limit_headers()]
    if exchange.route.dialect == "anthropic":
        headers.append((b"request-id", exchange.request_id))
    if exchange.replica is not None:
        headers.append((b"x-sliceway-replica", exchange.replica.replica.encode()))
    if exchange.tells_overhead:
        headers += exchange.overhead_headers()
    return headers


async def _read_at_most(response: EngineResponse, limit: int) -> bytes:
    held = b""
    while len(held) < limit and (part := await response.read_some()):
        held += part
    return held[:limit]


async def _interrupted(exchange: Exchange, send: Send) -> None:
    reason = exchange.interruption()
    if reason is None:
        raise asyncio.CancelledError
    if isinstance(reason, ClientLeft):
        exchange.left()
    else:
        await _tell(exchange, reason, send)


async def _tell(exchange: Exchange, error: GatewayError, send: Send) -> None:
    """Answer with `error`, or end with it what has begun. An answer in one piece that has begun is cut off, which is its error."""
    if exchange.complete:
        return
    exchange.failed(error)
    try:
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            if exchange.answering and exchange.streaming:
                await send(
                    {"type": "http.response.body", "body": last_words(exchange.route, error), "more_body": False}
                )
            elif not exchange.answering:
                answer = answer_to(exchange.route, error, exchange.request_id, exchange.limit_headers())
                await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
                await send({"type": "http.response.body", "body": answer.body, "more_body": False})
    except TimeoutError:
        log.info("request %s: the client does not read, its connection is closed", exchange.request_id.decode())
