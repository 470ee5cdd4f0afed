"""One request on the fast relay: what `gateway.relay` does as a coroutine, as the steps of a state machine.

The steps are called by the client's connection (`take_part`, `body_complete`, `client_lost`, `pause`, `resume`), by the engine's
(`answered`, `continued`, `passes`, `engine_failed`) and by the exchange (a place is granted, an interruption). None of them waits; the only task there
can be makes a new connection to an engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar, Literal, Protocol

from gateway.dialects import answer_to, last_words, proper_end
from gateway.error_map import ERROR_BODY_BYTES, Headers, engine_refusal, unexpected
from gateway.errors import EngineDied, EngineError, EngineUnreachable, GatewayError
from gateway.exchange import ClientLeft, Exchanges
from gateway.hotpath.engines import EngineConnection, HotEngines
from gateway.hotpath.framing import LAST_CHUNK, chunk, request_head, request_prefix, response_head
from gateway.large_bodies import LargeBody
from gateway.relay import STREAM_HEADERS, WHOLE_ANSWER_BYTES, answer_headers
from gateway.request import PASSED_ON as _PASSED_ON
from gateway.sse import USAGE_TAIL_BYTES, StreamMeter, usage_of_body
from gateway.surface import Route
from placement.table import ReplicaRow

log = logging.getLogger("sliceway.relay")

CHUNKED = (b"transfer-encoding", b"chunked")
GATHERED_BYTES = 64 * 2**10  # of a large body, before they are written to where it lies
PASSED_ON = frozenset(_PASSED_ON)
_EVENT_STREAM = b"text/event-stream"


class Client(Protocol):
    """The client's connection as a request sees it."""

    transport: asyncio.Transport

    def hot_ended(self, *, keep_alive: bool) -> None:
        """The request is over, and its answer written."""
        ...

    def paced(self, count: int) -> None:
        """So many bytes of a large body have come: who sends them waits if that is much for the moment."""
        ...

    def is_long(self, held_bytes: int) -> bool:
        """Whether a body is under way that is too long to be read to its end for nothing. `held_bytes` of it have come."""
        ...


_State = Literal[
    "body",
    "reading",  # a large body is being read
    "engine",  # a place, a connection, or the head of the answer
    "whole",  # the rest of an answer in one piece
    "refusal",  # the rest of an engine's error
    "opening",  # the first event
    "stream",
    "large",  # the rest of an answer that is too large to be held
    "over",
]
"""What the request waits for."""


class _Nobody:
    """Stands where uvicorn keeps the event that wakes an ASGI application; here none sleeps."""

    def set(self) -> None: ...


class HotRequest:
    """See the module. `response_complete` to `message_event` are what uvicorn's protocol asks of the request it serves."""

    message_event: ClassVar = _Nobody()

    # What a request begins with. Most of it is never set on one that is answered at once.
    _engine: EngineConnection | None = None
    _connecting: asyncio.Task[None] | None = None
    _meter: StreamMeter | None = None
    _upstream_headers: Headers = []  # noqa: RUF012  # replaced, never changed
    _further: Headers = []  # noqa: RUF012  # likewise
    _held_bytes = 0
    _large_body: LargeBody | None = None
    _status = 0
    _state: _State = "body"
    response_complete = False
    disconnected = False

    def __init__(
        self,
        client: Client,
        exchanges: Exchanges,
        engines: HotEngines,
        route: Route,
        headers: Mapping[bytes, bytes],
        own_id: bytes,
        *,
        keep_alive: bool,
        paused: bool,
    ) -> None:
        self._client = client
        self._clock = exchanges.clock
        self._engines = engines
        self._held: list[bytes] = []
        self._limit = exchanges.policy.held_bytes
        if not PASSED_ON.isdisjoint(headers):
            self._further = [(name, headers[name]) for name in PASSED_ON if name in headers]
        self._paused = paused  # the client does not read, not even the answer before
        self.keep_alive = keep_alive
        self._exchange = exchanges.open(route, own_id, self._interrupted)

    # ---- the client's side

    def start(self, headers: Mapping[bytes, bytes]) -> None:
        """The head is there; to be called once. A refusal may be written before this returns."""
        self._exchange.__enter__()
        self._guarded(self._exchange.admit, headers)

    def take_part(self, data: bytes) -> None:
        """A part of the body. More than there may be is refused as soon as it is there, whatever the head said."""
        self._held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes <= self._limit:
            return
        first = self._large_body is None
        try:
            count = self._put_away()
        except Exception as error:  # noqa: BLE001  # the root of what runs for this request
            self.keep_alive = False  # nobody knows how much more there is
            self._fault(error)
        else:
            self._client.paced(len(data) if first else count)  # what came before is no more than of a small body

    def _put_away(self) -> int:
        """What is held lies elsewhere from here on: so many bytes, in one write, since a client may send chunks of a byte each."""
        held, self._held = self._held, []
        whole = held[0] if len(held) == 1 else b"".join(held)
        self._large_body = self._exchange.large_body()
        self._large_body.append(whole)
        self._limit = self._held_bytes + min(GATHERED_BYTES, self._large_body.left)
        return len(whole)

    def body_complete(self) -> None:
        """The body is whole."""
        if self._large_body is not None:
            self._state = "reading"
            self._guarded(self._read_large)
            return
        held, self._held = self._held, []
        self._state = "engine"
        try:
            self._exchange.take_body(held[0] if len(held) == 1 else b"".join(held))
            self._place()
        except Exception as error:  # noqa: BLE001  # the root of what runs for this request
            self._fault(error)

    def _read_large(self) -> None:
        if self._held:
            self._put_away()
        self._exchange.read_large_body(partial(self._guarded, self._body_read))

    def _body_read(self) -> None:
        self._exchange.take_large_body()
        self._make_way()

    def _make_way(self, replica: ReplicaRow | None = None) -> None:
        if self._exchange.make_way(partial(self._guarded, self._way_made), replica):
            self._place()

    def _way_made(self) -> None:
        self._exchange.way_made()
        self._place()

    def client_lost(self) -> None:
        """The client closed its connection."""
        self.disconnected = True
        if self._state != "over":
            self._exchange.client_left()

    def pause(self) -> None:
        """The client does not read: nothing is read from the engine."""
        self._paused = True
        if self._engine is not None:
            self._engine.pause()

    def resume(self) -> None:
        """It reads again."""
        self._paused = False
        if self._engine is not None:
            self._engine.resume()

    # ---- to an engine

    def _place(self) -> None:
        """Ask for a replica until one is asked, or has to be waited for."""
        self._state = "engine"
        replica = self._exchange.place(self._turn)
        if replica is not None:
            self._ask(replica)

    def _turn(self) -> None:
        self._guarded(self._placed)

    def _placed(self) -> None:
        if self._state != "over":
            self._ask(self._exchange.placed())

    def _ask(self, replica: ReplicaRow) -> None:
        if self._large_body is None or self._exchange.fits(replica):
            self._connection_to(replica)
        else:
            self._make_way(replica)

    def _connection_to(self, replica: ReplicaRow) -> None:
        connection = self._engines.take(replica.endpoint)
        if connection is not None:
            self._send(replica, connection)
        else:
            self._connecting = asyncio.ensure_future(self._connect(replica))

    async def _connect(self, replica: ReplicaRow) -> None:
        try:
            connection = await self._engines.connect(replica.endpoint, replica.replica)
        except EngineUnreachable as error:
            self._connecting = None
            self._guarded(self._unreachable, error)
        else:
            self._connecting = None
            self._guarded(self._send, replica, connection)

    def _unreachable(self, error: EngineUnreachable) -> None:
        self._exchange.unreachable(error)
        self._place()

    def _send(self, replica: ReplicaRow, connection: EngineConnection) -> None:
        exchange = self._exchange
        self._engine = connection
        if self._large_body is not None:
            self._send_large(replica, connection)
            return
        body = exchange.outgoing(replica)
        prefix = request_prefix(self._engines.host(replica.endpoint), exchange.route.path, replica.secret)
        sent_at = self._clock()
        connection.ask(self, replica.replica, request_head(prefix, exchange.request_id, self._further, len(body)), body)
        exchange.dispatched(sent_at)
        if self._paused:
            connection.pause()

    def _send_large(self, replica: ReplicaRow, connection: EngineConnection) -> None:
        exchange = self._exchange
        pieces = exchange.outgoing_pieces(replica)
        prefix = request_prefix(self._engines.host(replica.endpoint), exchange.route.path, replica.secret)
        sent_at = self._clock()
        head = request_head(prefix, exchange.request_id, self._further, pieces.length)
        connection.ask_in_pieces(self, replica.replica, head, pieces)
        exchange.dispatched(sent_at)
        if self._paused:
            connection.pause()

    # ---- from an engine

    def answered(self, status: int, headers: Headers, body: bytes, *, complete: bool) -> None:
        """The head of the answer decides how the rest is read."""
        self._status = status
        self._upstream_headers = headers
        self._held_bytes = 0
        if status >= 400:
            self._state = "refusal"
        elif _content_type(headers).startswith(_EVENT_STREAM):
            self._state = "opening"
            meter = self._exchange.stream_meter()
            assert isinstance(meter, StreamMeter), "a plain route streams chunks"
            self._meter = meter
        else:
            self._state = "whole"
        if body or complete:
            self.continued(body, complete=complete)

    def continued(self, body: bytes, *, complete: bool) -> None:
        """More of the answer."""
        if not self._exchange.answering and self._exchange.tells_overhead:
            self._exchange.answer_came()
        try:
            _STEPS[self._state](self, body, complete)
        except Exception as error:  # noqa: BLE001  # the root of what runs for this request
            self._fault(error)

    def passes(self, data: bytes) -> bool:
        """A whole chunk of events: written as it is if there is nothing particular in it."""
        exchange, meter = self._exchange, self._meter
        now = self._clock()
        if meter is None or not meter.passes(data, now):
            return False
        exchange.deadline = now + exchange.idle_timeout_seconds
        self._client.transport.write(data)
        return True

    def engine_failed(self, error: EngineError) -> None:
        """The answer did not come to its end."""
        self._engine = None
        if self._state == "stream" and self._meter is not None and self._meter.ended:
            self._guarded(self._end_stream)
        elif isinstance(error, EngineDied):
            self._guarded(self._retry, error)
        else:
            self._tell(error)

    def _retry(self, error: EngineDied) -> None:
        """Ask another engine if the client has had nothing; raises `error` if it has."""
        self._held = []
        self._exchange.died(error)
        self._place()

    def _refusal(self, body: bytes, complete: bool) -> None:
        self._held.append(body)
        self._held_bytes += len(body)
        whole = b"".join(self._held)
        if complete or len(whole) >= ERROR_BODY_BYTES:
            raise engine_refusal(self._status, whole[:ERROR_BODY_BYTES])

    def _whole(self, body: bytes, complete: bool) -> None:
        """An answer in one piece is held until it is complete, so that a death in the middle of it has a status."""
        if complete and not self._held:
            self._answer_whole(body)
            return
        self._held.append(body)
        self._held_bytes += len(body)
        if complete:
            self._answer_whole(b"".join(self._held))
        elif self._held_bytes > WHOLE_ANSWER_BYTES:
            self._begin_large()

    def _answer_whole(self, whole: bytes) -> None:
        exchange = self._exchange
        exchange.usage = usage_of_body(whole)
        headers = answer_headers(exchange, self._upstream_headers)
        headers.append((b"content-length", b"%d" % len(whole)))
        head = response_head(self._status, headers, keep_alive=self.keep_alive)
        exchange.begun(self._status)
        exchange.finished()
        self._client.transport.write(head + whole)
        self._end()

    def _begin_large(self) -> None:
        held, self._held = b"".join(self._held), []
        self._begin(answer_headers(self._exchange, self._upstream_headers), held)
        self._held = [held[-USAGE_TAIL_BYTES:]]
        self._state = "large"

    def _large(self, body: bytes, complete: bool) -> None:
        exchange = self._exchange
        exchange.begun(self._status)
        self._held = [(self._held[0] + body)[-USAGE_TAIL_BYTES:]]
        self._client.transport.write(chunk(body))
        if complete:
            exchange.usage = usage_of_body(self._held[0])
            exchange.finished()
            self._client.transport.write(LAST_CHUNK)
            self._end()

    def _opening(self, body: bytes, complete: bool) -> None:
        """The first event is awaited before the status line. An error event is still an error status."""
        meter = self._meter
        assert meter is not None
        passed = meter.feed(body, self._clock()) if body else b""
        if meter.error is not None:
            raise meter.error
        if not passed:
            if complete:
                raise EngineDied("The engine ended its answer before it began.")
            return
        self._begin([*answer_headers(self._exchange, self._upstream_headers), *STREAM_HEADERS], b"")
        self._state = "stream"
        if self._engine is not None:
            self._engine.pass_chunks()
        self._pass_events(meter, passed, complete)

    def _stream(self, body: bytes, complete: bool) -> None:
        exchange, meter = self._exchange, self._meter
        assert meter is not None
        now = self._clock()
        exchange.deadline = now + exchange.idle_timeout_seconds
        self._pass_events(meter, meter.feed(body, now) if body else b"", complete)

    def _pass_events(self, meter: StreamMeter, passed: bytes, complete: bool) -> None:
        if meter.done:
            self._exchange.finished()
            self._client.transport.write(chunk(passed) + LAST_CHUNK)
            self._end()
            return
        if passed:
            self._client.transport.write(chunk(passed))
        if complete:
            self._end_stream()

    def _end_stream(self) -> None:
        """The engine's answer is over without `[DONE]`: if it was complete, only that word is missing. Raises EngineDied if not."""
        assert self._meter is not None
        if not self._meter.ended:
            raise EngineDied("The engine stopped before it finished this answer.")
        self._exchange.finished()
        self._client.transport.write(chunk(proper_end(self._exchange.route)) + LAST_CHUNK)
        self._end()

    def _begin(self, headers: Headers, body: bytes) -> None:
        """Write the head of a chunked answer, and `body`."""
        head = response_head(self._status, [*headers, CHUNKED], keep_alive=self.keep_alive)
        self._client.transport.write(head + chunk(body))
        self._exchange.begun(self._status)

    # ---- ends

    def _guarded(self, step: Callable[..., None], *arguments: object) -> None:
        """Run one step; what it raises is told to the client."""
        try:
            step(*arguments)
        except Exception as error:  # noqa: BLE001  # the root of what runs for this request
            self._fault(error)

    def _fault(self, error: Exception) -> None:
        if isinstance(error, GatewayError):
            self._tell(error)
        else:
            log.error("request %s failed", self._exchange.request_id.decode(), exc_info=error)
            self._tell(unexpected(error))

    def _interrupted(self) -> None:
        """The exchange was told to end."""
        reason = self._exchange.interruption()
        if isinstance(reason, ClientLeft):
            self._exchange.left()
            self.keep_alive = False
            self._end()
        elif reason is not None:
            self._tell(reason)

    def _tell(self, error: GatewayError) -> None:
        """Answer with `error`, or end with it what has begun. An answer in one piece that has begun is cut off, which is its error."""
        exchange, transport = self._exchange, self._client.transport
        if self._state == "over":
            return
        exchange.failed(error)
        if not exchange.answering:
            answer = answer_to(exchange.route, error, exchange.request_id, exchange.limit_headers())
            headers = [(name, value) for name, value in answer.headers if name != b"connection"]
            closes = len(headers) < len(answer.headers) or self._client.is_long(self._held_bytes)
            self.keep_alive = self.keep_alive and not closes
            transport.write(response_head(answer.status, headers, keep_alive=self.keep_alive) + answer.body)
        elif exchange.streaming and not self._paused:
            transport.write(chunk(last_words(exchange.route, error)) + LAST_CHUNK)
        else:
            log.info("request %s: its connection is closed in the middle", exchange.request_id.decode())
            transport.abort()
        self._end()

    def _end(self) -> None:
        """Give everything back. The engine's connection is kept where its answer is over, or nearly."""
        self._state = "over"
        self.response_complete = True
        exchange, engine = self._exchange, self._engine
        self._engine = self._meter = None
        self._held = []
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        exchange.__exit__(None, None, None)
        if engine is not None:
            if self._paused:
                engine.resume()
            if exchange.complete or engine.complete:
                engine.release()
            else:
                engine.abort()
        self._client.hot_ended(keep_alive=self.keep_alive)


def _content_type(headers: Headers) -> bytes:
    for name, value in headers:
        if name == b"content-type":
            return value
    return b""


_STEPS: Mapping[_State, Callable[[HotRequest, bytes, bool], None]] = {
    "whole": HotRequest._whole,
    "refusal": HotRequest._refusal,
    "opening": HotRequest._opening,
    "stream": HotRequest._stream,
    "large": HotRequest._large,
}
