"""uvicorn's HTTP protocol with the bounds that it lacks: the size of a request's head, and the time it may take.

llhttp bounds neither, so that one client could feed headers for ever, or open a thousand connections and say nothing.
What is refused here has no ASGI scope yet, so the answers are written to the transport.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.error_map import Headers, error_answer
from gateway.errors import GatewayError, HeadTooLarge, MalformedRequest, RequestTimeout
from gateway.relay import WATCHABLE
from gateway.request import request_id

# After a refusal the rest of a body up to here is read, and the connection serves on; before a longer one the answer says
# `connection: close`. No single read is longer, so that a longer body never ends in the read in which it began.
KEPT_BYTES = 256 * 2**10
# How much of a longer one is read and thrown away, and for how long, so that its sender gets to see the refusal (RFC 9112, 9.6).
LINGER_BYTES = 4 * 2**20
LINGER_SECONDS = 10.0
# How much of them is read in all per tick, so that whoever sends them takes no more than this of the one thread: 16 MiB/s.
LINGER_TICK_SECONDS = 0.01
LINGER_TICK_BYTES = 16 * 2**20 // 100
# What is kept of an answer for a client that does not read, here and once more in the kernel; then nothing is read from the engine.
UNSENT_BYTES = 16 * 2**10


# Of two, one server would believe the first, another one the last.
ONLY_ONCE = (b"authorization", b"x-api-key", b"content-type")


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """Of one request line with its headers."""

    max_bytes: int
    timeout_seconds: float


class LingerBudget:
    """Of all connections whose long bodies are read: so many bytes per tick, whoever sends them, so that they take no more of the one thread.

    Who waits goes on in its turn, and no more of them at once than there is room for in a tick: each may read KEPT_BYTES before it is stopped
    again. The defaults are for bodies of refused requests.
    """

    def __init__(self, tick_bytes: int = LINGER_TICK_BYTES, tick_seconds: float = LINGER_TICK_SECONDS) -> None:
        self._tick_bytes = tick_bytes
        self._tick_seconds = tick_seconds
        self._left = tick_bytes
        self._waiting: dict[BoundedHttpProtocol, None] = {}  # by turn, each once however many parts it read
        self._tick: asyncio.TimerHandle | None = None

    def spend(self, count: int, connection: BoundedHttpProtocol) -> None:
        """`connection` has read `count` bytes; it is paused where that is too much for this tick."""
        self._left -= count
        if self._tick is None:
            self._tick = connection.loop.call_later(self._tick_seconds, self._refill, connection.loop)
        if self._left < 0:
            connection.flow.pause_reading()
            self._waiting.setdefault(connection)

    def _refill(self, loop: asyncio.AbstractEventLoop) -> None:
        self._left = min(self._tick_bytes, self._left + self._tick_bytes)
        self._tick = None
        room = self._left
        while self._waiting and room >= 0:
            connection = next(iter(self._waiting))
            del self._waiting[connection]
            if not connection.transport.is_closing():
                connection.flow.resume_reading()
                room -= KEPT_BYTES
        if self._waiting or self._left < 0:
            self._tick = loop.call_later(self._tick_seconds, self._refill, loop)


class _Parting:
    """The transport of a request with a long body, as uvicorn uses one: closing it while the body comes lets the sender see the answer."""

    def __init__(self, connection: BoundedHttpProtocol) -> None:
        self._connection = connection
        self.write = connection.transport.write
        self.is_closing = connection.transport.is_closing

    def close(self) -> None:
        """The answer is written, or cannot be."""
        self._connection.part()


class BoundedHttpProtocol(HttpToolsProtocol):
    """One client connection. `limits` and `linger` are set on the subclass that `bounded_by` makes; `expire` is to be called now and then.

    `more_headers` gives what every answer of this server has; what is refused here has them as well.
    """

    limits: HeadLimits
    linger: LingerBudget
    more_headers: Callable[[], Headers] = staticmethod(list)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_since: float | None = None  # None while no head is awaited
        self._head_bytes = 0
        self._read_bytes = 0
        self._body_open = False
        self._body_bytes = 0  # of a body that ASGI gets
        self._kept_alive: bool | None = None  # what the request's `keep_alive` is once its long body is whole
        self._lingering_since: float | None = None
        self._lingered_bytes = 0
        self._parting = False  # the last answer is written, and the client is given time to see it
        self._on_lost: Callable[[], None] | None = None

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Have `callback` called once the client closes, instead of the one before; `gateway.relay.Watchable`."""
        self._on_lost = callback

    def forget(self, callback: Callable[[], None]) -> None:
        """Call it no longer. A request may end later than the next one on its connection begins, whose callback stays."""
        if self._on_lost == callback:
            self._on_lost = None

    def connection_lost(self, exc: Exception | None) -> None:
        """The client closed, or we did."""
        super().connection_lost(exc)
        if self._on_lost is not None:
            self._on_lost()
        # Request and connection know each other. Parted, both are freed at once, and none of it waits for a garbage collection.
        self.cycle = self.scope = self._on_lost = None  # type: ignore[assignment]

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The first head is awaited from here, later ones from their first byte."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=UNSENT_BYTES)
        self._head_since = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """Count what an unfinished head adds up to. The read in which a later head begins may hold a body's end, and is not counted."""
        if self._parting:
            self._throw_away(len(data))
            return
        in_head = self._head_since is not None
        self._read_bytes = len(data)
        super().data_received(data)
        if in_head and self._head_since is not None:
            self._head_bytes += len(data)
            if self._head_bytes > self.limits.max_bytes:
                self.refuse(self._too_large())

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self.make_scope()
        self.await_head()

    def make_scope(self) -> None:
        """What ASGI is told of the request, still empty."""
        super().on_message_begin()
        self.scope[WATCHABLE] = self  # type: ignore[literal-required]  # an extension of our own

    def await_head(self) -> None:
        """A head has begun, and is to be there in time."""
        if self._head_since is None:
            self._head_since = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header. What follows a chunked body (a trailer) is none: it would come too late to be checked."""
        if not self._body_open:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self.head_complete()
        self.serve()

    def serve(self) -> None:
        """Hand the request to ASGI, at once or when the one before it is answered. A doubtful head is refused, by ValueError to the parser."""
        if (what := self._doubt()) is not None:
            self.refuse(MalformedRequest(what))
            raise ValueError(what)
        super().on_headers_complete()
        if self.is_last:
            self.cycle.keep_alive = False
        if self.expect_100_continue or self.announced > KEPT_BYTES:
            self._await_long_body()

    @property
    def announced(self) -> int:
        """How long the request's body is, as its head says; 0 where it does not."""
        return next((int(value) for name, value in self.headers if name == b"content-length"), 0)

    def _await_long_body(self) -> None:
        """Whatever answers before the body is whole is the connection's last answer: its rest is not read to the end.

        The same where the client waits to be told to continue: a refusal leaves open whether its body follows.
        """
        if self._kept_alive is None:
            self._kept_alive, self.cycle.keep_alive = self.cycle.keep_alive, False
            self.cycle.transport = _Parting(self)  # type: ignore[assignment]  # as much of it as is used

    @property
    def is_last(self) -> bool:
        """Whether the request that is read is the connection's last one, because the server retires."""
        return getattr(self.server_state, "last", False)

    def _doubt(self) -> str | None:
        """What two servers could read differently in this head, and llhttp lets pass (RFC 9112, 3.2; RFC 9110, 5.3)."""
        if (version := self.parser.get_http_version()) not in ("1.0", "1.1"):
            return f"This server speaks HTTP/1.1, not HTTP/{version}."
        names = [name for name, _ in self.headers]
        if names.count(b"host") != 1 and (version == "1.1" or b"host" in names):
            return "A request has exactly one Host header."
        twice = next((name for name in ONLY_ONCE if names.count(name) > 1), None)
        return f"The header {twice.decode()!r} stands there twice." if twice else None

    def head_complete(self) -> None:
        """The head is whole; it may still be too large, which is answered, and raises ValueError to stop the parser."""
        if self._parting:
            raise ValueError("a request after the last one")
        self._head_since = None
        seen, self._head_bytes = self._head_bytes + self._read_bytes, 0
        if seen > self.limits.max_bytes and self._size_of_head() > self.limits.max_bytes:
            self.refuse(self._too_large())
            raise ValueError("head too large")  # ends in send_400_response, which finds the connection closed
        self._body_open = True

    def _size_of_head(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def on_body(self, body: bytes) -> None:
        """Throw away what is left of a refused body, up to a bound."""
        if self.cycle.response_complete:
            self._throw_away(len(body))
        else:
            self._body_bytes += len(body)
            if self._body_bytes > KEPT_BYTES:
                self._await_long_body()
        super().on_body(body)

    def _throw_away(self, count: int) -> None:
        self._lingered_bytes += count
        self.linger.spend(count, self)
        if self._lingered_bytes > LINGER_BYTES:
            self.transport.abort()

    def on_message_complete(self) -> None:
        """The body is whole. If it was answered before, the connection is idle from here on."""
        super().on_message_complete()
        if self._kept_alive is not None and not self.cycle.response_started:
            self.cycle.keep_alive = self._kept_alive
        self.body_over()
        if self.cycle.response_complete and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def body_over(self) -> None:
        """What comes next is another request."""
        self._body_open = False
        if not self._parting:
            self._body_bytes = 0
            self._kept_alive = None
            self._lingering_since = None
            self._lingered_bytes = 0

    def part(self) -> None:
        """The last answer is written: close, at once if the request is whole.

        If it is not, closing at once would reset the connection, and its client might never see the answer. So our side is closed, and
        what comes is thrown away until the client closes, or has had its time.
        """
        if not self._body_open:
            self.transport.close()
        elif not self._parting and not self.transport.is_closing():
            self._parting = True
            self._lingering_since = self.loop.time()
            if self.transport.can_write_eof():  # not with TLS, whose clients see the answer and its `connection: close`
                self.transport.write_eof()
            self.flow.resume_reading()

    def shutdown(self) -> None:
        """The server stops: a request whose long body comes is answered, and is the last one."""
        if self._kept_alive:
            self._kept_alive = False
        super().shutdown()

    def expire(self, now: float) -> None:
        """Close the connection if a head, or the rest of a refused body, has been awaited for too long. `now` is the loop's time."""
        if self._head_since is not None and now - self._head_since > self.limits.timeout_seconds:
            if self._head_bytes:
                self.refuse(
                    RequestTimeout(f"The request's headers did not arrive within {self.limits.timeout_seconds:g} s.")
                )
            else:
                self.transport.close()  # nothing was asked, so nothing is answered
        if self._parting or (self._body_open and self.cycle.response_complete):
            self._lingering_since = self._lingering_since or now
            if now - self._lingering_since > LINGER_SECONDS:
                self.transport.abort()

    def _too_large(self) -> HeadTooLarge:
        return HeadTooLarge(
            f"The request's headers are larger than the limit of {self.limits.max_bytes} bytes (gateway.max_header)."
        )

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets the error shape as well."""
        self.refuse(MalformedRequest(msg))

    def refuse(self, error: GatewayError) -> None:
        """Answer without an application and close, unless an answer is already under way."""
        self._head_since = None
        if self._parting or self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            answer = error_answer(error)
            lines = [STATUS_LINE[answer.status]]
            for name, value in (*answer.headers, (b"x-request-id", request_id(None)), *self.more_headers()):
                if name != b"connection":
                    lines += [name, b": ", value, b"\r\n"]
            self.transport.write(b"".join([*lines, b"connection: close\r\n\r\n", answer.body]))
        self.transport.close()


def bounded_by(limits: HeadLimits, more_headers: Callable[[], Headers] = list) -> type[BoundedHttpProtocol]:
    """The protocol class with its limits, as uvicorn takes it."""
    own = {"limits": limits, "linger": LingerBudget(), "more_headers": staticmethod(more_headers)}
    return type("GatewayHttpProtocol", (BoundedHttpProtocol,), own)
