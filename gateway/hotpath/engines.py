"""Connections to engines below aiohttp: one request at a time on each, kept and used again, parsed by llhttp.

A connection reads and writes; what an answer means is its receiver's business. It never calls its receiver from inside the parser,
so that a receiver may send the next request, or close, at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Protocol
from urllib.parse import urlsplit

import httptools

from gateway.error_map import Headers
from gateway.errors import EngineError
from gateway.hotpath.framing import is_one_chunk_of_events
from gateway.large_bodies import Pieces
from gateway.upstream import (
    KEEP_ALIVE_SECONDS,
    NOT_HTTP,
    NOT_PASSED_BACK,
    PROPER_STATUSES,
    AiohttpEngines,
    died,
    unreachable,
)
from placement.engine_tls import EngineTrust
from placement.errors import EngineTlsError

CLOSE_SECONDS = 2.0
TLS_SHUTDOWN_SECONDS = 1.0  # for an engine to say goodbye on a connection that is closed
SWEEP_SECONDS = 1.0
DRAIN_SECONDS = 5.0  # for an engine to end an answer of which nothing is wanted any longer
DRAIN_BYTES = 64 * 2**10
MAX_HEAD_BYTES = 64 * 2**10


class Receiver(Protocol):
    """Who asked. Each call may be the last that the receiver wants: it says so by `EngineConnection.release` or `abort`."""

    def passes(self, data: bytes) -> bool:
        """Whether this whole chunk of events was passed on as it is. Asked only after `EngineConnection.pass_chunks`."""
        ...

    def answered(self, status: int, headers: Headers, body: bytes, *, complete: bool) -> None:
        """The head is there, with what came of the body along with it."""
        ...

    def continued(self, body: bytes, *, complete: bool) -> None:
        """More of the body, at least a byte or the end."""
        ...

    def engine_failed(self, error: EngineError) -> None:
        """The connection ended before the answer did, or what came is not HTTP. The connection is closed."""
        ...


class EngineConnection(asyncio.Protocol):
    """One connection. `idle_since` is when it was last given back, in the loop's seconds."""

    __slots__ = (
        *(
            "_at_chunk",
            "_begun",
            "_body",
            "_complete",
            "_drained",
            "_head_bytes",
            "_headers",
            "_parser",
            "_pass",
            "_pieces",
            "_stuck",
        ),
        *(
            "_pool",
            "_receiver",
            "_reusable",
            "_status",
            "_told",
            "_until_close",
            "idle_since",
            "lost",
            "replica",
            "transport",
        ),
    )

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self._receiver: Receiver | None = None
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # set before anybody sees the connection
        self.replica = ""
        self.idle_since = 0.0
        self.lost = asyncio.Event()
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: Pieces | None = None  # of a body that is still being sent
        self._stuck = False  # the engine takes no more of it for now
        self._begin()

    def _begin(self) -> None:
        """Expect an answer."""
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._status = 0
        self._head_bytes = 0
        self._drained = 0
        self._begun = False  # the head is there
        self._told = False  # the receiver knows
        self._complete = False
        self._reusable = False
        self._until_close = True  # the body has no framing of its own
        self._at_chunk = False  # what comes next is the beginning of a chunk
        self._pass = False

    # ---- asking

    def ask(self, receiver: Receiver, replica: str, head: bytes, body: bytes) -> None:
        """Send a request; its answer goes to `receiver`."""
        self._receiver = receiver
        self.replica = replica
        if len(body) < 65536:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    def ask_in_pieces(self, receiver: Receiver, replica: str, head: bytes, pieces: Pieces) -> None:
        """Send a request whose body is large, as fast as the engine takes it and one piece per turn of the loop."""
        self._receiver = receiver
        self.replica = replica
        self._pieces, self._stuck = pieces, False
        self.transport.write(head)
        self._send_piece()

    def _send_piece(self) -> None:
        """The next piece, if there is one to send."""
        if self._pieces is None or self._stuck or self.transport.is_closing():
            return
        piece = self._pieces.take()
        if piece is None:
            self.transport.abort()  # the request is over, and its body gone: what is on its way is no request
        elif piece:
            self.transport.write(piece)
            asyncio.get_running_loop().call_soon(self._send_piece)
        else:
            self._pieces = None

    def pause_writing(self) -> None:
        """The engine takes no more for now."""
        self._stuck = True

    def resume_writing(self) -> None:
        """It does again."""
        self._stuck = False
        self._send_piece()

    def pass_chunks(self) -> None:
        """From here on show the receiver whole chunks before they are parsed."""
        self._pass = True

    def pause(self) -> None:
        """Read nothing more until `resume`: the engine is held back by its socket."""
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def release(self) -> None:
        """The receiver has what it wanted. The connection is kept, as soon as the engine has ended its answer."""
        self._receiver = None
        self._pass = False
        if self._complete:
            self._keep()
        else:
            self._pool.drain(self)

    def abort(self) -> None:
        """Close at once, which makes the engine abort the request."""
        self._receiver = None
        self.transport.abort()

    @property
    def complete(self) -> bool:
        """Whether the whole answer is there."""
        return self._complete

    def _keep(self) -> None:
        if self._reusable and self._pieces is None and not self.transport.is_closing():
            self._begin()
            self._pool.keep(self)
        else:
            self.transport.close()

    # ---- reading

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvloop's are
        """Ready for requests."""
        self.transport = transport
        self._pool.connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Pass whole chunks on where that is wanted, parse all else."""
        receiver = self._receiver
        if self._pass and self._at_chunk and is_one_chunk_of_events(data) and receiver and receiver.passes(data):
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(EngineError(NOT_HTTP, replica=self.replica))
            return
        self._at_chunk = self._at_chunk and data.endswith(b"\r\n")
        if receiver is None:
            self._unwanted(len(data))
        elif self._begun:
            self._tell(receiver)
        else:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._fail(EngineError("The engine's answer has a head without end.", replica=self.replica))

    def _tell(self, receiver: Receiver) -> None:
        parts = self._body
        body = parts[0] if len(parts) == 1 else b"".join(parts)
        self._body = []
        if self._told:
            if body or self._complete:
                receiver.continued(body, complete=self._complete)
        else:
            self._told = True
            receiver.answered(self._status, self._headers, body, complete=self._complete)

    def _unwanted(self, count: int) -> None:
        """The rest of an answer; or something that nobody asked for, after which the connection cannot be trusted."""
        self._body = []
        self._drained += count
        if self._complete and self._pool.is_draining(self):
            self._pool.drained(self)
            self._keep()
        elif self._drained > DRAIN_BYTES or not self._pool.is_draining(self):
            self.transport.abort()

    def give_up(self) -> None:
        """Close at once, and tell whoever waits for an answer."""
        self._fail(died(self.replica))

    def _fail(self, error: EngineError) -> None:
        receiver, self._receiver = self._receiver, None
        self.transport.abort()
        if receiver is not None:
            receiver.engine_failed(error)

    def eof_received(self) -> bool:
        """The engine has said all it will; the transport closes itself."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """The engine closed, or we did."""
        self._pool.lost(self)
        self.lost.set()
        self._parser = None  # type: ignore[assignment]  # it knows us: parted, both are freed without a garbage collection
        receiver, self._receiver = self._receiver, None
        if receiver is None:
            return
        if exc is None and self._begun and self._until_close:
            self._complete, self._reusable = True, False
            self._receiver = receiver
            self._tell(receiver)
        else:
            receiver.engine_failed(died(self.replica))

    # ---- llhttp's callbacks

    def on_message_begin(self) -> None:
        """An answer begins. A second one to one request would be taken for the answer to the next; raising ends the parsing."""
        if self._complete:
            raise ValueError("an answer that nobody asked for")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; those between the body's end and the message's (trailers) count for nothing."""
        if self._begun:
            return
        name = name.lower()
        if name == b"content-length" or name == b"transfer-encoding":
            self._until_close = False
        elif name not in NOT_PASSED_BACK:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is whole; one of status 1xx announces another."""
        status = self._parser.get_status_code()
        if 100 <= status < 200:
            self._headers = []
            self._until_close = True
            return
        if status not in PROPER_STATUSES:
            raise ValueError("no status of HTTP")
        if status in (204, 304):
            self._until_close = False
        self._status = status
        self._begun = True
        self._reusable = not self._until_close and self._parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        self._body.append(body)

    def on_chunk_header(self) -> None:
        """A chunk has begun."""
        self._at_chunk = False

    def on_chunk_complete(self) -> None:
        """A chunk is over. Whether the next one has begun in the same read shows at the end of the read."""
        self._at_chunk = True

    def on_message_complete(self) -> None:
        """The answer is over."""
        if self._begun:
            self._complete = True


class _Pool:
    """The connections to one endpoint."""

    def __init__(self, engines: HotEngines, endpoint: str) -> None:
        self._engines = engines
        self._loop = asyncio.get_running_loop()
        self.connections: set[EngineConnection] = set()
        self.idle: list[EngineConnection] = []  # the last one given back is the first one taken
        self.draining: dict[EngineConnection, float] = {}
        self.unix_path = endpoint[5:] if endpoint.startswith("unix:") else None
        self.encrypted = endpoint.startswith("https:")
        self.host = "engine" if self.unix_path else urlsplit(endpoint).netloc
        url = urlsplit(endpoint)
        self.address = (url.hostname or "", url.port or 80)

    def take(self) -> EngineConnection | None:
        """A kept connection that is still good."""
        good_since = self._loop.time() - KEEP_ALIVE_SECONDS
        while self.idle:
            connection = self.idle.pop()
            if not connection.transport.is_closing():
                if connection.idle_since >= good_since:
                    return connection
                connection.transport.close()
        return None

    async def connect(self) -> EngineConnection:
        """A new connection. Raises OSError, EngineTlsError."""
        connection = EngineConnection(self)
        try:
            if self.unix_path is not None:
                await self._loop.create_unix_connection(lambda: connection, self.unix_path)
            elif self.encrypted:
                await self._connect_over_tls(connection)
            else:
                await self._loop.create_connection(lambda: connection, *self.address)
        except BaseException:  # uvloop closes what it was making, and does not tell the protocol that it knows already
            self.lost(connection)
            connection.lost.set()
            raise
        return connection

    async def _connect_over_tls(self, connection: EngineConnection) -> None:
        """The name that the certificate is held against is the address. Raises OSError, EngineTlsError."""
        host, port = self.address
        context = self._engines.trust.context()
        await self._loop.create_connection(
            lambda: connection, host, port, ssl=context, server_hostname=host, ssl_shutdown_timeout=TLS_SHUTDOWN_SECONDS
        )

    def keep(self, connection: EngineConnection) -> None:
        """Have the connection used again."""
        connection.idle_since = self._loop.time()
        self.idle.append(connection)
        self._engines.sweep_later()

    def drain(self, connection: EngineConnection) -> None:
        """The rest of its answer is awaited, for a while."""
        self.draining[connection] = self._loop.time() + DRAIN_SECONDS
        self._engines.sweep_later()

    def is_draining(self, connection: EngineConnection) -> bool:
        """Whether the rest of an answer is awaited."""
        return connection in self.draining

    def drained(self, connection: EngineConnection) -> None:
        """It came."""
        self.draining.pop(connection, None)

    def lost(self, connection: EngineConnection) -> None:
        """The connection is closed. An idle one is found out when it is taken, or swept."""
        self.connections.discard(connection)
        self.draining.pop(connection, None)

    def sweep(self) -> bool:
        """Close what was kept for too long; whether there is anything left to come back for."""
        now = self._loop.time()
        kept = []
        for connection in self.idle:
            if connection.transport.is_closing():
                continue
            if connection.idle_since < now - KEEP_ALIVE_SECONDS:
                connection.transport.close()
            else:
                kept.append(connection)
        self.idle = kept
        for connection in [c for c, until in self.draining.items() if until < now]:
            connection.abort()
        return bool(kept or self.draining)

    def close(self) -> None:
        """Close everything; who waits for an answer is told that the engine died."""
        for connection in list(self.connections):
            connection.give_up()
        self.idle.clear()


class HotEngines:
    """The pools of all endpoints. Everything happens in one event loop, that of the first call."""

    def __init__(self, *, connect_timeout_seconds: float, trust: EngineTrust | None = None) -> None:
        """`trust` is asked for the context of every new connection over TLS."""
        self.trust = trust or EngineTrust()
        self._connect_timeout_seconds = connect_timeout_seconds
        self._pools: dict[str, _Pool] = {}
        self._sweeping: asyncio.TimerHandle | None = None

    def take(self, endpoint: str) -> EngineConnection | None:
        """A kept connection to `endpoint`; None where one must be made."""
        return self._pool(endpoint).take()

    def host(self, endpoint: str) -> str:
        """What stands in `host:` of requests to `endpoint`."""
        return self._pool(endpoint).host

    async def connect(self, endpoint: str, replica: str) -> EngineConnection:
        """A new connection. Raises EngineUnreachable."""
        try:
            async with asyncio.timeout(self._connect_timeout_seconds):
                return await self._pool(endpoint).connect()
        except TimeoutError as error:
            raise unreachable(error if str(error) else TimeoutError("timed out"), replica, endpoint) from error
        except (OSError, EngineTlsError) as error:
            raise unreachable(error, replica, endpoint) from error

    def retain(self, endpoints: Iterable[str]) -> None:
        """Close what belongs to other endpoints, requests in flight included."""
        for endpoint in self._pools.keys() - set(endpoints):
            self._pools.pop(endpoint).close()

    async def close(self) -> None:
        """Close everything, and see it closed; what is not closed within CLOSE_SECONDS is no reason to stay."""
        closing = [connection for pool in self._pools.values() for connection in pool.connections]
        self.retain(())
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                for connection in closing:
                    await connection.lost.wait()

    @property
    def open_connections(self) -> int:
        """Over all endpoints, idle ones included."""
        return sum(len(pool.connections) for pool in self._pools.values())

    def sweep_later(self) -> None:
        """Look at what is kept in a while; one look is planned at a time."""
        if self._sweeping is None:
            self._sweeping = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = None
        unfinished = [pool for pool in self._pools.values() if pool.sweep()]
        if unfinished:
            self.sweep_later()

    def _pool(self, endpoint: str) -> _Pool:
        pool = self._pools.get(endpoint)
        if pool is None:
            pool = self._pools[endpoint] = _Pool(self, endpoint)
        return pool


class BothEngines(AiohttpEngines):
    """`gateway.upstream.Engines`, and with it the pools of the fast relay: what is closed in one is closed in both."""

    def __init__(self, hot: HotEngines, *, connect_timeout_seconds: float) -> None:
        super().__init__(connect_timeout_seconds=connect_timeout_seconds, trust=hot.trust)
        self._hot = hot

    async def retain(self, endpoints: Iterable[str]) -> None:
        """As Engines has it."""
        kept = set(endpoints)
        self._hot.retain(kept)
        await super().retain(kept)

    async def close(self) -> None:
        """As Engines has it."""
        await self._hot.close()
        await super().close()
