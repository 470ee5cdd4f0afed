"""The ends of the soak's connections, in memory: engines with accidents, and clients with bad manners.

The gateway's own protocols stand between them, `gateway.hotpath` with its pools of connections and uvicorn's under it; only sockets are
missing. Everything random comes from one generator. An answer takes a turn of the loop per part, as it does from a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from gateway.errors import EngineUnreachable
from gateway.hotpath import HotEngines
from gateway.hotpath.engines import EngineConnection
from gateway.hotpath.framing import LAST_CHUNK, chunk

USAGE = b'"usage":{"prompt_tokens":12,"completion_tokens":4,"total_tokens":16}'
WHOLE = b'{"id":"1","choices":[{"index":0,"finish_reason":"stop"}],' + USAGE + b"}"
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
END = b'data: {"choices":[],' + USAGE + b"}\n\ndata: [DONE]\n\n"

REFUSED_CONNECTIONS = 40  # of an engine that has just crashed

_JSON = b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
_EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_STREAM = (_EVENTS + chunk(EVENT), chunk(EVENT + EVENT), chunk(EVENT), chunk(LAST) + chunk(END) + LAST_CHUNK)
_ANSWER = (_JSON % (200, len(WHOLE)) + WHOLE[:40], WHOLE[40:])
_BUSY = b'{"error":{"message":"busy","type":"ServiceUnavailable","code":503}}'
_REFUSAL = (_JSON % (503, len(_BUSY)) + _BUSY,)
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n")
_NOT_HTTP = (b"no answer at all\r\n\r\n",)


class Wire(asyncio.Transport):
    """One end of a connection: what is written goes to `heard`; closing it tells its protocol, a turn later."""

    def __init__(self) -> None:
        super().__init__()
        self.protocol: asyncio.Protocol | None = None
        self._closing = False

    def heard(self, data: bytes) -> None:
        """The protocol has written."""
        raise NotImplementedError

    def write(self, data: Any) -> None:
        """As transports have it."""
        if not self._closing:
            self.heard(bytes(data))

    def writelines(self, parts: Any) -> None:
        """As transports have it."""
        self.write(b"".join(parts))

    def is_closing(self) -> bool:
        """As transports have it."""
        return self._closing

    def close(self) -> None:
        """As transports have it."""
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._lost)

    abort = close

    def _lost(self) -> None:
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            protocol.connection_lost(None)

    def can_write_eof(self) -> bool:
        """Neither side closes by halves."""
        return False

    def pause_reading(self) -> None:
        """As transports have it."""

    def resume_reading(self) -> None:
        """As transports have it."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As transports have it; the ends here take everything."""


class EngineWire(Wire):
    """An engine at the other end of one connection; what becomes of each request is drawn."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__()
        self._chance = chance
        self._parts: Iterator[bytes] = iter(())
        self._dies_after = -1
        self._to_come = 0  # bytes of the request's body
        self._stream = False
        self._paused = self._waiting = False

    def heard(self, data: bytes) -> None:
        """A request, or a part of one: when it is whole it is answered, refused, cut off, or left without an answer."""
        if self._to_come:
            self._to_come -= len(data)
        else:
            length = _LENGTH.search(data)
            assert length is not None
            self._to_come = int(length.group(1)) + data.find(b"\r\n\r\n") + 4 - len(data)
            self._stream = False
        self._stream = self._stream or b'"stream":true' in data
        if not self._to_come:
            self._decide(self._stream)

    def _decide(self, stream: bool) -> None:
        fate = self._chance.random()
        parts: tuple[bytes, ...] = _STREAM if stream else _ANSWER
        self._dies_after = -1
        if fate < 0.0002:
            return  # it hangs
        if fate < 0.002:
            self._dies_after = self._chance.randrange(3)
        elif fate < 0.0022:
            parts = _NOT_HTTP
        elif fate < 0.01:
            parts = _REFUSAL
        self._parts = iter(parts)
        self._later()

    def pause_reading(self) -> None:
        """The gateway takes no more."""
        self._paused = True

    def resume_reading(self) -> None:
        """It does again."""
        self._paused = False
        if self._waiting:
            self._waiting = False
            self._later()

    def _later(self) -> None:
        asyncio.get_running_loop().call_soon(self._say)

    def _say(self) -> None:
        if self._closing or self.protocol is None:
            return
        if self._paused:
            self._waiting = True
            return
        if self._dies_after == 0:
            self.close()
            return
        self._dies_after -= 1
        part = next(self._parts, None)
        if part is not None:
            self._later()
            self.protocol.data_received(part)


class MemoryEngines(HotEngines):
    """`HotEngines` whose connections lead nowhere; its pools are the real ones."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(connect_timeout_seconds=1.0)
        self._chance = chance
        self._down: dict[str, int] = {}

    def crash(self, endpoint: str) -> None:
        """The engine at `endpoint` ends with all its connections, and refuses the next ones."""
        self._down[endpoint] = REFUSED_CONNECTIONS
        for connection in list(self._pool(endpoint).connections):
            connection.transport.close()

    async def connect(self, endpoint: str, replica: str) -> EngineConnection:
        """A connection, or a refusal."""
        await asyncio.sleep(0)
        if self._down.get(endpoint, 0) > 0 or self._chance.random() < 0.01:
            self._down[endpoint] = self._down.get(endpoint, 0) - 1
            raise EngineUnreachable("refused", replica=replica)
        wire = EngineWire(self._chance)
        wire.protocol = connection = EngineConnection(self._pool(endpoint))
        connection.connection_made(wire)
        return connection


class ClientWire(Wire):
    """A client at the other end of one connection. `status` is of the answer that is being read, 0 before it begins."""

    def __init__(self, make: Callable[[], asyncio.Protocol]) -> None:
        super().__init__()
        self.protocol = make()
        self.protocol.connection_made(self)
        self._ended = asyncio.Event()
        self._left: int | None = None  # bytes of the answer that are to come, None where chunks tell
        self._leaves_after = -1
        self.status = 0

    async def ask(self, request: bytes, *, leaves_after: int, pause: bool) -> int:
        """Send a request and read the answer; its status, 0 if the connection ended before there was one.

        `leaves_after` so many reads the client closes, if that is not negative. With `pause` it stops reading for a while.
        """
        self.status, self._leaves_after, protocol = 0, leaves_after, self.protocol
        self._ended.clear()
        if protocol is None or self._closing:
            return 0
        half = len(request) // 2 if leaves_after >= 0 else len(request)
        protocol.data_received(request[:half])
        if leaves_after == 0:
            self.close()
        elif half < len(request) and not self._closing:
            await asyncio.sleep(0)
            with contextlib.suppress(AttributeError):  # refused by its head, and closed
                protocol.data_received(request[half:])
        if pause and not self._closing:
            protocol.pause_writing()
            await asyncio.sleep(0.002)
            if not self._closing:
                protocol.resume_writing()
        await self._ended.wait()
        return self.status

    def heard(self, data: bytes) -> None:
        """A part of an answer."""
        if not self.status:
            self.status = int(data[9:12])
            head = data.find(b"\r\n\r\n") + 4
            length = _LENGTH.search(data, 0, head)
            self._left = int(length.group(1)) + head if length else None
        if self._left is not None:
            self._left -= len(data)
        self._leaves_after -= 1
        if self._left == 0 or (self._left is None and data.endswith(LAST_CHUNK)):
            self._ended.set()
        elif self._leaves_after == 0:
            self.close()

    def _lost(self) -> None:
        super()._lost()
        self._ended.set()
