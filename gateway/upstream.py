"""The client to the engines: HTTP/1.1 over Unix sockets, TCP or TLS, with a pool of kept connections per endpoint.

aiohttp, configured so that it does nothing by itself: no retries, redirects, cookies, proxies, decompression or timeouts of a
whole request. A request is sent once, and whether it may be sent elsewhere is told by the error: EngineUnreachable means that
nothing was sent.
"""

from __future__ import annotations

import asyncio
import http
import io
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from functools import partial
from typing import Any, Protocol
from urllib.parse import urlsplit

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.http import RawResponseMessage
from aiohttp.streams import StreamReader
from yarl import URL

from gateway.error_map import Headers
from gateway.errors import EngineDied, EngineError, EngineUnreachable
from gateway.large_bodies import Pieces
from placement.engine_tls import EngineTrust, remedy, told
from placement.errors import EngineTlsError
from placement.table import ReplicaRow

# Below the 5 s after which vLLM's server closes idle connections, so that a kept one is not closed under a request.
KEEP_ALIVE_SECONDS = 3.0
READ_BUFFER_BYTES = 64 * 2**10
_BIG_BODY_BYTES = 2**20

# Of an engine's headers: RFC 9110, 7.6.1, and what the gateway says itself.
NOT_PASSED_BACK = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer"),
        *(b"transfer-encoding", b"upgrade", b"content-length", b"date", b"server", b"set-cookie", b"x-request-id"),
    )
)
PROPER_STATUSES = range(200, 600)
NOT_HTTP = "The engine's answer is not valid HTTP."
_MAX_URLS = 1024
_SMALL_BYTES = 4 * 2**20  # of what `get` reads; more is cut off


class EngineResponse(Protocol):
    """An engine's answer whose head has arrived. One of `read_some` to the end, or `close`, must be called."""

    status: int
    headers: Headers

    async def read_some(self) -> bytes:
        """What has arrived, at least a byte; b"" at the proper end. Raises EngineDied where the connection ends before."""
        ...

    def close(self) -> None:
        """Close the connection at once, which makes the engine abort the request. After the end it does nothing."""
        ...


class Engines(Protocol):
    """A way to talk to engines."""

    async def post(
        self, replica: ReplicaRow, path: str, headers: Mapping[str, str], body: bytes | Pieces, *, method: str = "POST"
    ) -> EngineResponse:
        """Send a request and wait for the head of the answer. Raises EngineUnreachable (nothing was sent), EngineDied, EngineError."""
        ...

    async def get(self, replica: ReplicaRow, path: str, *, timeout_seconds: float) -> tuple[int, bytes]:
        """Status and body of a small resource. Raises EngineError."""
        ...

    async def retain(self, endpoints: Iterable[str]) -> None:
        """Close what belongs to other endpoints, requests in flight included."""
        ...

    async def close(self) -> None:
        """Close everything."""
        ...


class _OneAnswer(ResponseHandler):
    """A connection that takes one answer to each request: what comes besides ends it.

    aiohttp reads on while a connection is kept, and would take what it found for the answer to whatever is asked next.
    """

    _asked = False  # the head of an answer is to come

    def set_response_params(self, **params: Any) -> None:
        """A request is about to be sent."""
        self._asked = True
        super().set_response_params(**params)

    def data_received(self, data: bytes) -> None:
        """Parsed where something is to come."""
        if data and not self._asked and (self._payload is None or self._payload.is_eof()):
            self._distrust()
        else:
            super().data_received(data)

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """The head of an answer; one of status 1xx announces another."""
        if data[0].code < http.HTTPStatus.OK:
            super().feed_data(data, size)
        elif self._asked:
            self._asked = False
            super().feed_data(data, size)
        else:
            self._distrust()

    def _distrust(self) -> None:
        """Take nothing more; what came before it counts."""
        self.force_close()
        if self.transport is not None:
            self.transport.close()


class _AiohttpResponse:
    __slots__ = ("_replica", "_response", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse, replica: str) -> None:
        self._response = response
        self._replica = replica
        self.status = response.status
        self.headers: Headers = [(name.lower(), value) for name, value in response.raw_headers]

    async def read_some(self) -> bytes:
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise died(self._replica) from error

    def close(self) -> None:
        self._response.close()


class AiohttpEngines:
    """Engines over aiohttp; one session and one pool per endpoint."""

    def __init__(self, *, connect_timeout_seconds: float, trust: EngineTrust | None = None) -> None:
        """`trust` is asked for the context of every request over TLS: another one opens connections of its own."""
        self._trust = trust or EngineTrust()
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_seconds)
        self._sessions: dict[str, tuple[aiohttp.ClientSession, URL]] = {}
        self._urls: dict[tuple[str, str], URL] = {}

    async def post(
        self, replica: ReplicaRow, path: str, headers: Mapping[str, str], body: bytes | Pieces, *, method: str = "POST"
    ) -> EngineResponse:
        """As Engines has it."""
        session, _ = self._session(replica.endpoint)
        tls = self._tls(replica)
        # aiohttp copies small bytes into one write with the head, and wants large ones as a file.
        data: bytes | io.BytesIO | AsyncIterator[bytes]
        if isinstance(body, Pieces):
            data, headers = _one_by_one(body), {**headers, "content-length": str(body.length)}
        else:
            data = body if len(body) < _BIG_BODY_BYTES else io.BytesIO(body)
        try:
            response = await session.request(
                method,
                self._url(replica.endpoint, path),
                data=data if method == "POST" else None,
                headers={**headers, **_shown(replica)},
                allow_redirects=False,
                ssl=tls,
            )
        except (aiohttp.ClientError, OSError) as error:
            raise _sorted_out(error, replica) from error
        if response.status not in PROPER_STATUSES:
            response.close()
            raise EngineError(NOT_HTTP, replica=replica.replica)
        return _AiohttpResponse(response, replica.replica)

    async def get(self, replica: ReplicaRow, path: str, *, timeout_seconds: float) -> tuple[int, bytes]:
        """As Engines has it."""
        session, _ = self._session(replica.endpoint)
        timeout, tls = aiohttp.ClientTimeout(total=timeout_seconds), self._tls(replica)
        try:
            async with session.get(
                self._url(replica.endpoint, path),
                timeout=timeout,
                headers=_shown(replica),
                allow_redirects=False,
                ssl=tls,
            ) as response:
                held = bytearray()
                async for part in response.content.iter_any():
                    held += part
                    if len(held) > _SMALL_BYTES:
                        break
                return response.status, bytes(held)
        except TimeoutError as error:
            raise EngineError(f"no answer within {timeout_seconds:g} s", replica=replica.replica) from error
        except (aiohttp.ClientError, OSError) as error:
            raise _sorted_out(error, replica) from error

    async def retain(self, endpoints: Iterable[str]) -> None:
        """As Engines has it."""
        for endpoint in self._sessions.keys() - set(endpoints):
            session, _ = self._sessions.pop(endpoint)
            self._urls = {key: url for key, url in self._urls.items() if key[0] != endpoint}
            await session.close()

    async def close(self) -> None:
        """As Engines has it."""
        for session, _ in self._sessions.values():
            await session.close()
        self._sessions.clear()

    def _tls(self, replica: ReplicaRow) -> ssl.SSLContext | bool:
        """How the connection is made; True where it is none of TLS. Raises EngineUnreachable."""
        if not replica.endpoint.startswith("https:"):
            return True
        try:
            return self._trust.context()
        except EngineTlsError as error:
            raise unreachable(error, replica.replica, replica.endpoint) from error

    def _url(self, endpoint: str, path: str) -> URL:
        url = self._urls.get((endpoint, path))
        if url is None:
            if len(self._urls) >= _MAX_URLS:  # paths with ids in them are without number
                self._urls.clear()
            url = self._urls[endpoint, path] = self._session(endpoint)[1].join(URL(path, encoded=True))
        return url

    def _session(self, endpoint: str) -> tuple[aiohttp.ClientSession, URL]:
        if (known := self._sessions.get(endpoint)) is not None:
            return known
        connector: aiohttp.BaseConnector
        if endpoint.startswith("unix:"):
            connector, base = (
                aiohttp.UnixConnector(endpoint[5:], limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS),
                URL("http://engine"),
            )
        else:
            connector, base = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS), URL(endpoint)
        connector._factory = partial(_OneAnswer, loop=asyncio.get_running_loop())  # type: ignore[assignment]  # no narrower type is asked for
        session = aiohttp.ClientSession(
            connector=connector,
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("user-agent", "accept", "accept-encoding", "content-type"),
            read_bufsize=READ_BUFFER_BYTES,
            trust_env=False,
        )
        self._sessions[endpoint] = session, base
        return self._sessions[endpoint]


async def _one_by_one(pieces: Pieces) -> AsyncIterator[bytes]:
    """`pieces` as aiohttp wants a body of which it does not know the length."""
    while piece := pieces.take():
        yield piece


def _shown(replica: ReplicaRow) -> dict[str, str]:
    """What an engine wants to be shown that others could reach as well."""
    return {"authorization": f"Bearer {replica.secret}"} if replica.secret else {}


def _sorted_out(error: Exception, replica: ReplicaRow) -> EngineError:
    """Whether the request may have reached the engine decides what may follow."""
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        cause: BaseException = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
        return unreachable(cause, replica.replica, replica.endpoint)
    if isinstance(error, aiohttp.ClientResponseError):
        return EngineError(NOT_HTTP, replica=replica.replica)
    return died(replica.replica)


def unreachable(error: BaseException, replica: str, endpoint: str) -> EngineUnreachable:
    """No connection came about, for the reason of `error`; of TLS also what to do."""
    if isinstance(error, EngineTlsError):
        return EngineUnreachable(f"TLS to the engine fails: {error.message}. {error.remedy}", replica=replica)
    if isinstance(error, ssl.SSLError):
        advice = remedy(error, urlsplit(endpoint).hostname or endpoint)
        return EngineUnreachable(f"TLS to the engine fails: {told(error)}. {advice}", replica=replica)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return EngineUnreachable(f"The engine accepts no connection ({reason.lower()}).", replica=replica)


def died(replica: str) -> EngineDied:
    """What a client is told when an engine's connection ends early."""
    return EngineDied("The engine stopped before it finished this answer.", replica=replica)
