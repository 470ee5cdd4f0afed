"""A client's connection that serves completions itself and leaves everything else to ASGI.

uvicorn's httptools protocol parses every request; where its head is whole, a POST to a hot route becomes a `HotRequest`, and anything
else, or anything unusual (HTTP/1.0, `Expect`, an upgrade, a header twice, a request sent before the one before it was answered), an ASGI
call as ever. One request at a time is served on a connection, by whichever side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.error_map import Headers
from gateway.exchange import Exchanges
from gateway.hotpath.engines import HotEngines
from gateway.hotpath.relayed import HotRequest
from gateway.ingress.protocol import (
    KEPT_BYTES,
    BoundedHttpProtocol,
    HeadLimits,
    LingerBudget,
)
from gateway.request import RequestIds
from gateway.surface import PLAIN, Route

# How fast large bodies are read that are served, all together: 64 MiB/s, no more than a read or two at a time.
PACE_SECONDS = 0.004
PACE_BYTES = 256 * 2**10


@dataclass(frozen=True, slots=True)
class HotPath:
    """What the connections of a gateway share: the routes by their path as it stands in the request line."""

    exchanges: Exchanges
    engines: HotEngines
    routes: Mapping[bytes, Route]
    ids: RequestIds

    @classmethod
    def of(cls, exchanges: Exchanges, engines: HotEngines) -> HotPath:
        """For all routes that a relay can pass without knowing more than the table says."""
        return cls(exchanges, engines, {path.encode(): route for path, route in PLAIN.items()}, RequestIds())


class HotHttpProtocol(BoundedHttpProtocol):
    """See the module. `path` and `pace` are set on the subclass that `hot_protocol` makes."""

    path: HotPath
    pace: LingerBudget

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hot: HotRequest | None = None  # the one that is served
        self._idle_since: float | None = None  # since the last hot request ended

    # ---- requests in

    def on_message_begin(self) -> None:
        """The first byte of a request. The ASGI scope is made when it turns out that ASGI gets it."""
        self._idle_since = None
        self.url = b""
        self.headers = []
        self.await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; trailers are none."""
        if not self._body_open:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is whole: here it is decided which way the request goes."""
        self.head_complete()
        route = self.path.routes.get(self.url)
        if route is None or not self._takes():
            self._to_asgi()
            return
        headers = dict(self.headers)
        if b"expect" in headers or b"host" not in headers or len(headers) != len(self.headers):
            self._to_asgi()  # which looks closer at a head without a host, or with a header twice
            return
        hot = HotRequest(
            self,
            self.path.exchanges,
            self.path.engines,
            route,
            headers,
            self.path.ids.of(headers.get(b"x-request-id")),
            keep_alive=self.parser.should_keep_alive() and not self.is_last,
            paused=self.flow.write_paused,
        )
        self._hot = hot
        self.cycle = hot  # type: ignore[assignment]  # it answers what uvicorn asks of the request that it serves
        hot.start(headers)

    def _takes(self) -> bool:
        parser, cycle = self.parser, self.cycle
        return (
            (cycle is None or cycle.response_complete)
            and self._hot is None
            and parser.get_method() == b"POST"
            and parser.get_http_version() == "1.1"
            and not parser.should_upgrade()
        )

    def _to_asgi(self) -> None:
        """The same head, told to uvicorn as if it came only now."""
        url, headers = self.url, self.headers
        self.make_scope()
        self.url = url
        self.headers[:] = headers
        self.expect_100_continue = any(n == b"expect" and v.lower() == b"100-continue" for n, v in headers)
        self.serve()

    def on_body(self, body: bytes) -> None:
        """A part of a body, for whoever serves its request."""
        cycle: object = self.cycle
        if type(cycle) is HotRequest and not cycle.response_complete:
            cycle.take_part(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is whole."""
        cycle: object = self.cycle
        if type(cycle) is HotRequest and not cycle.response_complete:
            self.body_over()
            cycle.body_complete()
        else:
            super().on_message_complete()

    # ---- ends

    def hot_ended(self, *, keep_alive: bool) -> None:
        """The hot request is answered, or cannot be. What was pipelined behind it gets its turn."""
        self._hot = None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if not keep_alive:
            self.part()
        elif self.pipeline:
            self.flow.resume_reading()
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        else:
            self._idle_since = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client closed, or we did."""
        hot = self._hot
        super().connection_lost(exc)
        if hot is not None:
            hot.client_lost()

    def paced(self, count: int) -> None:
        """So many bytes of a large body have come: who sends them waits if that is much for the moment."""
        self.pace.spend(count, self)

    def is_long(self, held_bytes: int) -> bool:
        """Whether a body is under way that is too long to be read to its end for nothing. `held_bytes` of it have come."""
        return self._body_open and max(self.announced, held_bytes) > KEPT_BYTES

    def shutdown(self) -> None:
        """The server stops: idle connections are closed, others after their answer."""
        if self._hot is not None:
            self._hot.keep_alive = False
        else:
            super().shutdown()

    def expire(self, now: float) -> None:
        """Also close what has been idle for too long. No timer is kept per request: there would be one more for each."""
        super().expire(now)
        if self._idle_since is not None and now - self._idle_since > self.timeout_keep_alive:
            self.transport.abort()  # an answer that is still not read will not be

    # ---- back-pressure

    def pause_writing(self) -> None:
        """The client reads more slowly than the engine writes."""
        super().pause_writing()
        if self._hot is not None:
            self._hot.pause()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if self._hot is not None:
            self._hot.resume()


def hot_protocol(
    limits: HeadLimits, path: HotPath, more_headers: Callable[[], Headers] = list
) -> type[HotHttpProtocol]:
    """The protocol class with its limits and its way to engines, as uvicorn takes it."""
    own = {"limits": limits, "linger": LingerBudget(), "more_headers": staticmethod(more_headers), "path": path}
    own["pace"] = LingerBudget(PACE_BYTES, PACE_SECONDS)
    return type("FastGatewayProtocol", (HotHttpProtocol,), own)
